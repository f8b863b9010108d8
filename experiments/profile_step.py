"""Where a training step spends its time: ours by kind of instruction, PyTorch's by operator.

  python -m experiments.profile_step
  python -m experiments.profile_step --sizes=224 --batch=256 --dtype=bfloat16 --device=gpu

On a CPU everything runs on one core, because instructions that run at the same time slow each other down. Writes
experiments/results/profile_cpu.md or profile_gpu.md; with --sizes, the sizes are part of the name.
"""

import argparse
import collections
import math
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
from typing import Any, NamedTuple
from unittest import mock

from experiments import benchmark, tables, worker
from experiments.tables import number, table
from googlenet_jax.host import huge_pages

WARM_UP = 6  # steps
DEAREST = 20
INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+?)(?:{\S*})? (?P<op>[\w\-]+)\(')
COMPUTATION = re.compile(r'^(?:ENTRY )?%(?P<name>[\w.\-]+) \(.*{$')
STACK_TABLES = ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames')
CUDNN = {'convBackwardFilter': 'kernel gradient', 'convBackwardInput': 'input gradient'}


class Instruction(NamedTuple):
  """One instruction of a compiled program."""

  shape: str
  op: str
  op_name: str  # JAX's name, such as jit(step)/transpose(jvp())/max
  functions: tuple[str, ...]  # this package's functions on the Python stack, innermost first, as 'module.function'
  text: str  # the line and, if it calls another computation, the lines of that one

  @property
  def direction(self) -> str:
    """'backward' or 'forward'."""
    return 'backward' if 'transpose(' in self.op_name else 'forward'


OTHER = Instruction('', '', '', (), '')  # a kernel that is not part of any instruction


def parse(text: str, package: str = 'googlenet_jax') -> dict[str, Instruction]:
  """Reads `compiled.as_text()`: the instructions of the entry computation, by name."""
  stacks, bodies, entry = _sections(text)
  frames = _stacks(stacks, package)
  found = {}
  for line in bodies[entry]:
    match = INSTRUCTION.match(line)
    called = re.search(r'(?:calls|to_apply)=%([\w.\-]+)', line)
    body = '\n'.join([line, *bodies.get(called[1], ())]) if called else line
    # Some instructions that XLA makes carry no metadata, but what they contain may.
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', line) or re.search(r'op_name="(jit(?:[^"\\]|\\.)*)"', body)
    frame = re.search(r'stack_frame_id=(\d+)', line) or re.search(r'stack_frame_id=(\d+)', body)
    functions = frames.get(int(frame[1]), ()) if frame else ()
    found[match['name']] = Instruction(match['shape'], match['op'], op_name[1] if op_name else '', functions, body)
  return found


def _sections(text: str) -> tuple[dict[str, list[str]], dict[str, list[str]], str]:
  """The tables of stack frames, the lines of every computation by name, and the name of the entry computation."""
  stacks, bodies, entry, lines = {}, {}, '', []
  for line in text.splitlines():
    if line in STACK_TABLES:
      lines = stacks[line] = []
    elif match := COMPUTATION.match(line):
      lines = bodies[match['name']] = []
      entry = match['name'] if line.startswith('ENTRY') else entry
    elif INSTRUCTION.match(line) or re.match(r'\d+ ', line):
      lines.append(line)
  return stacks, bodies, entry


def _stacks(sections: dict[str, list[str]], package: str) -> dict[int, tuple[str, ...]]:
  """The package's functions on the stack, by number of the stack frame."""

  def rows(name: str) -> dict[int, str]:
    return {int(number): rest for number, rest in (line.split(' ', 1) for line in sections.get(name, ()))}

  def field(row: str, key: str) -> int:
    return int(re.search(rf'{key}=(\d+)', row)[1])

  files, functions, places = rows('FileNames'), rows('FunctionNames'), {}
  for number_, row in rows('FileLocations').items():
    path, function = files[field(row, 'file_name_id')].strip('"'), functions[field(row, 'function_name_id')].strip('"')
    module = path.rpartition('/')[2].removesuffix('.py')
    places[number_] = f'{module}.{re.sub(r"[.]<.*?>", "", function)}' if f'/{package}/' in path else None
  frames, stacks = rows('StackFrames'), {}
  for number_ in frames:
    stack, at = [], number_
    while at in frames:
      stack.append(places[field(frames[at], 'file_location_id')])
      at = field(frames[at], 'parent_frame_id') - 1  # 1 stands for no parent
    stacks[number_] = tuple(filter(None, stack))
  return stacks


