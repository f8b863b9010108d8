"""What layers.py writes another way on a CPU, beside XLA's own: one layer, forward and backward.

  python experiments/layer_speed.py

Writes experiments/results/layer_speed.md. A layer alone says less than a step: what surrounds it is fused with it, or
competes with it for memory. `python experiments/benchmark.py` times whole steps.
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

from experiments.benchmark_tables import publish, table
from googlenet_jax import layers, parallel

REPEATS = 15


def pool(stride):
  """`(function, no kernels)`."""
  return lambda x: layers.max_pool(x, stride), []


def conv(in_features, out_features, kernel_size):
  """`(function, kernel's shape)`."""
  return layers.conv, [(kernel_size, kernel_size, in_features, out_features)]


def reductions(in_features, *out_features):
  """`(function, kernels' shapes)` of the 1x1 convolutions that read one map."""
  return layers.pointwise, [(in_features, out) for out in out_features]


CASES = {  # stages of the network at 96 pixels, batch 64; the last two at 32 pixels, batch 256
  'max-pool after conv1, stride 2': ((64, 48, 48, 64), pool(2)),
  'max-pool in 3b, stride 1': ((64, 12, 12, 256), pool(1)),
  '1x1 convolutions of 3b': ((64, 12, 12, 256), reductions(256, 128, 128, 32)),
  '1x1 convolutions of 4b': ((64, 6, 6, 512), reductions(512, 160, 112, 24)),
  '3x3 convolution of 4e': ((64, 6, 6, 160), conv(160, 320, 3)),
  '5x5 convolution of 4e': ((64, 6, 6, 32), conv(32, 128, 5)),
  '3x3 convolution of 4e, small': ((256, 2, 2, 160), conv(160, 320, 3)),
  '5x5 convolution of 5a, small': ((256, 1, 1, 32), conv(32, 128, 5)),
}


def step(function):
  """Jitted `(arrays) -> (value, gradients)`; the gradient that comes in is the value, so that nothing is constant."""

  def both(*arrays):
    value, pullback = jax.vjp(lambda *arrays: function(*arrays), *arrays)
    return value, pullback(value)

  return jax.jit(both)


def measure(name):
  """Median milliseconds: XLA's own, ours, by turns."""
  shape, (function, kernels) = CASES[name]
  keys = jax.random.split(jax.random.key(0), 1 + len(kernels))
  arrays = [jax.random.normal(key, s) for key, s in zip(keys, [shape, *kernels], strict=True)]
  arrays[0] = jnp.maximum(arrays[0], 0)  # as after a ReLU
  programs = []
  for fast in (False, True):
    layers._cpu = lambda fast=fast: fast
    programs.append(step(function).lower(*arrays).compile())
  seconds = ([], [])
  for _ in range(REPEATS):
    for program, found in zip(programs, seconds, strict=True):
      begin = time.perf_counter()
      jax.block_until_ready(program(*arrays))
      found.append(time.perf_counter() - begin)
  return [1e3 * statistics.median(found[3:]) for found in seconds]


def main() -> None:
  """Prints and writes the table."""
  parallel.keep_freed_memory()
  lines = []
  for name, (shape, _) in CASES.items():
    plain, fast = measure(name)
    lines.append([name, str(list(shape)), f'{plain:.1f}', f'{fast:.1f}', f'{plain / fast:.1f}'])
  head = (
    f'Measured by `python experiments/layer_speed.py`: jax {jax.__version__}, {os.cpu_count()} CPU cores, float32;\n'
    f'forward and backward of one layer, medians of {REPEATS - 3} by turns.\n\n'
  )
  text = head + table(['layer', 'map', "XLA's own, ms", 'ours, ms', 'ratio'], lines)
  publish(text, ROOT / 'experiments' / 'results' / 'layer_speed.md')


if __name__ == '__main__':
  main()
