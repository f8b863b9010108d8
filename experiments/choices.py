"""What the choices of a recipe are worth on held-out training images: each undone in turn, over some seeds.

  FASHION_MNIST_DIR=DIR python experiments/choices.py             # configs/fashion_best.py, for an accelerator
  FASHION_MNIST_DIR=DIR python experiments/choices.py --epochs=3 --seeds=1 \\
      --set=dtype=float32 --set=model.stem=article --set=average_decay=0.99    # a scale for a CPU

Every run is `main.py` in runs/choices; one that has ended is not trained again, an interrupted one goes on. The table
goes to experiments/results/choices/: mean accuracy on the held-out images, with the lowest and the highest. Other
values of `--set` need another `--name`. The test images decide nothing.
"""

import argparse
import json
import pathlib
import re
import runpy
import shlex
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # also for recipes, which begin with `from configs import default`

from experiments.run_main import run_or_exit

VARIANTS = {  # what is changed of the recipe
  'as it is': (),
  'article stem': ('model.stem=article',),
  'learning rate 0.1': ('learning_rate=0.1',),
  'learning rate 0.02': ('learning_rate=0.02',),
  'batches of 128': ('batch_size=128',),
  'no mirroring': ('augment.flip=False',),
  'no padding': ('augment.padding=0',),
  'shift of 3 pixels': ('augment.shift=3',),
  'larger areas': ('augment.min_area=0.6',),
  'whole images': ('augment.min_area=1.0',),
  'no erasing': ('augment.erasing=0.0',),
  'no label smoothing': ('label_smoothing=0.0',),
  'no dropout': ('model.dropout=0.0',),
  'no averages': ('average_decay=0.0',),
  'auxiliary classifiers': ('model.auxiliary=adaptive_pool',),
}


def parse() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='configs/fashion_best.py')
  parser.add_argument('--epochs', type=int, help='default: those of the recipe')
  parser.add_argument('--seeds', type=int, default=3, help='how many')
  parser.add_argument('--variants', default=','.join(VARIANTS), help='names, separated by commas')
  parser.add_argument('--name', help='of runs and results; default: that of the recipe, and the epochs')
  parser.add_argument('--crops', default='1,10,144', help='by how many to evaluate')
  parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE', help='for every run')
  options = parser.parse_args()
  options.variants = options.variants.split(',')
  unknown = sorted(set(options.variants) - set(VARIANTS))
  if unknown:
    parser.error(f'--variants: {", ".join(unknown)} unknown; choose from {", ".join(VARIANTS)}')
  crops = set(options.crops.split(','))
  if not crops <= {'1', '10', '144'}:
    parser.error(f'--crops={options.crops} must be of 1, 10 and 144, separated by commas')
  options.crops = sorted(map(int, crops))
  if options.seeds < 1:
    parser.error('--seeds must be at least 1')
  if not pathlib.Path(ROOT, options.config).is_file():
    parser.error(f'--config={options.config} does not exist')
  if not runpy.run_path(str(ROOT / options.config))['get_config']().data.validation_examples:
    parser.error(f'--config={options.config} holds no images out (data.validation_examples), so that none could decide')
  return options


def held_out_accuracy(options: argparse.Namespace, name: str, seed: int, folder: pathlib.Path) -> list[float]:
  """Trains one variant with one seed; returns accuracy on the held-out images by each number of crops."""
  workdir = folder / f'{"_".join(re.findall("[a-z0-9]+", name))}_{seed}'
  keys = [*options.set, *VARIANTS[name], f'seed={seed}']
  if options.epochs:
    keys.append(f'epochs={options.epochs}')
  flags = [f'--config={options.config}', f'--workdir={workdir}', *(f'--config.{key}' for key in keys)]
  run_or_exit(flags)
  if not evaluated(workdir, options.crops):
    counts = ','.join(map(str, options.crops))
    run_or_exit([*flags, '--mode=evaluate', '--split=validation', f'--crops={counts}'])
  table = json.loads((workdir / 'evaluation.json').read_text())['table']
  return [1 - row['top1_error'] for row in table if row['models'] == 1 and row['crops'] in options.crops]


def evaluated(workdir: pathlib.Path, crops: list[int]) -> bool:
  """Whether the last step was evaluated on the held-out images, by these numbers of crops."""
  if not (workdir / 'evaluation.json').exists():
    return False
  found, summary = (json.loads((workdir / f'{name}.json').read_text()) for name in ('evaluation', 'summary'))
  same = (found['split'], found['step']) == ('validation', summary['steps'])
  return same and set(crops) <= {row['crops'] for row in found['table']}


def main() -> None:
  """Runs what is missing, writes the table."""
  options = parse()
  recipe = pathlib.Path(options.config).stem
  scale = options.name or (f'{recipe}_{options.epochs}_epochs' if options.epochs else recipe)
  lines = [f'Written by `{shlex.join(["python", "experiments/choices.py", *sys.argv[1:]])}`:\n']
  head = ['variant', 'seeds', *(f'{count} crop{"s" * (count > 1)}' for count in options.crops)]
  lines += ['| ' + ' | '.join(head) + ' |', '| --- ' * len(head) + '|']
  for name in options.variants:
    found = [held_out_accuracy(options, name, seed, ROOT / 'runs' / 'choices' / scale) for seed in range(options.seeds)]
    cells = []
    for values in zip(*found, strict=True):
      spread = f' ({min(values):.4f} to {max(values):.4f})' if len(values) > 1 else ''
      cells.append(f'{statistics.fmean(values):.4f}{spread}')
    lines.append('| ' + ' | '.join([name, str(options.seeds), *cells]) + ' |')
    print(lines[-1], flush=True)
  results = ROOT / 'experiments' / 'results' / 'choices' / f'{scale}.md'
  results.parent.mkdir(parents=True, exist_ok=True)
  results.write_text('\n'.join(lines) + '\n')
  print(f'written to {results}')


if __name__ == '__main__':
  main()
