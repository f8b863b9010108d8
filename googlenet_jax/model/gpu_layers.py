"""Forms of operations that a GPU runs faster than XLA's own. The mathematics is the same; `layers.py` chooses them.

- The gradient of max-pooling gathers by the indices of the maxima. XLA's own is a scatter, a third of a training step.
- 1x1 layers that read one map are one layer: one convolution, one normalisation, one ReLU.
- A convolution of an image puts neighbouring pixels into channels first: cuDNN's fast kernels need 8 or more channels.
- Sums over all pixels are taken in two steps. In one step XLA gives a small map to a few of the GPU's processors.

XLA makes one kernel of elementwise operations and shifted views. The forms here are written for that.

Measured on one H200 (jax 0.11.2, 224 pixels, batch 256, bfloat16): a training step took 30.4 ms with XLA's own forms
and 13.5 ms with these. The forms were not timed one by one. docs/speed.md has all figures.

Maps are `[B, H, W, C]`; a map and its kernel have the same dtype. Max-pooling works in reverse mode only.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from googlenet_jax.model import normalisation
from googlenet_jax.model.cpu_layers import xla_conv

FEW_CHANNELS = 4  # most channels of an image
ALIGNMENT = 8  # tensor cores read channels in groups of 8


# Convolutions --------------------------------------------------------------------------------------------------------


def read_one_map(finish: Callable, x: jax.Array, kernels: Sequence[jax.Array], vectors: Sequence[tuple]) -> list[tuple]:
  """Applies several 1x1 layers to one map as one layer; the GPU's form of `layers.read_one_map`.

  Args:
    finish: what follows the convolution. It takes a map and vectors, one value per channel, and returns a map and
      vectors. Channels must not mix.
    x: `[B, H, W, C_in]`.
    kernels: each `[C_in, C_out]`.
    vectors: for each kernel a tuple of arrays `[C_out]`.

  Returns:
    For each kernel: a map `[B, H, W, C_out]` and a tuple of vectors `[C_out]`.
  """
  widths = [kernel.shape[1] for kernel in kernels]
  joined = [lax.concatenate(each, 0) for each in zip(*vectors, strict=True)]
  y, found = finish(xla_conv(x, lax.concatenate(kernels, 1)[None, None]), *joined)
  maps, *found = [lax.split(array, widths, axis=array.ndim - 1) for array in (y, *found)]
  return [(y, tuple(each[i] for each in found)) for i, y in enumerate(maps)]


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """The GPU's form of `layers.conv` for maps of few channels; see there for arguments."""
  if stride == 2:
    return _space_to_depth_conv(x, kernel)
  return _patches_conv(x, kernel)


def _align(x, axis):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % ALIGNMENT)
  return jnp.pad(x, padding)


