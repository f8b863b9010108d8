"""Where a training step spends its time on a CPU: ours by instruction, PyTorch's by operator.

  python experiments/profile_steps.py
  python experiments/profile_steps.py --sizes=96

Two instructions that run at once make each other's times longer, so that everything here runs on one core. Writes
experiments/results/profile_cpu.md; with --sizes, profile_cpu_SIZES.md, which leaves the whole one alone.
"""

import argparse
import collections
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.benchmark_tables import CPU_BATCHES, cpu_model, number, table
from googlenet_jax.host import huge_pages

WARM_UP = 6  # steps
DEAREST = 10


def profile_jax(image_size: int, batch_size: int, steps: int) -> dict[str, Any]:
  """Milliseconds a step of every instruction of our step, with its kind and source.

  Returns:
    `version`, `wall` (ms a step without the profiler) and `rows` of (name, ms, kind, source, shape, op_name).
  """
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax
  from flax import nnx
  from jax.profiler import ProfileData

  from experiments import benchmark_jax, hlo
  from googlenet_jax.host import sharding

  config = benchmark_jax.recipe(image_size, batch_size)
  mesh = sharding.make_mesh()
  step, state, network = benchmark_jax.make_training(config, mesh)
  batch = benchmark_jax.random_batch(batch_size, mesh)
  _, state = benchmark_jax.timed_steps(step, state, batch, WARM_UP)
  seconds, state = benchmark_jax.timed_steps(step, state, batch, steps)
  wall = 1e3 * statistics.mean(seconds)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      benchmark_jax.timed_steps(step, state, batch, steps)
    (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
    profile = ProfileData.from_file(str(path))
  instructions = hlo.parse(step.as_text())
  milliseconds = collections.Counter()
  for plane in profile.planes:
    for line in plane.lines:
      for event in line.events:
        if event.name in instructions:
          milliseconds[event.name] += event.duration_ns / 1e6 / steps
  params = jax.tree.leaves(nnx.to_pure_dict(nnx.state(network, nnx.Param)))
  kernel_sizes = {p.size for p in params if p.ndim == 4}
  rows = []
  for name, value in milliseconds.items():
    at = instructions[name]
    source = f'{at.functions[0]}, {"backward" if at.backward else "forward"}' if at.functions else '(none noted)'
    rows.append((name, value, hlo.kind(at, kernel_sizes), source, at.shape, at.op_name))
  return {'version': f'jax {jax.__version__}', 'wall': wall, 'rows': rows}


def profile_torch(image_size: int, batch_size: int, steps: int) -> dict[str, Any]:
  """Milliseconds a step and calls a step of every operator of PyTorch's eager step; `wall` as above."""
  import torch

  from experiments import benchmark_torch

  torch.set_num_threads(1)
  case = benchmark_torch.Case('training', image_size, batch_size, 'float32', compiled=False, device='cpu')
  case.run(WARM_UP)
  wall = case.run(steps) * 1e3
  with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    case.run(steps)
  rows = [(e.key, e.self_cpu_time_total / 1e3 / steps, e.count / steps) for e in profile.key_averages()]
  return {'version': f'torch {torch.__version__}', 'wall': wall, 'rows': rows}


def in_a_process(function, environment: dict[str, str], *arguments) -> dict[str, Any]:
  """Calls a function in a fresh process: each framework then has its threads and its memory to itself."""
  with mock.patch.dict(os.environ, environment), multiprocessing.get_context('spawn').Pool(1) as pool:
    return pool.apply(function, arguments)


def shares(title: str, totals: collections.Counter, wall: float) -> str:
  """A table of milliseconds and shares of the step; what is below 0.5 % goes into one line."""
  lines, small = [], 0.0
  for name, value in totals.most_common():
    if value < wall / 200:
      small += value
    else:
      lines.append([name, number(value), f'{value / wall:.1%}'])
  lines.append(['each below 0.5 %', number(small), f'{small / wall:.1%}'])
  rest = wall - sum(totals.values())
  lines.append(['between instructions, and what the profiler itself changes', number(rest), f'{rest / wall:.1%}'])
  return table([title, 'ms a step', 'share'], lines)


def jax_section(found: dict[str, Any]) -> str:
  """Our step: by kind, by source, and the dearest instructions."""
  kinds, sources = collections.Counter(), collections.Counter()
  for _, value, kind, source, _, _ in found['rows']:
    kinds[kind] += value
    sources[source] += value
  dearest = sorted(found['rows'], key=lambda row: -row[1])[:DEAREST]
  lines = [
    [f'`{name}`', number(value), f'`{shape}`', kind, f'`{op_name.replace("|", "/")}`']
    for name, value, kind, _, shape, op_name in dearest
  ]
  return '\n'.join(
    [
      f'Ours: {number(found["wall"])} ms a step.\n',
      shares('by kind', kinds, found['wall']),
      shares('by source', sources, found['wall']),
      table(['dearest instructions', 'ms', 'result', 'kind', 'op_name'], lines),
    ]
  )


def torch_section(found: dict[str, Any]) -> str:
  """PyTorch's step by operator."""
  totals = collections.Counter({f'`{name}`': value for name, value, _ in found['rows']})
  calls = {f'`{name}`': count for name, _, count in found['rows']}
  lines = [
    [name, number(value), f'{value / found["wall"]:.1%}', number(calls[name], '.0f')]
    for name, value in totals.most_common(15)
  ]
  head = f'PyTorch eager as it comes, channels_last: {number(found["wall"])} ms a step.\n'
  return '\n'.join([head, table(['operator', 'ms a step, its own', 'share', 'calls'], lines)])


def main() -> None:
  """Profiles both at every size; without PyTorch, ours alone."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--sizes', type=lambda text: [int(n) for n in text.split(',')], help='pixels; default 32,96,224')
  parser.add_argument('--batch', type=int, help='by default 256, 64, 16 by size')
  parser.add_argument('--steps', type=int, default=5)
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'experiments' / 'results')
  options = parser.parse_args()
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the processes started below inherit it
  versions, sections = {}, []
  for size in options.sizes or CPU_BATCHES:
    batch = options.batch or CPU_BATCHES.get(size, 16)
    sections.append(f'## {size} pixels, batch {batch}\n')
    for function, section, environment in (
      (profile_jax, jax_section, huge_pages.environment()),  # as main.py
      (profile_torch, torch_section, {}),
    ):
      try:
        found = in_a_process(function, environment, size, batch, options.steps)
      except ImportError as error:
        if function is profile_jax:
          raise
        sections.append(f'PyTorch is missing here: {error}\n')
        continue
      versions[function] = found['version']
      sections.append(section(found))
      print(sections[-2] if function is profile_jax else '', sections[-1], sep='\n', flush=True)
  head = [
    f'Measured by `python experiments/profile_steps.py` on one core of {cpu_model()};',
    f'{", ".join(versions.values())}; float32, means of {options.steps} steps after {WARM_UP}. Shares are of the step',
    'without a profiler. On several cores the step is',
    "faster, and what XLA or PyTorch does not spread over them has a larger share. A fusion's kind and source are",
    'those of its last operation.\n',
  ]
  name = '_'.join(['profile_cpu', *map(str, options.sizes or [])])
  options.output.mkdir(parents=True, exist_ok=True)
  (options.output / f'{name}.md').write_text('\n'.join([*head, *sections]).rstrip() + '\n')


if __name__ == '__main__':
  main()
