"""What each CPU form of cpu_layers.py gives a whole training step, and what others gave that were not taken.

  python experiments/ablation.py
  python experiments/ablation.py --sizes=96 --variants='as it is,no patches'

Compiles the step of the article's network once for every variant, on one device, and times them by turns. Writes
experiments/results/ablation.md. `layer_speed.py` times layers alone; where both disagree the step decides.
"""

import argparse
import contextlib
import math
import pathlib
import statistics
import sys
from typing import Any
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
from jax import lax

from experiments import benchmark_jax
from experiments.benchmark_tables import CPU_BATCHES, cores, cpu_model, number, publish, table
from googlenet_jax import cpu_layers, huge_pages, layers, parallel

WARM_UP = 3  # steps of each variant
SHIPPED = 'as it is'


def _xla_max_pool(x, stride):
  padding, sides, strides = ((0, 0), (1, 1), (1, 1), (0, 0)), (1, 3, 3, 1), (1, stride, stride, 1)
  return lax.reduce_window(x, -float('inf'), lax.max, sides, strides, padding)


def _xla_pointwise(x, *kernels):
  return [cpu_layers.xla_conv(x, kernel[None, None]) for kernel in kernels]


def limits(side: int, *values: float) -> tuple[Any, str, Any]:
  """`PATCHES_UP_TO` with other values for one kernel."""
  return cpu_layers, 'PATCHES_UP_TO', cpu_layers.PATCHES_UP_TO | {side: values}


NO_PATCHES = (cpu_layers, 'PATCHES_UP_TO', {})
NO_PRODUCTS = (cpu_layers, 'pointwise', _xla_pointwise)
NO_MAX_POOL = (cpu_layers, 'max_pool', _xla_max_pool)
VARIANTS = {  # what is put in whose place: (module, name, value)
  SHIPPED: [],
  "XLA's own everywhere": [(layers, '_cpu', lambda: False)],
  'no patches': [NO_PATCHES],
  'no 1x1 products': [NO_PRODUCTS],
  "XLA's max-pool": [NO_MAX_POOL],
  'max-pool and transposition fused': [
    (cpu_layers, 'unfused', lambda function: function),
    (cpu_layers, '_transpose', lambda rows: lax.transpose(rows, (1, 0))),
  ],
  'every pass of 3x3 and 5x5 by patches': [
    (cpu_layers, 'PATCHES_UP_TO', {k: (math.inf,) * 3 for k in cpu_layers.PATCHES_UP_TO})
  ],
  '3x3 forward by patches up to 4 pixels': [limits(3, 4, 3, math.inf)],
  '3x3 forward by patches up to 14 pixels': [limits(3, 14, 3, math.inf)],
  '3x3 kernel gradient by patches up to 14 pixels only': [limits(3, 8, 3, 14)],
  '5x5 forward by patches up to 14 pixels': [limits(5, 14, 4, 2)],
}


def compiled(config: Any, mesh: Any, variant: str) -> list[Any]:
  """The step of a variant and its state."""
  made_before = (cpu_layers._maxima, cpu_layers._maxima_and_index, cpu_layers._gather)
  with contextlib.ExitStack() as stack:
    for module, name, value in VARIANTS[variant]:
      stack.enter_context(mock.patch.object(module, name, value))
    for cache in made_before:
      cache.cache_clear()
      stack.callback(cache.cache_clear)
    step, state, _ = benchmark_jax.make_training(config, mesh)
  return [step, state]


def milliseconds(image_size: int, batch_size: int, variants: list[str], turns: int) -> dict[str, list[float]]:
  """Milliseconds of a step of every variant, by turn."""
  mesh = parallel.make_mesh(jax.devices()[:1])
  config, batch = benchmark_jax.recipe(image_size, batch_size), benchmark_jax.random_batch(batch_size, mesh)
  programs, found = {}, {name: [] for name in variants}
  for name in variants:
    programs[name] = compiled(config, mesh, name)
    _, programs[name][1] = benchmark_jax.timed_steps(*programs[name], batch, WARM_UP)
  for turn in range(turns):
    for name in variants if turn % 2 == 0 else reversed(variants):
      (seconds,), programs[name][1] = benchmark_jax.timed_steps(*programs[name], batch, 1)
      found[name].append(1e3 * seconds)
  return found


def main() -> None:
  """Prints and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--sizes', type=lambda text: [int(n) for n in text.split(',')], default=list(CPU_BATCHES))
  parser.add_argument('--variants', type=lambda text: text.split(','), default=list(VARIANTS), help='; '.join(VARIANTS))
  parser.add_argument('--turns', type=int, default=8)
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'experiments' / 'results')
  options = parser.parse_args()
  if unknown := [name for name in options.variants if name not in VARIANTS]:
    parser.error(f'no variant {unknown[0]!r}: choose from {"; ".join(VARIANTS)}')
  if unknown := [size for size in options.sizes if size not in CPU_BATCHES]:
    parser.error(f'no size {unknown[0]}: choose from {", ".join(map(str, CPU_BATCHES))}')
  variants = list(dict.fromkeys([SHIPPED, *options.variants]))
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 1)
  lines = [[name] for name in variants]
  for size in options.sizes:
    found = milliseconds(size, CPU_BATCHES[size], variants, options.turns)
    for line, name in zip(lines, variants, strict=True):
      ratio = statistics.median(other / ours for other, ours in zip(found[name], found[SHIPPED], strict=True))
      line += [number(statistics.median(found[name])), f'{ratio:.2f}']
    print(f'{size} px:', '; '.join(f'{line[0]} {line[-1]}' for line in lines), flush=True)
  head = (
    f'Measured by `python experiments/ablation.py`: jax {jax.__version__}, float32, one device, {cores()} cores of\n'
    f'{cpu_model()};\n'
    f'medians of {options.turns} steps by turns after {WARM_UP}, and of the ratios to the step as it is.\n\n'
  )
  columns = [c for size in options.sizes for c in (f'{size} px, batch {CPU_BATCHES[size]}, ms', 'times as long')]
  publish(head + table(['training step', *columns], lines), options.output / 'ablation.md')


if __name__ == '__main__':
  huge_pages.restart()  # as main.py
  main()
