"""What each CPU form of cpu_layers.py gives a whole training step, and what others gave that were not taken.

  python experiments/ablation.py
  python experiments/ablation.py --sizes=96 --variants='no patches,no 1x1 products'

Compiles the step of the article's network once for every variant, on one device, and times them by turns. Writes
experiments/results/ablation_cpu.md or ablation_gpu.md; with --variants, ablation_cpu_part.md. `layer_speed.py` times
layers alone; where both disagree the step decides. On a GPU the forms of a CPU are what was not taken.
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
from experiments.benchmark_tables import CPU_BATCHES, command, cores, cpu_model, number, publish, table
from googlenet_jax.host import huge_pages, sharding
from googlenet_jax.model import cpu_layers, layers

WARM_UP = 3  # steps of each variant
SHIPPED = 'as it is'
EIGEN = "YNN for products only, convolutions by Eigen (an option of XLA's)"


def _xla_pointwise(x, *kernels):
  return [cpu_layers.xla_conv(x, kernel[None, None]) for kernel in kernels]


def limits(side: int, *values: float) -> tuple[Any, str, Any]:
  """`PATCHES_UP_TO` with other values for one kernel."""
  return cpu_layers, 'PATCHES_UP_TO', cpu_layers.PATCHES_UP_TO | {side: values}


NO_PATCHES = (cpu_layers, 'PATCHES_UP_TO', {})
NO_PRODUCTS = (cpu_layers, 'pointwise', _xla_pointwise)
NO_MAX_POOL = (cpu_layers, 'max_pool', layers.xla_max_pool)
FORMS_OF_A_CPU = (layers, '_cpu', lambda: True)
ON_CPU = {  # what is put in whose place: (module, name, value)
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
  '3x3 forward by patches up to 4 pixels': [limits(3, 4, 3, 56)],
  '3x3 forward by patches up to 14 pixels': [limits(3, 14, 3, 56)],
  '3x3 kernel gradient by patches up to 14 pixels only': [limits(3, 8, 3, 14)],
  '5x5 forward by patches up to 14 pixels': [limits(5, 14, 4, 2)],
  EIGEN: [],
}
ELSEWHERE = {
  SHIPPED: [],
  'max-pool as on a CPU': [FORMS_OF_A_CPU, NO_PATCHES, NO_PRODUCTS],
  '1x1 convolutions of a map together, as on a CPU': [FORMS_OF_A_CPU, NO_PATCHES, NO_MAX_POOL],
}
OPTIONS = {EIGEN: {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_DOT'}}  # of the compiler


def compiled(config: Any, mesh: Any, name: str, changes: list[tuple[Any, str, Any]]) -> list[Any]:
  """The step of a variant and its state."""
  with contextlib.ExitStack() as stack:
    for module, attribute, value in changes:
      stack.enter_context(mock.patch.object(module, attribute, value))
    for cache in (cpu_layers._maxima, cpu_layers._maxima_and_index, cpu_layers._gather):
      cache.cache_clear()
      stack.callback(cache.cache_clear)
    step, state, _ = benchmark_jax.make_training(config, mesh, OPTIONS.get(name))
  return [step, state]


def milliseconds(config: Any, variants: dict[str, list], turns: int) -> dict[str, list[float]]:
  """Milliseconds of a step of every variant, by turn."""
  mesh = sharding.make_mesh(jax.devices()[:1])
  batch, programs, found = benchmark_jax.random_batch(config.batch_size, mesh), {}, {name: [] for name in variants}
  for name, changes in variants.items():
    programs[name] = compiled(config, mesh, name, changes)
    _, programs[name][1] = benchmark_jax.timed_steps(*programs[name], batch, WARM_UP)
  for turn in range(turns):
    for name in variants if turn % 2 == 0 else reversed(variants):
      (seconds,), programs[name][1] = benchmark_jax.timed_steps(*programs[name], batch, 1)
      found[name].append(1e3 * seconds)
  return found


def main() -> None:
  """Prints and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--sizes', type=lambda text: [int(n) for n in text.split(',')], default=list(CPU_BATCHES), help='pixels')
  add('--batch', type=int, help='on a CPU by default 256, 64, 16 by size; elsewhere 256')
  add('--dtype', choices=('float32', 'bfloat16'), default='float32')
  add('--variants', type=lambda text: text.split(','), help='; '.join([*ON_CPU, *ELSEWHERE]))
  add('--turns', type=int, default=8)
  add('--output', type=pathlib.Path, default=ROOT / 'experiments' / 'results')
  options = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', 1)
  on_cpu = jax.default_backend() == 'cpu'
  known = ON_CPU if on_cpu else ELSEWHERE
  if unknown := [name for name in options.variants or () if name not in known]:
    parser.error(f'no variant {unknown[0]!r}: choose from {"; ".join(known)}')
  if min(options.turns, options.batch or 1, *options.sizes) < 1:
    parser.error('--turns, --batch and --sizes must be at least 1')
  variants = {name: known[name] for name in dict.fromkeys([SHIPPED, *(options.variants or known)])}
  lines, columns = [[name] for name in variants], []
  for size in options.sizes:
    batch = options.batch or (CPU_BATCHES.get(size, 16) if on_cpu else 256)
    found = milliseconds(benchmark_jax.recipe(size, batch, options.dtype), variants, options.turns)
    for line, name in zip(lines, variants, strict=True):
      ratio = statistics.median(other / ours for other, ours in zip(found[name], found[SHIPPED], strict=True))
      line += [number(statistics.median(found[name])), f'{ratio:.2f}']
    columns += [f'{size} px, batch {batch}, ms', 'times as long']
    print(f'{size} px:', '; '.join(f'{line[0]} {line[-1]}' for line in lines), flush=True)
  where = f'{cores()} cores of\n{cpu_model()}' if on_cpu else jax.devices()[0].device_kind
  head = (
    f'Measured by `{command()}`: jax {jax.__version__}, {options.dtype}, one device, {where};\n'
    f'medians of {options.turns} steps by turns after {WARM_UP}, and of the ratios to the step as it is.\n\n'
  )
  part = '_part' if options.variants else ''
  publish(
    head + table(['training step', *columns], lines), options.output / f'ablation_{jax.default_backend()}{part}.md'
  )


if __name__ == '__main__':
  huge_pages.restart()  # as main.py
  main()
