"""How long it takes from the command to the end of the first training step, and on what.

  FASHION_MNIST_DIR=DIR python experiments/time_to_first_step.py
  python experiments/time_to_first_step.py --config=configs/digits.py

Runs `main.py` with a compilation cache that is empty, and then with the one that this run has left. TFDS has prepared
the data before the first. Writes experiments/results/time_to_first_step.md.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.benchmark_tables import cores, cpu_model, publish, table
from googlenet_jax.host import huge_pages

START, OUTPUT = 'FIRST_STEP_START', 'FIRST_STEP_OUTPUT'  # environment of the run that is timed


def timed_run() -> None:
  """Runs main.py in this process and writes the seconds of every phase when the first step has ended."""
  begin = float(os.environ[START])
  seconds, last = collections.Counter(), begin

  def until_now(phase: str) -> None:
    nonlocal last
    now = time.time()
    seconds[phase] += now - last
    last = now

  def timed(owner, name: str, phase: str, before: str = 'the rest') -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
      until_now(before)
      try:
        return function(*args, **kwargs)
      finally:
        until_now(phase)

    setattr(owner, name, wrapper)

  until_now('Python')
  import jax

  import main
  from googlenet_jax.data import datasets
  from googlenet_jax.training import loop

  until_now('imports')
  timed(datasets, 'load', 'data set')
  timed(loop, 'create_state', 'network and state')
  timed(loop.Report, 'introduce', 'estimate and introduction')
  timed(jax.stages.Lowered, 'compile', 'compiling', before='batch, tracing and lowering')

  def first_step(*_):
    until_now('first step')
    pathlib.Path(os.environ[OUTPUT]).write_text(json.dumps({**seconds, 'in all': last - begin}))
    os._exit(0)

  loop.Report.log_training = first_step
  main.run()


def main() -> None:
  """Times runs in fresh processes."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--config', default='configs/fashion_fast.py')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'experiments' / 'results')
  options = parser.parse_args()
  columns = {}
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)

    def run(cache: str) -> dict[str, float]:
      flags = [f'--config={options.config}', f'--workdir={tempfile.mkdtemp(dir=folder)}', '--config.log_every_steps=1']
      environment = os.environ | {'JAX_COMPILATION_CACHE_DIR': str(folder / cache), OUTPUT: str(folder / 'seconds')}
      environment |= {START: str(time.time())}
      done = subprocess.run(
        [sys.executable, __file__, *flags], env=environment, cwd=ROOT, capture_output=True, text=True
      )
      if done.returncode:
        sys.exit(f'error: main.py ended with status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}')
      return json.loads((folder / 'seconds').read_text())

    run('prepare')  # TFDS prepares the data, the system reads the files
    for name in ('cold', 'warm'):
      runs = [run(f'cache{i}') for i in range(options.repeats)]
      columns[f'{name} cache'] = {phase: statistics.median(r.get(phase, 0.0) for r in runs) for phase in runs[0]}
  phases = list(dict.fromkeys(phase for column in columns.values() for phase in column))
  lines = [[phase, *(f'{column.get(phase, 0):.2f}' for column in columns.values())] for phase in phases]
  text = (
    f'Seconds from `python main.py --config={options.config}` to the end of the first step, medians of '
    f'{options.repeats} runs by\n`python experiments/time_to_first_step.py` on {cores()} cores of\n'
    f'{cpu_model()}.\n\n'
  ) + table(['', *columns], lines)
  publish(text, options.output / 'time_to_first_step.md')


if __name__ == '__main__':
  if START in os.environ:
    huge_pages.restart()  # as main.py
    timed_run()
  else:
    main()
