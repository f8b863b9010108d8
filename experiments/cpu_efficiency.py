"""How near training comes to the rate of a large matrix product on this CPU.

  python experiments/cpu_efficiency.py

Writes experiments/results/cpu_efficiency.md. `CPU_EFFICIENCY` in googlenet_jax/report.py, on which the estimate at the
start of a run rests, is a round figure from here.
"""

import argparse
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax

from configs import fashion_fast
from experiments import benchmark_jax
from experiments.benchmark_tables import command, cores, cpu_model, publish, table
from googlenet_jax.host import huge_pages, sharding
from googlenet_jax.model import googlenet

SIZES = ((32, 128), (96, 64), (224, 32))  # pixels, batch
REPEATS = 7
WARM_UP = 4  # steps
PRODUCT = 1024  # side of the matrices


def training_rate(image_size: int, batch_size: int) -> tuple[float, float]:
  """Images a second of `train_step` with batch normalisation, and multiply-adds a second (three forward passes')."""
  config = fashion_fast.get_config()
  config.image_size, config.batch_size = image_size, batch_size
  mesh = sharding.make_mesh()
  step, state, network = benchmark_jax.make_training(config, mesh)
  batch = benchmark_jax.random_batch(batch_size, mesh)
  _, state = benchmark_jax.timed_steps(step, state, batch, WARM_UP)
  seconds, _ = benchmark_jax.timed_steps(step, state, batch, REPEATS)
  images = batch_size / statistics.median(seconds)
  return images, 3 * images * googlenet.count_multiply_adds(network, image_size)


def main() -> None:
  """Prints and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'experiments' / 'results', help='folder')
  options = parser.parse_args()
  lines = []
  for image_size, batch_size in SIZES:
    before = benchmark_jax.product(PRODUCT, 'float32', REPEATS)
    images, rate = training_rate(image_size, batch_size)
    peak = (before + benchmark_jax.product(PRODUCT, 'float32', REPEATS)) / 2
    lines.append([str(image_size), str(batch_size), f'{images:.0f}', f'{2 * rate / peak:.2f}'])
  head = (
    f'Measured by `{command()}`: jax {jax.__version__}, float32, {cores()} cores of\n'
    f'{cpu_model()},\n'
    f'median of {REPEATS} steps after {WARM_UP}, batch normalisation on.\n\n'
  )
  names = ['image size', 'batch', 'training, images/s', f'share of a {PRODUCT}x{PRODUCT} product']
  publish(head + table(names, lines), options.output / 'cpu_efficiency.md')


if __name__ == '__main__':
  huge_pages.restart()  # as main.py
  main()
