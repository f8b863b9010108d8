"""Convolutions with fewer multiplications, as products of transformed maps and kernels (Toom-Cook, Winograd).

One dimension first. A tile of `m` results of a kernel with `k` taps reads `m + k - 1` values `d`. It is
`out @ ((kernel @ w) * (data @ d))`, where the three matrices depend on `n = m + k - 1` chosen points only. There are
`n` multiplications instead of `m * k`. In two dimensions the matrices act on rows and on columns, and the `n * n`
multiplications of a tile become `n * n` matrix products over channels, each for all tiles of all images.

Source: Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016, arXiv:1509.09308. Points that are
reciprocal in pairs round best; the integers of the paper round two to four times worse (experiments/results/README.md).
"""

import functools
import math
import os
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Finite points by their number. One more point is at infinity.
POINTS = {
  2: (0, -1),
  3: (0, 1, -1),
  4: (0, Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2)),
  5: (0, Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2), Fraction(-3, 2)),
}
WHOLE = 3  # longest axis that is the filter of its kernel; see `axis`
# Tiles that a core transforms together, about. Their transforms then stay in its cache: parts of 16 to 64 tiles were
# 1.4 times as fast as the whole batch at once at 24 pixels, and as fast on small maps.
PART = 64


class Axis(NamedTuple):
  """How one axis of a map is cut into tiles, and the matrices of one tile."""

  data: np.ndarray  # [points, values read]
  kernel: np.ndarray  # [points, k]
  out: np.ndarray  # [results, points]
  tiles: int
  pad: int  # zeros before the map

  @property
  def back(self) -> 'Axis':
    """The axis that takes the gradient of the results to the points."""
    return self._replace(data=self.out.T, pad=0)


