"""Reads compiled programs of XLA and traces of the profiler: how long each instruction took, and what it belongs to."""

import collections
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

DEAREST = 20
INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+?)(?:{\S*})? (?P<op>[\w\-]+)\(')
COMPUTATION = re.compile(r'^(?:ENTRY )?%(?P<name>[\w.\-]+) \(.*{$')
LOOP = re.compile(r'(?:(?:body|condition)=%|to_apply=%(?=command_buffer))([\w.\-]+)')  # or a CUDA graph
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
  """Reads `compiled.as_text()`: the instructions of the entry computation and of its loops, by name."""
  stacks, bodies, entry = _sections(text)
  frames = _stacks(stacks, package)
  found, lines = {}, list(bodies[entry])
  for line in lines:  # which grows
    match = INSTRUCTION.match(line)
    if inside := LOOP.findall(line):  # its time is that of the instructions inside
      lines += itertools.chain(*(bodies.get(name, ()) for name in inside))
      continue
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
  if inner.startswith(('augment.', 'resample.', 'colour.', 'mixing.', 'random_keys.')):
    return 'image preparation'
  if inner.startswith('layers.Linear'):
    return 'linear layer'
  if product or ' convolution(' in text or '__cudnn$conv' in text:
    one = any('pointwise' in f or 'read_one_map' in f for f in instruction.functions) or 'window={size=1x1}' in text
    what = '1x1 product' if one else 'convolution, larger kernel'
    if cudnn := next((name for call, name in CUDNN.items() if call in text), None):
      return f'{what}: {cudnn}'
    values = math.prod(int(n) for n in re.findall(r'\d+', instruction.shape.partition('[')[2]))
    # cpu_layers.py writes the products for kernel gradients as sums that end in ->io, winograd.py in ->pco. XLA
    # sometimes drops the origin of a convolution's gradients.
    if re.search(r'bhwo->io|po->io|->pco', instruction.op_name) if product else values in kernel_sizes:
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


def events(profile: Any, instructions: dict[str, Instruction]) -> Iterator[tuple[str, float]]:
  """Reads a trace.

  On a GPU, every stream is a line of events, one for each kernel, and `hlo_op` names the instruction. Other lines only
  sum the streams up. CUDA graphs are off while JAX profiles, so each kernel is seen.

  Args:
    profile: `jax.profiler.ProfileData`.
    instructions: the program's, see `parse`.

  Yields:
    Name of the instruction, and nanoseconds. A kernel of a GPU that has no instruction has its own name.
  """
  on_gpu = [plane for plane in profile.planes if plane.name.startswith('/device:GPU')]
  for plane in on_gpu or profile.planes:
    lines = list(plane.lines)
    for line in [line for line in lines if on_gpu and line.name.startswith('Stream')] or lines:
      for event in line.events:
        name = dict(event.stats).get('hlo_op', event.name) if on_gpu else event.name
        if on_gpu or name in instructions:
          yield name, event.duration_ns


def profile(data: Any, text: str, steps: int, kernel_sizes: set[int]) -> dict[str, Any]:
  """Says where the time of a trace went.

  Args:
    data: `jax.profiler.ProfileData`.
    text: the compiled program as text.
    steps: steps in the trace.
    kernel_sizes: see `kind`.

  Returns:
    `kinds`: milliseconds of a step by kind. `dearest`: (name, ms a step, kind, origin, shape) of the slowest
    instructions. `launches`: instructions or kernels in a step.
  """
  instructions = parse(text)
  milliseconds, kinds, count = collections.Counter(), collections.Counter(), 0
  for name, nanoseconds in events(data, instructions):
    milliseconds[name] += nanoseconds / 1e6 / steps
    count += 1
  rows = []
  for name, value in milliseconds.most_common():
    at = instructions.get(name, OTHER)
    origin = f'{at.functions[0]}, {at.direction}' if at.functions else at.op_name
    rows.append((name, value, kind(at, kernel_sizes), origin, at.shape[:40]))
    kinds[rows[-1][2]] += value
  return {'kinds': dict(kinds.most_common()), 'dearest': rows[:DEAREST], 'launches': count / steps}
