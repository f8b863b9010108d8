"""One device for the whole CPU, or two: training steps of both by turns.

  python experiments/cpu_devices.py

Writes experiments/results/cpu_devices.md, on which `parallel.cpu_devices` rests.
"""

import contextlib
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax

from experiments.benchmark_jax import WARM_UP
from experiments.benchmark_tables import cores, cpu_model, publish, table
from experiments.worker import Worker

CASES = ((32, 256, 'none'), (96, 64, 'none'), (224, 16, 'none'), (32, 128, 'batch'))  # pixels, batch, norm
ROUNDS, STEPS = 5, 4


def compare(image_size: int, batch_size: int, norm: str) -> tuple[list[float], list[float]]:
  """Seconds a step, of every round, on one device and on two."""
  seconds = ([], [])
  with contextlib.ExitStack() as stack:
    workers = []
    for devices in ('1', '2'):
      worker = Worker('benchmark_jax.py', {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': devices})
      workers.append(stack.enter_context(contextlib.closing(worker)))
      worker.ask('make', mode='training', image_size=image_size, batch_size=batch_size, dtype='float32', norm=norm)
    for turn in range(ROUNDS):
      for i in (0, 1) if turn % 2 == 0 else (1, 0):
        seconds[i].append(workers[i].ask('run', steps=STEPS))
  return seconds


def main() -> None:
  """Prints and writes the table."""
  lines = []
  for image_size, batch_size, norm in CASES:
    one, two = compare(image_size, batch_size, norm)
    ratios = sorted(a / b for a, b in zip(one, two, strict=True))
    rates = [f'{batch_size / statistics.median(s):.0f}' for s in (one, two)]
    spread = f'{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})'
    lines.append([str(image_size), str(batch_size), norm, *rates, spread])
  head = (
    f'Measured by `python experiments/cpu_devices.py`: jax {jax.__version__}, float32, {cores()} cores of\n'
    f'{cpu_model()};\n'
    f'medians of {ROUNDS} rounds of {STEPS} steps, one device and two by turns; not counted are the first {WARM_UP}\n'
    'steps, and one in each round.\n\n'
  )
  names = ['image size', 'batch', 'norm', '1 device, images/s', '2 devices', 'ratio, median and range of the rounds']
  publish(head + table(names, lines), ROOT / 'experiments' / 'results' / 'cpu_devices.md')


if __name__ == '__main__':
  main()
