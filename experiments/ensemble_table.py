"""Trains an ensemble and prints the paper's table 3 for it: models times crops against error.

  FASHION_MNIST_DIR=DIR python experiments/ensemble_table.py                                # configs/fashion_best.py
  FASHION_MNIST_DIR=DIR python experiments/ensemble_table.py --name=trial --config.epochs=1

Other keys of the recipe go to `main.py`; without `--config.ensemble.members` there are seven. An interrupted run goes
on when the same command is given again. The table, its picture, all numbers and the command are copied to
experiments/results/ensemble/NAME/, where NAME is that of the recipe, or `--name`.
"""

import argparse
import pathlib
import shlex
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.run_main import run_or_exit


def main() -> None:
  """Trains, evaluates, copies."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
  parser.add_argument('--config', default='configs/fashion_best.py')
  parser.add_argument('--name', help='of the run and its results; default: that of the recipe')
  options, flags = parser.parse_known_args()
  for flag in flags:
    if not flag.startswith('--config.'):
      parser.error(f'{flag}: besides --config and --name only keys of the recipe, as --config.KEY=VALUE')
  name = options.name or pathlib.Path(options.config).stem
  workdir = pathlib.Path('runs', f'{name}_ensemble')  # from ROOT, where main.py starts
  if not any(flag.startswith('--config.ensemble.members') for flag in flags):
    flags.append('--config.ensemble.members=7')
  flags = [f'--config={options.config}', *flags]
  for mode in ('train', 'evaluate'):
    run_or_exit([*flags, f'--workdir={workdir}', f'--mode={mode}'])
  results = ROOT / 'experiments' / 'results' / 'ensemble' / name
  results.mkdir(parents=True, exist_ok=True)
  for file in ('table.png', 'evaluation.json'):
    shutil.copy(ROOT / workdir / file, results / file)
  table = (ROOT / workdir / 'table.md').read_text()
  command = shlex.join(['python', 'experiments/ensemble_table.py', *sys.argv[1:]])
  (results / 'table.md').write_text(f'Written by `{command}`.\n\n{table}')
  print(f'copied to {results}')


if __name__ == '__main__':
  main()
