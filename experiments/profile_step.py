"""Where a training step spends its time on a CPU: ours by kind of instruction, PyTorch's by operator.

  python -m experiments.profile_step
  python -m experiments.profile_step --sizes=224 --batch=16

Everything runs on one core, because instructions that run at the same time slow each other down. Writes
experiments/results/profile_cpu.md; with --sizes, the sizes are part of the name. For a GPU: `experiments.gpu`.
"""

import argparse
import math
import os
import pathlib
import time
from typing import Any

from experiments import contest, tables
from experiments.contest import JAX, TORCH
from experiments.tables import number, table
from experiments.worker import Worker, WorkerError
from googlenet_jax.host import huge_pages

WARM_UP = 6  # steps


def measure(
  module: str,
  environment: dict[str, str],
  case: tables.Case,
  steps: int,
  device: str = 'cpu',
  end: float = math.inf,
  **arguments,
) -> dict[str, Any]:
  """Profiles a step in a process of its own.

  Args:
    module: `JAX` or `TORCH`.
    environment: added to the environment.
    case: what to profile.
    steps: number of steps.
    device: 'cpu' or 'gpu'.
    end: when its time ends, by `time.monotonic`.
    **arguments: for `make`.

  Returns:
    What `profile` of the side returns, and `versions`.

  Raises:
    WorkerError: the framework is missing or fails, or takes too long.
  """
  with Worker(module, device, environment=environment) as worker:
    left = lambda: None if math.isinf(end) else max(0.1, end - time.monotonic())
    worker.ask('make', left(), **case._asdict(), **arguments)
    found = worker.ask('profile', left(), steps=steps, before=WARM_UP)
    return {**found, 'versions': worker.ask('describe')['versions']}


def shares(found: dict[str, Any]) -> str:
  """A table of milliseconds and shares of the step; everything below 0.5 % is one line."""
  kinds, wall = found['kinds'], found['wall']
  large = {name: value for name, value in kinds.items() if value >= wall / 200}
  large['each below 0.5 %'] = sum(kinds.values()) - sum(large.values())
  large['between instructions, and what the profiler changes'] = wall - sum(kinds.values())
  return table(['kind', 'ms a step', 'share'], [[n, number(v), f'{v / wall:.1%}'] for n, v in large.items()])


def jax_section(found: dict[str, Any]) -> str:
  """Our step by kind, and the slowest instructions."""
  lines = [[f'`{n}`', number(v), f'`{s}`', k, o.replace('|', '/')] for n, v, k, o, s in found['dearest']]
  parts = [shares(found), table(['slowest instructions', 'ms', 'result', 'kind', 'origin'], lines)]
  return '\n'.join([f'Ours: {number(found["wall"])} ms and {found["launches"]:.0f} instructions a step.\n', *parts])


def torch_section(found: dict[str, Any], name: str = 'PyTorch eager, channels_last') -> str:
  """PyTorch's step by operator."""
  lines = [[f'`{n[:80]}`', number(v), f'{v / found["wall"]:.1%}', f'{c:.0f}'] for n, v, c in found['dearest']]
  head = f'{name}: {number(found["wall"])} ms and {found["launches"]:.0f} calls a step.\n'
  return '\n'.join([head, table(['operator', 'ms a step, its own', 'share', 'calls'], lines)])


def parse_arguments() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--sizes', type=lambda text: [int(n) for n in text.split(',')], help='pixels; default 32,96,224')
  add('--batch', type=int, help='default: 256, 64, 16 for sizes 32, 96, 224')
  add('--dtype', choices=('float32', 'bfloat16'), default='float32')
  add('--config', default='configs/default.py', help='recipe for ours; PyTorch has the default one only')
  add('--steps', type=int, default=5)
  add('--output', type=pathlib.Path, default=tables.RESULTS, help='folder of the results')
  return parser.parse_args()


def main() -> None:
  """Profiles both at every size; without PyTorch, ours alone."""
  options = parse_arguments()
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the processes started below inherit it
  versions, sections = {}, []
  for size in options.sizes or tables.CPU_BATCHES:
    case = tables.Case('training', size, options.batch or tables.CPU_BATCHES.get(size, 16), options.dtype)
    ours = measure(JAX, huge_pages.environment(), case, options.steps, config=options.config)
    sections += [f'## {size} pixels, batch {case.batch_size}\n', jax_section(ours)]
    versions |= ours['versions']
    try:
      theirs = measure(TORCH, {}, case, options.steps)
      versions |= theirs['versions']
      sections.append(torch_section(theirs))
    except WorkerError as error:
      sections.append(f'PyTorch cannot be profiled here: {error}\n')
  head = [
    tables.written_by(**versions),
    f'One core of {contest.describe("cpu")["device"]}, {options.dtype}, {options.config}.',
    f'Means of {options.steps} steps after {WARM_UP}. Shares are of the step without a profiler. On several cores a',
    'step is faster, and what is not spread over them has a larger share. A fusion counts as its last operation.\n',
  ]
  name = '_'.join(['profile_cpu', *map(str, options.sizes or [])])
  tables.publish('\n'.join([*head, *sections]), options.output / f'{name}.md')


if __name__ == '__main__':
  main()