def kind(instruction: Instruction, kernel_sizes: set[int]) -> str:
  """The row of the profile to which an instruction belongs.

  Args:
    instruction: one of the entry computation.
    kernel_sizes: numbers of values in the network's convolution kernels; they identify the gradients of kernels.
  """
  inner = instruction.functions[0] if instruction.functions else ''
  text, direction = instruction.text, instruction.direction
  product = ' dot(' in text or '__cublas' in text or '__triton_gemm' in text
  if inner.startswith(('augment.', 'resample.')):
    return 'image preparation'
  if inner.startswith('layers.Linear'):
    return 'linear layer'
  if product or ' convolution(' in text or '__cudnn$conv' in text:
    what = '1x1 product' if any('pointwise' in f for f in instruction.functions) else 'convolution, larger kernel'
    if cudnn := next((name for call, name in CUDNN.items() if call in text), None):
      return f'{what}: {cudnn}'
    values = math.prod(int(n) for n in re.findall(r'\d+', instruction.shape.partition('[')[2]))
    # cpu_layers.py writes the products for kernel gradients as sums that end in ->io. XLA sometimes drops the origin of
    # a convolution's gradients.
    if '->io' in instruction.op_name if product else values in kernel_sizes:
      return f'{what}: kernel gradient'
    return f'{what}: {"input gradient" if direction == "backward" else "forward"}'
  if any('max_pool' in function for function in instruction.functions):
    return f'max-pool: {direction}'
  if 'jvp(' not in instruction.op_name and instruction.op_name.startswith('jit('):
    return 'optimizer and metrics'
  if instruction.op == 'bitcast-convert' or re.match(r'\s*(ROOT )?%(copy|transpose)', text):
    return 'copies and transpositions'
  if instruction.op in ('fusion', 'concatenate', 'pad', 'slice', 'reduce', 'call'):
    return f'elementwise, patches, concatenation, sums: {direction}'
  return 'other'


