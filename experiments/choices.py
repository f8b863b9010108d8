"""What each choice of a recipe is worth on held-out training images: one change at a time, over several seeds.

  python -m experiments.choices                       # configs/fashion_best.py, for an accelerator
  python -m experiments.choices --epochs=3 --seeds=1 --crops=1,6 \\
      --set=dtype=float32 --set=model.stem=article --set=average_decay=0.99      # for a CPU

Each run is `main.py` in runs/choices. A run that has ended is not trained again; an interrupted one continues. The
table goes to experiments/results/choices/ after every variant: mean accuracy on the held-out images, with the lowest
and the highest. Use another `--name` for other values of `--set`. The test images decide nothing.
"""

import argparse
import json
import pathlib
import re
import statistics

from experiments import tables
from experiments.worker import ROOT, run_or_exit
from googlenet_jax import recipe
from googlenet_jax.data import crops
from googlenet_jax.host.errors import UserError

VARIANTS = {
  'as it is': (),
  "d2l's stem": ('model.stem=article',),
  'learning rate 0.2': ('learning_rate=0.2',),
  'learning rate 0.05': ('learning_rate=0.05',),
  'no warm-up': ('warmup_epochs=0.0',),
  'linear schedule': ('schedule=linear',),
  'one cycle': ('schedule=one_cycle', 'warmup_epochs=0.0'),
  'batches of 128': ('batch_size=128',),
  'no mirroring': ('augment.flip=False',),
  'alternating mirroring': ('augment.flip=False', 'augment.alternating_flip=True'),
  'no padding': ('augment.padding=0',),
  'shift of 2 pixels': ('augment.shift=2',),
  'areas of 60 to 100 %': ('augment.min_area=0.6',),
  'no erasing': ('augment.erasing=0.0',),
  'CutMix': ('augment.cutmix=0.5',),
  'CutMix in place of erasing': ('augment.cutmix=0.5', 'augment.erasing=0.0'),
  'mixup': ('augment.mixup=0.2',),
  'weight decay 0.001': ('weight_decay=0.001',),
  'no label smoothing': ('label_smoothing=0.0',),
  'no dropout': ('model.dropout=0.0',),
  'no averages': ('average_decay=0.0',),
  'auxiliary classifiers': ('model.auxiliary=adaptive_pool',),
}


def parse_arguments() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--config', default='configs/fashion_best.py')
  add('--epochs', type=int, help="default: the recipe's")
  add('--seeds', type=int, default=3, help='number of seeds')
  add('--variants', help=f'names separated by commas; default: all of {", ".join(VARIANTS)}'.replace('%', '%%'))
  add('--set', action='append', default=[], metavar='KEY=VALUE', help='for every run; can be repeated')
  add('--crops', default=','.join(map(str, crops.COUNTS)), help='numbers of crops to evaluate with')
  add('--name', help='of the runs and results; default: the name of the recipe, and the epochs')
  add('--output', type=pathlib.Path, default=tables.RESULTS / 'choices', help='folder of the results')
  options = parser.parse_args()
  options.variants = options.variants.split(',') if options.variants else list(VARIANTS)
  if unknown := sorted(set(options.variants) - set(VARIANTS)):
    parser.error(f'--variants: no {", ".join(unknown)}; choose from {", ".join(VARIANTS)}')
  counts = set(options.crops.split(','))
  if not counts <= set(map(str, crops.COUNTS)):
    parser.error(f'--crops={options.crops}: choose from {",".join(map(str, crops.COUNTS))}')
  options.crops = sorted(map(int, counts))
  if options.seeds < 1:
    parser.error('--seeds must be at least 1')
  try:
    if not recipe.read(str(ROOT / options.config)).data.validation_examples:
      parser.error(
        f'--config={options.config} holds no images out (data.validation_examples=0), so choices cannot be compared'
      )
  except UserError as error:
    parser.error(str(error))
  return options


def held_out_accuracy(options: argparse.Namespace, name: str, seed: int, folder: pathlib.Path) -> list[float]:
  """Trains one variant with one seed; returns the accuracy on the held-out images for each number of crops."""
  workdir = folder / f'{"_".join(re.findall("[a-z0-9]+", name.lower()))}_{seed}'
  epochs = [f'epochs={options.epochs}'] if options.epochs else []
  keys = [f'--config.{key}' for key in (*epochs, *options.set, *VARIANTS[name], f'seed={seed}')]
  run_or_exit([f'--config={options.config}', f'--workdir={workdir}', *keys])
  if not evaluated(workdir, options.crops):
    counts = ','.join(map(str, options.crops))
    run_or_exit(['--mode=evaluate', f'--workdir={workdir}', '--split=validation', f'--crops={counts}'])
  table = json.loads((workdir / 'evaluation.json').read_text())['table']
  return [1 - row['top1_error'] for row in table if row['models'] == 1 and row['crops'] in options.crops]


def evaluated(workdir: pathlib.Path, counts: list[int]) -> bool:
  """Returns whether the last step was evaluated on the held-out images with these numbers of crops."""
  if not (workdir / 'evaluation.json').exists():
    return False
  found, summary = (json.loads((workdir / f'{name}.json').read_text()) for name in ('evaluation', 'summary'))
  same = (found['split'], found['step']) == ('validation', summary['steps'])
  return same and set(counts) <= {row['crops'] for row in found['table']}


def main() -> None:
  """Runs what is missing and writes the table."""
  options = parse_arguments()
  stem = pathlib.Path(options.config).stem
  scale = options.name or (f'{stem}_{options.epochs}_epochs' if options.epochs else stem)
  runs, results = ROOT / 'runs' / 'choices' / scale, options.output / f'{scale}.md'
  head = ['variant', 'seeds', *(crops.NAMES[count] for count in options.crops)]
  results.parent.mkdir(parents=True, exist_ok=True)
  lines = []
  for name in options.variants:
    found = [held_out_accuracy(options, name, seed, runs) for seed in range(options.seeds)]
    line = [name, str(options.seeds)]
    for values in zip(*found, strict=True):
      spread = f' ({min(values):.4f} to {max(values):.4f})' if len(values) > 1 else ''
      line.append(f'{statistics.fmean(values):.4f}{spread}')
    lines.append(line)
    print(*line, sep=' | ', flush=True)
    results.write_text(f'{tables.written_by("jax")}\n\n{tables.table(head, lines)}')
  print(f'written to {results}')


if __name__ == '__main__':
  main()
