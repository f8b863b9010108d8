"""The preparation of images as ONNX operators, for images of any height and width.

It computes what `data.augment.prepare` computes, in the same order of operations. The two matrices of `data.resample`
depend on the size of the images, so the graph makes them when it runs.
"""

import numpy as np

from googlenet_jax.exporting.onnx_graph import FLOAT, Graph
from googlenet_jax.model.options import Options, numbers

PART = 'prepare'  # the names here begin with it


def add_preparation(
  graph: Graph, image: str, image_size: int, padding: int, resize: float, options: Options, channels: int
) -> str:
  """Adds the preparation to a graph.

  Args:
    graph: is added to.
    image: name of the input, uint8 `[N, H, W, C]`.
    image_size: see `augment.prepare`.
    padding: see `augment.prepare`.
    resize: see `augment.prepare`.
    options: options of the network; it normalises by `input_mean` and `input_std`.
    channels: channels of the images.

  Returns:
    Name of the network's input, float32 `[N, C, image_size, image_size]`.
  """
  graph = graph.within(PART)
  add, weight = graph.add, graph.weight
  side = image_size - 2 * padding
  rows, columns = _add_matrices(graph, image, side, round(resize * side))
  x = add('Transpose', 'channels_first', image, perm=[0, 3, 1, 2])  # bytes: cheaper than floats
  x = add('Div', 'to_1', add('Cast', 'float', x, to=FLOAT), weight('255', 255))  # [N, C, H, W] in [0, 1]
  x = add('MatMul', 'resize_rows', rows, x)  # [N, C, side, W]
  x = add('MatMul', 'resize_columns', x, columns)  # [N, C, side, side]
  # A program that plans its memory ahead sees the lengths here; 0 keeps N.
  x = add('Reshape', 'resized', x, weight('lengths_after', [0, channels, side, side], np.int64))
  if padding:
    x = add('Pad', 'pad', x, weight('edges', [0, 0, padding, padding] * 2, np.int64), weight('black', 0))
  for operator, name in (('Sub', 'input_mean'), ('Div', 'input_std')):
    if values := numbers(name, getattr(options, name), channels):
      x = add(operator, name, x, weight(f'{name}/values', np.reshape(values, (-1, 1, 1))))
  return x


def _add_matrices(graph: Graph, image: str, side: int, short: int) -> tuple[str, str]:
  """Adds the matrices that resize and cut: names of `[side, H]` and `[W, side]`. Values before them are `[2, ..]`."""
  add, weight = graph.add, graph.weight
  integer = lambda name, value: weight(name, value, np.int64)
  shape = add('Shape', 'shape', image)
  first, second, third = (integer(f'axis_{axis}', [axis]) for axis in (1, 2, 3))
  height, width = add('Slice', 'height', shape, first, second), add('Slice', 'width', shape, second, third)
  sizes = add('Reshape', 'sizes', add('Concat', 'both', height, width, axis=0), integer('each', [2, 1, 1]))

  # augment.resized_lengths: short * sizes / least in whole numbers, halves rounded up.
  least = add('ReduceMin', 'least', sizes, axes=[0])
  doubled = add('Mul', 'doubled', sizes, integer('twice_short', 2 * short))
  lengths = add('Div', 'lengths', add('Add', 'half_up', doubled, least), add('Add', 'twice_least', least, least))

  # augment.prepare: the stretch of each axis that is shown.
  size = add('Cast', 'size', sizes, to=FLOAT)
  ratio = add('Div', 'ratio', size, add('Cast', 'length', lengths, to=FLOAT))
  spare = add('Div', 'spare_half', add('Sub', 'spare', lengths, integer('side', side)), integer('two', 2))
  start = add('Mul', 'start', add('Cast', 'offset', spare, to=FLOAT), ratio)
  out = weight('out', side)
  extent = add('Mul', 'extent', ratio, out)

  # resample.sampling_matrix
  scale = add('Div', 'scale', extent, out)
  left = add('Add', 'left', start, add('Mul', 'steps', scale, weight('index', np.arange(side)[:, None])))
  centre = add('Add', 'centre', left, add('Div', 'half_scale', scale, weight('float_2', 2)))  # [2, side, 1]
  longest = add('ReduceMax', 'longest', size, keepdims=0)
  one = weight('1', 1)
  pixel = add('Range', 'pixel', weight('half', 0.5), longest, one)  # centres of the pixels
  shrinking = add('Max', 'shrinking', scale, one)
  t = add('Div', 't', add('Sub', 'distance', pixel, centre), shrinking)
  linear = add('Relu', 'linear', add('Sub', 'falling', one, add('Abs', 'abs', t)))
  weights = add('Where', 'weights', add('Less', 'inside', pixel, size), linear, weight('0', 0))
  total = add('ReduceSum', 'total', weights, integer('last', [-1]))
  both = add('Div', 'matrices', weights, total)  # [2, side, longest]

  def matrix(name, axis, length):
    whole = add('Gather', f'{name}/of_both', both, integer(f'{name}/axis', axis), axis=0)
    return add('Slice', name, whole, integer('first', [0]), length, integer('across', [1]))

  return matrix('rows', 0, height), add('Transpose', 'columns', matrix('columns_as_rows', 1, width), perm=[1, 0])
