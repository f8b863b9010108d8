"""One device for the whole CPU, or two; huge pages, or pages of 4 KB: training steps by turns.

  python experiments/cpu_devices.py

Writes experiments/results/cpu_devices.md, on which `sharding.cpu_devices` and `huge_pages.restart` rest.
"""

import argparse
import contextlib
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax

from experiments import benchmark_jax
from experiments.benchmark_tables import command, cores, cpu_model, publish, table
from experiments.worker import Worker
from googlenet_jax.host import huge_pages, sharding

CASES = ((32, 256, 'none'), (96, 64, 'none'), (224, 16, 'none'), (32, 128, 'batch'))  # pixels, batch, norm
ROUNDS, STEPS = 5, 4


def devices(image_size: int, batch_size: int, norm: str) -> int:
  """How many main.py makes."""
  config = benchmark_jax.recipe(image_size, batch_size, norm=norm)
  return sharding.cpu_devices(2, batch_size, image_size, config.model)


def compare(image_size: int, batch_size: int, norm: str) -> list[list[float]]:
  """Seconds a step, of every round: on one device, on two, and without huge pages."""
  chosen = devices(image_size, batch_size, norm)
  contenders = [{'JAX_NUM_CPU_DEVICES': '1'}, {'JAX_NUM_CPU_DEVICES': '2'}]
  contenders.append({'JAX_NUM_CPU_DEVICES': str(chosen), huge_pages.VARIABLE: f'{huge_pages.TUNABLE}=0'})
  seconds = [[] for _ in contenders]
  with contextlib.ExitStack() as stack:
    workers = []
    for environment in contenders:
      worker = Worker('benchmark_jax.py', {'JAX_PLATFORMS': 'cpu'} | environment)
      workers.append(stack.enter_context(contextlib.closing(worker)))
      worker.ask('make', mode='training', image_size=image_size, batch_size=batch_size, dtype='float32', norm=norm)
    for turn in range(ROUNDS):
      order = range(len(contenders))
      for i in order if turn % 2 == 0 else reversed(order):
        seconds[i].append(workers[i].ask('run', steps=STEPS))
  return seconds


def spread(slow: list[float], fast: list[float]) -> str:
  """Median and range of the rounds' ratios."""
  ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
  return f'{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})'


def main() -> None:
  """Prints and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'experiments' / 'results', help='folder')
  options = parser.parse_args()
  lines = []
  for image_size, batch_size, norm in CASES:
    one, two, small = compare(image_size, batch_size, norm)
    rates = [f'{batch_size / statistics.median(s):.0f}' for s in (one, two, small)]
    same = two if devices(image_size, batch_size, norm) == 2 else one
    lines.append([str(image_size), str(batch_size), norm, *rates, spread(one, two), spread(small, same)])
    print(' | '.join(lines[-1]), flush=True)
  head = (
    f'Measured by `{command()}`: jax {jax.__version__}, float32, {cores()} cores of\n'
    f'{cpu_model()};\n'
    f'medians of {ROUNDS} rounds of {STEPS} steps by turns; not counted are the first '
    f'{benchmark_jax.WARM_UP}. Ratios with the range of the\nrounds. '
    'With pages of 4 KB there are as many devices as `sharding.cpu_devices` makes.\n\n'
  )
  names = ['image size', 'batch', 'norm', '1 device, images/s', '2 devices', 'pages of 4 KB']
  names += ['2 devices to 1', 'huge pages to 4 KB']
  publish(head + table(names, lines), options.output / 'cpu_devices.md')


if __name__ == '__main__':
  main()