@functools.cache
def _toom_cook(m: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The matrices `data`, `kernel` and `out` for `m` results and `k` taps, float64."""
  points = [Fraction(p) for p in POINTS[m + k - 2]]
  product = lambda roots: functools.reduce(np.polynomial.polynomial.polymul, [[-r, Fraction(1)] for r in roots], [1])
  others = [[q for q in points if q != p] for p in points]
  data = [[*product(rest), Fraction(0)] for rest in others] + [list(product(points))]
  scale = [np.prod([p - q for q in rest]) for p, rest in zip(points, others, strict=True)]
  powers = lambda count: [[p**i for i in range(count)] for p in points] + [[0] * (count - 1) + [1]]
  kernel = [[v / s for v in row] for row, s in zip(powers(k), [*scale, 1], strict=True)]
  return tuple(np.array(matrix, np.float64) for matrix in (data, kernel, np.transpose(powers(m))))


@functools.cache
def axis(length: int, k: int, m: int) -> Axis:
  """Cuts an axis.

  Args:
    length: side of the map, in pixels.
    k: taps of the kernel, odd.
    m: results in a tile, at most `length`. If `m == length <= WHOLE`, the map is the filter that slides over those
      `2 * length - 1` taps of the kernel that reach the map. That takes fewer multiplications.
  """
  if m == length <= WHOLE:
    reach = 2 * length - 1
    kernel, data, out = _toom_cook(length, length) if length > 1 else (np.ones((1, 1)),) * 3
    taps = np.zeros((reach, k))
    for tap in range(k):
      if abs(tap - k // 2) < length:
        taps[tap - k // 2 + length - 1, tap] = 1
    return Axis(data, kernel @ taps, out[::-1], 1, 0)
  data, kernel, out = _toom_cook(m, k)
  tiles, pad = -(-length // m), k // 2
  if tiles == 1:  # the values around the map are zeros: no need to read them
    return Axis(data[:, pad : pad + length], kernel, out[:length], 1, 0)
  return Axis(data, kernel, out, tiles, pad)


def _cut(x, at: int, ax: Axis):
  """Tiles along the axis `at` of a map, transformed: `[points, ...]`, with `tiles` in the place of the axis."""
  span, step = ax.data.shape[1], ax.out.shape[0]
  if ax.tiles == 1:
    step = span
  pads = [(0, 0, 0)] * x.ndim
  pads[at] = (ax.pad, max(0, step * (ax.tiles - 1) + span - ax.pad - x.shape[at]), 0)
  x = lax.pad(x, jnp.zeros((), x.dtype), pads)
  take = lambda i: lax.slice_in_dim(x, i, i + step * (ax.tiles - 1) + 1, step, at)
  return jnp.tensordot(ax.data.astype(x.dtype), jnp.stack([take(i) for i in range(span)]), 1)


def _to_points(x, rows: Axis, columns: Axis):
  """`[B, H, W, C]` to `[points, B, tiles, tiles, C]`; the points of columns come first."""
  x = _cut(_cut(x, 1, rows), 3, columns)  # [points, points, B, tiles, tiles, C]
  return x.reshape(-1, *x.shape[2:])


def _kernel_matrix(rows: Axis, columns: Axis, dtype):
  """`[points, k * k]`."""
  both = np.einsum('qj,pi->qpij', columns.kernel, rows.kernel)
  return both.reshape(both.shape[0] * both.shape[1], -1).astype(dtype)


def _kernel_to_points(kernel, rows: Axis, columns: Axis):
  k, _, *channels = kernel.shape
  return (_kernel_matrix(rows, columns, kernel.dtype) @ kernel.reshape(k * k, -1)).reshape(-1, *channels)


def _from_points(y, rows: Axis, columns: Axis, shape):
  """`[points, B, tiles, tiles, C]` to a map of that shape."""
  images, height, width, features = shape
  matrix = np.kron(columns.out, rows.out).astype(y.dtype)
  sizes = columns.out.shape[0], rows.out.shape[0], images, rows.tiles, columns.tiles, features
  y = jnp.tensordot(matrix, y, 1).reshape(sizes)
  y = y.transpose(2, 3, 1, 4, 0, 5).reshape(images, rows.tiles * sizes[1], columns.tiles * sizes[0], features)
  return y[:, :height, :width]


def axes(shape: tuple[int, ...], k: int, m: int) -> tuple[Axis, Axis]:
  """Rows and columns of maps `[B, H, W, C]`, cut into tiles of at most `m` results."""
  return axis(shape[1], k, min(m, shape[1])), axis(shape[2], k, min(m, shape[2]))


def possible(shape: tuple[int, ...], k: int, m: int) -> bool:
  """Whether there are points for tiles of `m x m` results of `k x k` kernels on maps `[B, H, W, C]`."""
  return m + k - 2 in POINTS or max(shape[1:3]) <= m <= WHOLE


def counts(shape: tuple[int, ...], k: int, m: int) -> tuple[int, int]:
  """Tiles of a map, and multiplications for a tile and a pair of channels."""
  rows, columns = axes(shape, k, m)
  return rows.tiles * columns.tiles, rows.data.shape[0] * columns.data.shape[0]


def conv(x: jax.Array, kernel: jax.Array, m: int) -> jax.Array:
  """Convolves with stride 1 and padding `k // 2`.

  Args:
    x: `[B, H, W, C_in]`.
    kernel: `[k, k, C_in, C_out]`, k odd.
    m: side of a tile in pixels, such that `possible(x.shape, k, m)`.

  Returns:
    `[B, H, W, C_out]`.
  """
  rows, columns = axes(x.shape, kernel.shape[0], m)
  points = _kernel_to_points(kernel, rows, columns)

  def of_some(x):
    y = jnp.einsum('pbhwc,pco->pbhwo', _to_points(x, rows, columns), points)
    return _from_points(y, rows, columns, (*x.shape[:3], kernel.shape[3]))

  return _in_parts(of_some, x, kernel.shape[3], rows.tiles * columns.tiles)


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def part_size(images: int, tiles: int, devices: int, cores: int) -> int:
  """Returns how many images to transform together: a divisor of `images`, and a multiple of `devices` if it can be.

  A part that the devices do not share equally would be gathered on all of them.

  Args:
    images: in the batch, on all devices.
    tiles: in an image.
    devices: that the batch may be cut over, those of all processes.
    cores: that share the work on a part.
  """
  step = math.gcd(images, devices)
  sizes = [n for n in range(step, images + 1, step) if images % n == 0]
  wanted = PART * max(cores, devices) / tiles
  size = min(sizes, key=lambda n: abs(math.log(n / wanted)))
  return size if 2 * size < images else images


def _in_parts(function, x, features, tiles):
  """Calls a function of maps on some images at a time.

  A part takes every n-th image. If the batch is cut over devices, every device has its share of each part.
  """
  images, height, width, _ = x.shape
  size = part_size(images, tiles, jax.device_count(), _cores())
  if size == images:
    return function(x)
  cut = x.reshape(size, images // size, *x.shape[1:])

  def part(i, y):
    return lax.dynamic_update_index_in_dim(y, function(lax.dynamic_index_in_dim(cut, i, 1, keepdims=False)), i, 1)

  y = lax.fori_loop(0, images // size, part, jnp.zeros((*cut.shape[:-1], features), x.dtype))
  return y.reshape(images, height, width, features)


def kernel_gradient(x: jax.Array, gradient: jax.Array, k: int, m: int) -> jax.Array:
  """The gradient of `conv` by its kernel.

  Args:
    x: `[B, H, W, C_in]`.
    gradient: the gradient of the result, `[B, H, W, C_out]`.
    k: side of the kernel.
    m: side of a tile in pixels.

  Returns:
    `[k, k, C_in, C_out]`.
  """
  rows, columns = axes(x.shape, k, m)
  y = jnp.einsum('pbhwc,pbhwo->pco', _to_points(x, rows, columns), _to_points(gradient, rows.back, columns.back))
  y = _kernel_matrix(rows, columns, x.dtype).T @ y.reshape(y.shape[0], -1)
  return y.reshape(k, k, x.shape[3], gradient.shape[3])