def _space_to_depth_conv(x, kernel):
  """Convolves with stride 2 as with stride 1, with 2x2 pixels as channels: a 7x7 kernel becomes 4x4.

  Pixel r of the result reads the rows `2 r - k // 2 + i` with `i < k`. They lie in the pairs of rows `r - before` to
  `r + after`.
  """
  images, height, width, features = x.shape
  k, out_features = kernel.shape[0], kernel.shape[-1]
  before, after = (k // 2 + 1) // 2, k // 4
  rows, columns, pairs = (height + 1) // 2, (width + 1) // 2, before + 1 + after
  x = jnp.pad(x, ((0, 0), (0, 2 * rows - height), (0, 2 * columns - width), (0, 0)))
  x = x.reshape(images, rows, 2, columns, 2, features).transpose(0, 1, 3, 2, 4, 5)
  x = x.reshape(images, rows, columns, 4 * features)
  first = 2 * before - k // 2  # 1 if the first row of the first pair is not read
  edge = (first, 2 * pairs - k - first)
  kernel = jnp.pad(kernel, (edge, edge, (0, 0), (0, 0)))
  kernel = kernel.reshape(pairs, 2, pairs, 2, features, out_features).transpose(0, 2, 1, 3, 4, 5)
  kernel = kernel.reshape(pairs, pairs, 4 * features, out_features)
  padding, numbers = ((before, after),) * 2, ('NHWC', 'HWIO', 'NHWC')
  return lax.conv_general_dilated(_align(x, 3), _align(kernel, 2), (1, 1), padding, dimension_numbers=numbers)


def _patches_conv(x, kernel):
  """Convolves with stride 1 as a 1x1 convolution of patches: a 3x3 kernel of one channel becomes 9 channels."""
  height, width = x.shape[1:3]
  k, out_features = kernel.shape[0], kernel.shape[-1]
  pad = (k // 2, k // 2)
  x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
  patches = jnp.concatenate([x[:, i : i + height, j : j + width] for i in range(k) for j in range(k)], axis=-1)
  return xla_conv(_align(patches, 3), _align(kernel.reshape(1, 1, -1, out_features), 2))


# Sums over all pixels ------------------------------------------------------------------------------------------------


def channel_sums(*maps: jax.Array) -> list[jax.Array]:
  """Sums maps over images and pixels: first over the pixels of each image, then over the images.

  Args:
    *maps: floating point `[B, H, W, C]`.

  Returns:
    float32 `[C]` for each map, or float64.
  """
  by_image = [lax.reduce_sum(_wide(x), (1, 2)) for x in maps]
  by_image = lax.optimization_barrier(by_image)  # without it XLA makes one step of two
  return [lax.reduce_sum(x, (0,)) for x in by_image]


def _wide(x):
  """Returns float32, or float64 unchanged."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def batch_norm(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  *,
  train: bool,
  momentum: float,
  epsilon: float,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """The GPU's form of `normalisation.batch_norm`; see there. New running statistics have no gradient."""
  if not train:
    options = {'train': train, 'momentum': momentum, 'epsilon': epsilon}
    return normalisation.batch_norm(x, scale, bias, mean, var, **options)
  y, *batch = _normalise(x, scale, bias, epsilon)
  return y, normalisation.moved((mean, var), lax.stop_gradient(tuple(batch)), momentum)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise(x, scale, bias, epsilon):
  """Returns the normalised map, and mean and variance of the batch."""
  return _normalise_forward(x, scale, bias, epsilon)[0]


def _normalise_forward(x, scale, bias, epsilon):
  wide, count = _wide(x), x.size // x.shape[-1]
  total, squares = channel_sums(wide, lax.square(wide))
  mean = total / count
  var = lax.max(squares / count - lax.square(mean), jnp.zeros_like(mean))  # rounding can make it negative
  inverse = lax.rsqrt(var + epsilon)
  y = (wide - mean) * (inverse * scale) + bias
  return (y.astype(x.dtype), mean, var), (x, scale, mean, inverse)


def _normalise_backward(epsilon, saved, gradients):
  x, scale, mean, inverse = saved
  gradient, normal = _wide(gradients[0]), (_wide(x) - mean) * inverse
  of_bias, of_scale = channel_sums(gradient, gradient * normal)
  count = x.size // x.shape[-1]
  of_x = scale * inverse * (gradient - (of_bias + normal * of_scale) / count)
  return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(scale.dtype)


_normalise.defvjp(_normalise_forward, _normalise_backward)


# Max-pooling ---------------------------------------------------------------------------------------------------------

LARGEST_WINDOW = 7  # pixels: side of a window of max-pooling
ROW = 8  # the index of tap (i, j) is ROW * i + j; taps beside the window then have indices of their own


class _Axis(NamedTuple):
  """Windows along one axis: window r reads the pixels `stride * r - before + i` with `i < window`."""

  size: int  # pixels
  stride: int
  window: int
  before: int
  count: int  # windows

  def tap(self, i: int) -> tuple[int, int, int]:
    """Returns the first pixel that tap i reads, the first window in which it is inside the map, and after the last."""
    offset = i - self.before
    first = max(0, -(offset // self.stride))
    return first * self.stride + offset, first, min(self.count, (self.size - 1 - offset) // self.stride + 1)

  @property
  def groups(self) -> int:
    """Groups of `stride` pixels."""
    return -(-self.size // self.stride)

  def shifts(self) -> Iterator[int]:
    """Yields every d for which window n + d reads a pixel of group n."""
    lowest = -((self.window - 1 - self.before) // self.stride)
    for d in range(lowest, (self.stride - 1 + self.before) // self.stride + 1):
      if -self.groups < d < self.count:
        yield d

  def taps(self, d: int) -> np.ndarray:
    """Returns the tap with which window n + d reads each pixel of group n, outside of the window if it does not."""
    return np.arange(self.stride) + self.before - self.stride * d

  def to_groups(self, d: int) -> tuple[int, int, int]:
    """Returns the padding that moves window n + d to group n."""
    return -d, self.groups - self.count + d, 0


def max_pool(x: jax.Array, stride: int, window: int = 3, ceil_mode: bool = False) -> jax.Array:
  """The GPU's form of `layers.max_pool`; see there for arguments. Windows have at most LARGEST_WINDOW pixels a side."""
  if ceil_mode:
    axes = [_Axis(size, stride, window, 0, -(-(size - window) // stride) + 1) for size in x.shape[1:3]]
  else:
    axes = [_Axis(size, stride, window, window // 2, -(-size // stride)) for size in x.shape[1:3]]
  return _max_pool(x, *axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x, rows, columns):
  return functools.reduce(lax.max, _views(x, rows, columns).values())  # lax.max passes NaN on, without a test here


def _views(x, rows, columns):
  """Returns what each tap of the windows reads, by index; -inf outside of the map.

  A padded value costs a test. So each view is padded for itself, and only where it reaches over the edge.
  """
  views, inf = {}, jnp.array(-jnp.inf, x.dtype)
  for i in range(rows.window):
    for j in range(columns.window):
      (top, first_row, last_row), (left, first_column, last_column) = rows.tap(i), columns.tap(j)
      if first_row >= last_row or first_column >= last_column:
        continue  # reads only padding
      bottom, right = (
        start + axis.stride * (last - first - 1) + 1
        for axis, start, first, last in ((rows, top, first_row, last_row), (columns, left, first_column, last_column))
      )
      view = lax.slice(
        x, (0, top, left, 0), (x.shape[0], bottom, right, x.shape[3]), (1, rows.stride, columns.stride, 1)
      )
      edges = (first_row, rows.count - last_row, 0), (first_column, columns.count - last_column, 0)
      views[ROW * i + j] = lax.pad(view, inf, ((0, 0, 0), *edges, (0, 0, 0)))
  return views


def _max_pool_forward(x, rows, columns):
  """Returns the maxima and the indices of the first ones.

  Each view is compared with the maximum so far. A comparison of the whole maximum for equality would be wrong: XLA may
  compute the map again in another kernel, with other roundings, and then no view equals the maximum. Rows before
  columns should save nothing, because within one kernel the maxima of a row are computed again for each window that
  reads the row. That was not timed.
  """
  best = index = None
  for tap, view in _views(x, rows, columns).items():
    if best is None:
      best, index = view, lax.full_like(view, tap, jnp.int8)
      continue
    index = lax.select(lax.gt(view, best), lax.full_like(index, tap), index)  # strictly: the first maximum wins ties
    best = lax.max(best, view)
  return best, index


def _max_pool_backward(rows, columns, index, gradient):
  """Sums over the windows that read a pixel, as one elementwise expression. XLA can fuse it with other sums.

  Pixels are in groups of `stride` x `stride`. A group is read by nine windows with stride 1 and by four with stride 2.
  A group has axes of its own here, and the windows are broadcast over it.
  """
  images, features, dtype = index.shape[0], index.shape[3], gradient.dtype
  dims = (images, rows.count, rows.stride, columns.count, columns.stride, features)
  wide = gradient.astype(jnp.promote_types(dtype, jnp.float32))  # rounding each sum to bfloat16 would take operations
  wide, index = (lax.broadcast_in_dim(array, dims, (0, 1, 3, 5)) for array in (wide, index))
  zeros, zero, none = lax.full_like(wide, 0), jnp.zeros((), wide.dtype), (0, 0, 0)
  total = None
  for d in rows.shifts():
    for e in columns.shifts():
      tap = np.int8(ROW * rows.taps(d)[:, None] + columns.taps(e))  # [stride, stride], the tap that reads the pixel
      part = lax.select(lax.eq(index, lax.broadcast_in_dim(tap, dims, (2, 4))), wide, zeros)  # by windows
      part = lax.pad(part, zero, (none, rows.to_groups(d), none, columns.to_groups(e), none, none))  # by groups
      total = part if total is None else lax.add(total, part)
  whole = lax.reshape(total, (images, rows.stride * rows.groups, columns.stride * columns.groups, features))
  return (lax.slice(whole, (0, 0, 0, 0), (images, rows.size, columns.size, features)).astype(dtype),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