def profile_jax(options: argparse.Namespace, image_size: int, batch_size: int) -> dict[str, Any]:
  """Profiles our step.

  Returns:
    `wall` (ms a step without the profiler) and `rows` of (name, ms a step, kind, origin, shape).
  """
  import jax
  from jax.profiler import ProfileData

  from experiments.jax_side import JaxSide

  side = JaxSide(options.device)
  side.make('training', image_size, batch_size, options.dtype, options.config)
  wall = 1e3 * side.run(options.steps, before=WARM_UP)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      side.run(options.steps, before=0)
    (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
    profile = ProfileData.from_file(str(path))
  instructions = parse(side.compiled.as_text())
  milliseconds = collections.Counter()
  for name, nanoseconds in events(profile, instructions):
    milliseconds[name] += nanoseconds / 1e6 / options.steps
  kernel_sizes = {p.size for p in jax.tree.leaves(side.state.params) if p.ndim == 4}
  rows = []
  for name, value in milliseconds.items():
    at = instructions.get(name, OTHER)
    origin = f'{at.functions[0]}, {at.direction}' if at.functions else at.op_name
    rows.append((name, value, kind(at, kernel_sizes), origin, at.shape[:40]))
  return {'wall': wall, 'rows': rows}


def events(profile: Any, instructions: dict[str, Instruction]):
  """Yields (name of the instruction, nanoseconds); a GPU kernel without an instruction has its own name."""
  on_gpu = [plane for plane in profile.planes if plane.name.startswith('/device:GPU')]
  for plane in on_gpu or profile.planes:
    for line in plane.lines:
      if on_gpu and not line.name.startswith('Stream'):
        continue  # a summary of the streams
      for event in line.events:
        name = dict(event.stats).get('hlo_op', event.name) if on_gpu else event.name
        if on_gpu or name in instructions:
          yield name, event.duration_ns


def profile_torch(options: argparse.Namespace, image_size: int, batch_size: int) -> dict[str, Any]:
  """Profiles PyTorch's eager step; `rows` of (operator or kernel, ms a step, calls a step)."""
  import torch

  from experiments.torch_side import TorchSide

  side = TorchSide(options.device)
  side.make('training', image_size, batch_size, options.dtype)
  wall = 1e3 * side.run(options.steps, before=WARM_UP)
  kinds = torch.profiler.ProfilerActivity
  activity, own = (kinds.CPU, 'self_cpu_time_total')
  if side.device == 'cuda':
    activity, own = kinds.CUDA, 'self_device_time_total'
  with torch.profiler.profile(activities=[activity]) as profile:
    side.run(options.steps, before=0)
  rows = [(e.key, getattr(e, own) / 1e3 / options.steps, e.count / options.steps) for e in profile.key_averages()]
  return {'version': torch.__version__, 'wall': wall, 'rows': rows}


def in_a_process(function, environment: dict[str, str], *arguments) -> dict[str, Any]:
  """Calls a function in a new process, so each framework has its threads and its memory to itself."""
  with mock.patch.dict(os.environ, environment), multiprocessing.get_context('spawn').Pool(1) as pool:
    return pool.apply(function, arguments)


def shares(totals: collections.Counter, wall: float) -> str:
  """A table of milliseconds and shares of the step; everything below 0.5 % is one line."""
  large = {name: value for name, value in totals.most_common() if value >= wall / 200}
  large['each below 0.5 %'] = sum(totals.values()) - sum(large.values())
  large['between instructions, and what the profiler changes'] = wall - sum(totals.values())
  return table(['kind', 'ms a step', 'share'], [[n, number(v), f'{v / wall:.1%}'] for n, v in large.items()])


def jax_section(found: dict[str, Any]) -> str:
  """Our step by kind, and the slowest instructions."""
  kinds = collections.Counter()
  for _, value, kind_, *_ in found['rows']:
    kinds[kind_] += value
  slowest = sorted(found['rows'], key=lambda row: -row[1])[:DEAREST]
  lines = [[f'`{n}`', number(v), f'`{shape}`', k, o.replace('|', '/')] for n, v, k, o, shape in slowest]
  parts = [shares(kinds, found['wall']), table(['slowest instructions', 'ms', 'result', 'kind', 'origin'], lines)]
  return '\n'.join([f'Ours: {number(found["wall"])} ms a step.\n', *parts])


def torch_section(found: dict[str, Any]) -> str:
  """PyTorch's step by operator."""
  slowest = sorted(found['rows'], key=lambda row: -row[1])[:DEAREST]
  lines = [[f'`{n[:80]}`', number(v), f'{v / found["wall"]:.1%}', f'{c:.0f}'] for n, v, c in slowest]
  head = f'PyTorch eager, channels_last: {number(found["wall"])} ms a step.\n'
  return '\n'.join([head, table(['operator', 'ms a step, its own', 'share', 'calls'], lines)])


def parse_arguments() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--device', choices=('auto', 'cpu', 'gpu'), default='auto')
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
  try:
    machine = benchmark.describe(options.device)
  except worker.WorkerError as error:
    sys.exit(f'error: {error}')
  options.device = machine['platform']
  if options.device == 'cpu' and hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the processes started below inherit it
  versions, sections = machine['versions'], []
  for size in options.sizes or tables.CPU_BATCHES:
    batch = options.batch or tables.CPU_BATCHES.get(size, 16)
    environment = huge_pages.environment() | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
    ours = in_a_process(profile_jax, environment, options, size, batch)
    sections += [f'## {size} pixels, batch {batch}\n', jax_section(ours)]
    try:
      theirs = in_a_process(profile_torch, {}, options, size, batch)
      versions['torch'] = theirs['version']
      sections.append(torch_section(theirs))
    except (ImportError, RuntimeError) as error:
      sections.append(f'PyTorch cannot be profiled here: {error}\n')
  where = 'one core of ' * (options.device == 'cpu') + machine['device']
  head = [
    tables.written_by(**versions),
    f'{where}, {options.dtype}, {options.config}.',
    f'Means of {options.steps} steps after {WARM_UP}. Shares are of the step without a profiler. On several cores a',
    'step is faster, and what is not spread over them has a larger share. A fusion counts as its last operation.\n',
  ]
  name = '_'.join([f'profile_{options.device}', *map(str, options.sizes or [])])
  tables.publish('\n'.join([*head, *sections]), options.output / f'{name}.md')


if __name__ == '__main__':
  main()
