"""How near training comes to the rate of a large matrix product on this CPU.

  python experiments/cpu_efficiency.py

Writes experiments/results/cpu_efficiency.md. `CPU_EFFICIENCY` in googlenet_jax/report.py, on which the estimate at the
start of a run rests, is a round figure from here.
"""

import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

from configs import fashion_fast
from googlenet_jax import models, optimizers, parallel, train
from googlenet_jax.state import create_state

SIZES = ((32, 128), (96, 64), (224, 32))  # pixels, batch
REPEATS = 7
WARM_UP = 4  # steps, until malloc has all the memory that it will need


def product_rate() -> float:
  """Multiply-adds a second of a 1024x1024 product."""
  a = jnp.ones((1024, 1024))
  product = jax.jit(lambda a: a @ a)
  product(a).block_until_ready()
  seconds = []
  for _ in range(REPEATS):
    begin = time.perf_counter()
    product(a).block_until_ready()
    seconds.append(time.perf_counter() - begin)
  return 1024**3 / statistics.median(seconds)


def training_rate(image_size: int, batch_size: int) -> tuple[float, float]:
  """Images a second of `train_step` with batch normalisation, and multiply-adds a second (three forward passes')."""
  config = fashion_fast.get_config()
  config.image_size, config.batch_size = image_size, batch_size
  mesh = parallel.make_mesh()
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 100))
  graphdef, state = create_state(config, 10, 1, tx, mesh)
  model = models.nnx.merge(graphdef, state.params, state.batch_stats)
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (batch_size, 28, 28, 1), np.uint8),
    'label': rng.integers(0, 10, batch_size).astype(np.int32),
  }
  batch = parallel.shard_batch(batch, mesh)
  step = train.make_train_step(graphdef, tx, config, mesh)
  for _ in range(WARM_UP):
    state, loss = step(state, batch)
    loss.block_until_ready()
  seconds = []
  for _ in range(REPEATS):
    begin = time.perf_counter()
    state, loss = step(state, batch)
    loss.block_until_ready()
    seconds.append(time.perf_counter() - begin)
  images = batch_size / statistics.median(seconds)
  return images, 3 * images * models.count_multiply_adds(model, image_size)


def main() -> None:
  """Prints and writes the table."""
  parallel.keep_freed_memory()  # as main.py does
  lines = [
    f'Measured by `python experiments/cpu_efficiency.py`: jax {jax.__version__}, {os.cpu_count()} CPU cores, float32,',
    f'median of {REPEATS} steps after {WARM_UP}, batch normalisation on.',
    '',
    '| image size | batch | training, images/s | share of a 1024x1024 product |',
    '|---|---|---|---|',
  ]
  for image_size, batch_size in SIZES:
    before = product_rate()
    images, rate = training_rate(image_size, batch_size)
    peak = (before + product_rate()) / 2
    lines.append(f'| {image_size} | {batch_size} | {images:.0f} | {rate / peak:.2f} |')
  text = '\n'.join(lines) + '\n'
  print(text)
  (ROOT / 'experiments' / 'results' / 'cpu_efficiency.md').write_text(text)


if __name__ == '__main__':
  main()
