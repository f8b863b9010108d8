"""What cpu_layers.py writes another way on a CPU, beside XLA's own: one layer, forward and backward.

  python experiments/layer_speed.py

Writes experiments/results/layer_speed.md: layers as they are, and every pass of a convolution in both forms, on which
`cpu_layers.PATCHES_UP_TO` rests. A layer alone says less than a step: what surrounds it is fused with it, or competes
with it for memory. `python experiments/benchmark.py` times whole steps.
"""

import argparse
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp

from experiments.benchmark_tables import command, cores, cpu_model, publish, table
from googlenet_jax.host import huge_pages
from googlenet_jax.model import cpu_layers, layers

REPEATS, WARM_UP = 15, 3


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
CONVOLUTIONS = [  # images, side of the map, channels in and out, side of the kernel
  *[
    (256, side, *features, 3) for side, features in ((8, (64, 192)), (4, (128, 192)), (2, (160, 320)), (1, (192, 384)))
  ],
  *[
    (64, side, *features, 3) for side, features in ((24, (64, 192)), (12, (128, 192)), (6, (160, 320)), (3, (192, 384)))
  ],
  *[
    (16, side, *features, 3)
    for side, features in ((56, (64, 192)), (28, (128, 192)), (14, (160, 320)), (7, (192, 384)))
  ],
  *[(256, side, *features, 5) for side, features in ((4, (32, 96)), (2, (32, 128)), (1, (48, 128)))],
  *[(64, side, *features, 5) for side, features in ((12, (32, 96)), (6, (32, 128)), (3, (48, 128)))],
  *[(16, side, *features, 5) for side, features in ((28, (32, 96)), (14, (32, 128)), (7, (48, 128)))],
]


def step(function):
  """Jitted `(arrays) -> (value, gradients)`; the gradient that comes in is the value, so that nothing is constant."""

  def both(*arrays):
    value, pullback = jax.vjp(lambda *arrays: function(*arrays), *arrays)
    return value, pullback(value)

  return jax.jit(both)


def by_turns(programs, arrays):
  """Median milliseconds of each."""
  seconds = [[] for _ in programs]
  for _ in range(REPEATS):
    for program, found in zip(programs, seconds, strict=True):
      begin = time.perf_counter()
      jax.block_until_ready(program(*arrays))
      found.append(time.perf_counter() - begin)
  return [1e3 * statistics.median(found[WARM_UP:]) for found in seconds]


def layer(name):
  """Milliseconds of a layer: XLA's own, ours."""
  shape, (function, kernels) = CASES[name]
  keys = jax.random.split(jax.random.key(0), 1 + len(kernels))
  arrays = [jax.random.normal(key, s) for key, s in zip(keys, [shape, *kernels], strict=True)]
  arrays[0] = jnp.maximum(arrays[0], 0)  # as after a ReLU
  programs, chosen = [], layers._cpu
  for fast in (False, True):
    layers._cpu = lambda fast=fast: fast
    programs.append(step(function).lower(*arrays).compile())
  layers._cpu = chosen
  return by_turns(programs, arrays)


def convolution(images, side, in_features, out_features, k):
  """Milliseconds of every pass of a convolution: XLA's own, patches."""
  shapes = [(images, side, side, in_features), (k, k, in_features, out_features), (images, side, side, out_features)]
  arrays = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
  limits, found = dict(cpu_layers.PATCHES_UP_TO), []
  passes = {
    'forward': lambda x, kernel, _: layers.conv(x, kernel),
    'input': lambda x, kernel, gradient: jax.vjp(layers.conv, x, kernel)[1](gradient)[0],
    'kernel': lambda x, kernel, gradient: jax.vjp(layers.conv, x, kernel)[1](gradient)[1],
  }
  for function in passes.values():
    programs = []
    for limit in (0, side):
      cpu_layers.PATCHES_UP_TO[k] = (limit,) * 3
      programs.append(jax.jit(lambda *arrays, function=function: function(*arrays)).lower(*arrays).compile())
    found += by_turns(programs, arrays)
  cpu_layers.PATCHES_UP_TO.update(limits)
  return found


def main() -> None:
  """Prints and writes the tables."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'experiments' / 'results', help='folder')
  options = parser.parse_args()
  lines = []
  for name, (shape, _) in CASES.items():
    plain, fast = layer(name)
    lines.append([name, str(list(shape)), f'{plain:.1f}', f'{fast:.1f}', f'{plain / fast:.1f}'])
  head = (
    f'Measured by `{command()}`: jax {jax.__version__}, float32, {cores()} cores of\n'
    f'{cpu_model()};\n'
    f'medians of {REPEATS - WARM_UP} by turns. Layers, forward and backward:\n\n'
  )
  text = head + table(['layer', 'map', "XLA's own, ms", 'ours, ms', 'ratio'], lines)
  lines = []
  for case in CONVOLUTIONS:
    images, side, in_features, out_features, k = case
    milliseconds = [f'{value:.2f}' for value in convolution(*case)]
    lines.append([f'{k}x{k}, {in_features} to {out_features}', str(side), str(images), *milliseconds])
  passes = [f'{name}, {form}' for name in ('forward', 'input', 'kernel') for form in ("XLA's", 'patches')]
  text += '\nPasses of a convolution (forward, gradients of the input and of the kernel) in both forms, ms:\n\n'
  text += table(['convolution', 'pixels', 'images', *passes], lines)
  publish(text, options.output / 'layer_speed.md')


if __name__ == '__main__':
  huge_pages.restart()  # as main.py
  main()
