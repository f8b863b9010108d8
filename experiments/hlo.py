"""What a compiled program's text says of each instruction: its shape, its kind, and the line of Python it came from."""

import math
import re
from typing import Any, NamedTuple

INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+?)(?:{\S*})? (?P<op>[\w\-]+)\(')
COMPUTATION = re.compile(r'^(?:ENTRY )?%(?P<name>[\w.\-]+) \(.*{$')
TABLES = ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames')


class Instruction(NamedTuple):
  """One instruction; of a fusion, what it holds is in `text`."""

  name: str
  shape: str
  op: str
  op_name: str  # JAX's: jit(step)/transpose(jvp())/max
  functions: tuple[str, ...]  # 'module.function' on the Python stack, innermost first, this package's only
  text: str  # its line and, where it calls another computation, that one's lines

  @property
  def backward(self) -> bool:
    """Whether it belongs to the backward pass."""
    return 'transpose(' in self.op_name


def parse(text: str, package: str = 'googlenet_jax') -> dict[str, Instruction]:
  """Reads `compiled.as_text()`: the instructions of the entry computation by name."""
  tables, bodies, entry = _sections(text)
  frames = _stacks(tables, package)
  found = {}
  for line in bodies[entry]:
    match = INSTRUCTION.match(line)
    called = re.search(r'(?:calls|to_apply)=%([\w.\-]+)', line)
    body = '\n'.join([line, *bodies.get(called[1], ())]) if called else line
    # Some instructions that XLA makes carry no metadata; what they hold may.
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', line) or re.search(r'op_name="(jit(?:[^"\\]|\\.)*)"', body)
    frame = re.search(r'stack_frame_id=(\d+)', line) or re.search(r'stack_frame_id=(\d+)', body)
    found[match['name']] = Instruction(
      match['name'],
      match['shape'],
      match['op'],
      op_name[1] if op_name else '',
      frames.get(int(frame[1]), ()) if frame else (),
      body,
    )
  return found


def _sections(text: str) -> tuple[dict[str, list[str]], dict[str, list[str]], str]:
  """The tables of the stack frames and the lines of every computation, by name, and the name of the entry."""
  tables, bodies, entry, lines = {}, {}, '', []
  for line in text.splitlines():
    if line in TABLES:
      lines = tables[line] = []
    elif match := COMPUTATION.match(line):
      lines = bodies[match['name']] = []
      entry = match['name'] if line.startswith('ENTRY') else entry
    elif INSTRUCTION.match(line) or re.match(r'\d+ ', line):
      lines.append(line)
  return tables, bodies, entry


def _stacks(tables: dict[str, list[str]], package: str) -> dict[int, tuple[str, ...]]:
  """Stack frame to the package's functions on its stack."""

  def rows(name: str) -> dict[int, Any]:
    return {int(number): rest for number, rest in (line.split(' ', 1) for line in tables.get(name, ()))}

  def field(row: str, key: str) -> int:
    return int(re.search(rf'{key}=(\d+)', row)[1])

  files, functions = rows('FileNames'), rows('FunctionNames')
  places = {}
  for number, row in rows('FileLocations').items():
    path, function = files[field(row, 'file_name_id')].strip('"'), functions[field(row, 'function_name_id')].strip('"')
    module = path.rpartition('/')[2].removesuffix('.py')
    inside = f'/{package}/' in path
    places[number] = f'{module}.{re.sub(r"[.]<.*?>", "", function)}' if inside else None
  frames = rows('StackFrames')
  stacks = {}
  for number in frames:
    stack, at = [], number
    while at in frames:
      stack.append(places[field(frames[at], 'file_location_id')])
      at = field(frames[at], 'parent_frame_id') - 1  # 1 stands for no parent
    stacks[number] = tuple(filter(None, stack))
  return stacks


def kind(instruction: Instruction, kernel_sizes: set[int]) -> str:
  """The row of the profile that an instruction counts for.

  Args:
    instruction: of the entry computation.
    kernel_sizes: numbers of values of the network's convolution kernels, to know their gradients by.
  """
  inner = instruction.functions[0] if instruction.functions else ''
  product = ' dot(' in instruction.text
  convolution = ' convolution(' in instruction.text
  if inner.startswith(('augment.', 'resample.')):
    return 'image preparation'
  if inner.startswith('layers.Linear'):
    return 'linear layer'
  if product or convolution:
    what = '1x1 product' if any('pointwise' in f for f in instruction.functions) else 'convolution, larger kernel'
    values = math.prod(int(n) for n in re.findall(r'\d+', instruction.shape.partition('[')[2]))
    # cpu_layers.py writes these products as sums that end in ->io; of a convolution's gradients XLA sometimes forgets
    # where they came from.
    if '->io' in instruction.op_name if product else values in kernel_sizes:
      return f'{what}: kernel gradient'
    return f'{what}: {"input gradient" if instruction.backward else "forward"}'
  direction = 'backward' if instruction.backward else 'forward'
  if any('max_pool' in function for function in instruction.functions):
    return f'max-pool: {direction}'
  if 'jvp(' not in instruction.op_name and instruction.op_name.startswith('jit('):
    return 'optimizer and metrics'
  if instruction.op in ('copy', 'transpose', 'bitcast-convert') or re.match(r'(copy|transpose)', instruction.name):
    return 'copies and transpositions'
  if instruction.op in ('fusion', 'concatenate', 'pad', 'slice', 'reduce', 'call'):
    return f'elementwise, patches, concatenation, sums: {direction}'
  return 'other'
