"""The layers of a network as the rows of the paper's table 1, computed from the network itself."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from googlenet_jax.model import auxiliary_classifiers, googlenet
from googlenet_jax.model.googlenet import GoogLeNet, count_parameters

# The paper's columns: output channels of each convolution of a block.
WIDTHS = {
  '#1x1': 'ch1x1',
  '#3x3 reduce': 'ch3x3_reduce',
  '#3x3': 'ch3x3',
  '#5x5 reduce': 'ch5x5_reduce',
  '#5x5': 'ch5x5',
  'pool proj': 'pool_proj',
}
HEAD = ('layer', 'kernel/stride', 'output', *WIDTHS, 'parameters', 'multiply-adds')


class Row(NamedTuple):
  """A row of the table."""

  name: str
  kernel: str  # side of the kernel and stride, such as '7x7/2'; empty for a block
  output: tuple[int, ...]  # for one image, without the batch: [H, W, C] or [C]
  widths: dict[str, int] | None = None  # by column of WIDTHS
  parameters: int = 0
  convolutions: int = 0  # multiply-adds in convolutions
  linear: int = 0  # multiply-adds in linear layers
  auxiliary: bool = False  # used in training only


def layer_table(model: GoogLeNet, image_size: int) -> list[Row]:
  """Returns the rows of the table, from the image to the logits.

  The parameters add up to `count_parameters`, and the multiply-adds in convolutions to `count_multiply_adds`, which
  leaves auxiliary classifiers out.

  Args:
    model: only shapes are read; it may come from `with_shapes`.
    image_size: side of the square input in pixels.
  """
  maps, options = _shapes(model, image_size), model.options
  side, stride = kernel_of(model.conv1)[0], model.conv1.stride
  rows = [Row('conv1', f'{side}x{side}/{stride}', maps['conv1'], **_work(model.conv1, maps['conv1']))]
  if options.stem == 'article':
    rows.append(Row('max pool', '3x3/2', maps['conv2_reduce']))  # a 1x1 convolution keeps its size and 64 channels
  reduce, conv2 = (_work(getattr(model, name), maps[name]) for name in ('conv2_reduce', 'conv2'))
  widths = {'#3x3 reduce': maps['conv2_reduce'][-1], '#3x3': maps['conv2'][-1]}
  rows.append(Row('conv2', '3x3/1', maps['conv2'], widths, **{key: reduce[key] + conv2[key] for key in conv2}))
  blocks = [*googlenet.TABLE]
  before, pooled = 'conv2', True
  for name in blocks:
    if pooled:
      square = googlenet.POOL_AFTER.get(before, 3) if options.pool == 'torchvision' else 3
      rows.append(Row('max pool', f'{square}x{square}/2', (*maps[name][:2], maps[before][-1])))
    block = getattr(model, name)
    convs = {column: getattr(block, conv) for column, conv in WIDTHS.items() if getattr(block, conv) is not None}
    widths = {column: kernel_of(conv)[-1] for column, conv in convs.items()}
    side = f'#5x5 is {options.ch5x5_kernel}x{options.ch5x5_kernel}' if options.ch5x5_kernel != 5 else ''
    rows.append(Row(name.replace('_', ' '), side, maps[name], widths, **_work(block, maps[name])))
    before, pooled = name, name in googlenet.POOL_AFTER and name != blocks[-1]
  for name, after in auxiliary_classifiers.AFTER.items() if model.auxiliary else ():
    rows.append(_auxiliary_row(getattr(model, name), name, after, maps))
  if model.hidden is None:
    side = maps[before][:2]
    rows.append(Row('average pool', f'{side[0]}x{side[1]}', maps['head']))
  else:
    rows.append(Row('hidden', '', maps['head'], parameters=count_parameters(model.hidden), linear=_size(model.hidden)))
  if options.dropout:
    rows.append(Row(f'dropout ({100 * options.dropout:g} %)', '', maps['head']))
  linear = {'parameters': count_parameters(model.logits), 'linear': _size(model.logits)}
  return [*rows, Row('logits', '', maps['logits'], **linear)]


def _shapes(model: GoogLeNet, image_size: int) -> dict[str, tuple[int, ...]]:
  image = jax.ShapeDtypeStruct((1, image_size, image_size, model.channels), jnp.float32)
  graphdef, state = nnx.split(model)
  found = jax.eval_shape(lambda state, image: nnx.merge(graphdef, state).end_points(image), state, image)
  return {name: array.shape[1:] for name, array in found.items()}


def kernel_of(layer: nnx.Module) -> tuple[int, ...]:
  """Returns the shape of a layer's kernel: `[k, k, in, out]` or `[in, out]`."""
  return layer.kernel.shape


def _size(layer: nnx.Module) -> int:
  return math.prod(kernel_of(layer))


def _work(module: nnx.Module, output: Sequence[int]) -> dict[str, int]:
  """Parameters and multiply-adds of the convolutions in a module whose maps all have the size of its output."""
  kernels = [p for p in jax.tree.leaves(nnx.state(module, nnx.Param)) if p.ndim == 4]
  work = output[0] * output[1] * sum(kernel.size for kernel in kernels)
  return {'parameters': count_parameters(module), 'convolutions': work}


def _auxiliary_row(classifier: nnx.Module, name: str, after: str, maps: dict[str, tuple[int, ...]]) -> Row:
  pooled = kernel_of(classifier.fc1)[0] // kernel_of(classifier.conv)[-1]  # pixels of the pooled map
  return Row(
    f'{name} (after {after[-2:]})',
    '',
    maps[name],
    parameters=count_parameters(classifier),
    convolutions=pooled * _size(classifier.conv),
    linear=_size(classifier.fc1) + _size(classifier.fc2),
    auxiliary=True,
  )


def totals(rows: Sequence[Row]) -> tuple[int, int, int]:
  """Returns all parameters, and the multiply-adds in convolutions and linear layers, without auxiliary classifiers."""
  used = [row for row in rows if not row.auxiliary]
  return sum(row.parameters for row in rows), sum(r.convolutions for r in used), sum(r.linear for r in used)


def cells(rows: Sequence[Row]) -> list[list[str]]:
  """Returns the table as text: HEAD, a line for each row, and the totals."""
  lines = [list(HEAD)]
  for row in rows:
    widths = [str((row.widths or {}).get(column, '')) for column in WIDTHS]
    numbers = [f'{n:,}' if n else '' for n in (row.parameters, row.convolutions + row.linear)]
    lines.append([row.name, row.kernel, 'x'.join(map(str, row.output)), *widths, *numbers])
  parameters, convolutions, linear = totals(rows)
  lines.append(['total', '', '', *[''] * len(WIDTHS), f'{parameters:,}', f'{convolutions + linear:,}'])
  return lines


def aligned(lines: Sequence[Sequence[str]]) -> str:
  """Returns a table for a terminal: names on the left, everything else on the right."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  rows = []
  for line in lines:
    padded = [text.ljust(width) for text, width in zip(line[:2], widths[:2], strict=True)]
    padded += [text.rjust(width) for text, width in zip(line[2:], widths[2:], strict=True)]
    rows.append('  '.join(padded).rstrip())
  return '\n'.join(rows)


def markdown(lines: Sequence[Sequence[str]]) -> str:
  """Returns a table in Markdown."""
  head, *rest = lines
  rule = ['---'] * 2 + ['---:'] * (len(head) - 2)
  return ''.join(f'| {" | ".join(line)} |\n' for line in (head, rule, *rest))
