"""Faster forms of operations that XLA:CPU runs slowly. The mathematics is the same; `layers.py` uses them on a CPU.

- 1x1 convolutions are matrix products. Those that read the same map share one product per gradient.
- 3x3 and 5x5 convolutions of many tiles take fewer multiplications (`winograd.py`, `TILES`).
- Otherwise a pass of them is a product of patches and a matrix where that is faster (`PATCHES_UP_TO`).
- The gradient of max-pooling gathers by the indices of the maxima. XLA's select-and-scatter is single-threaded.
- Max-pooling and its gradient are compiled as separate calls (`unfused`).

Maps are `[B, H, W, C]`; a map and its kernel have the same dtype. Gradients work in reverse mode only (`custom_vjp`):
`jax.jvp` and `jax.hessian` raise.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from googlenet_jax.model import winograd

# Largest maps on which a convolution is a product of patches, in pixels of the shorter side. The keys are sides of the
# kernel; the values are for the forward pass, the gradient of the input and the gradient of the kernel. Larger maps use
# XLA's convolution. Measured on one processor with AVX2 and one with AVX-512 (experiments/results/layer_speed*.md).
# Where single layers disagreed, the time of whole steps decided (ablation_cpu.md). XLA is several times slower if a
# kernel is larger than its map. Patches take memory: 7 MB per image at 56 pixels (the paper's conv2 at 224).
PATCHES_UP_TO = {3: (8, 3, 56), 5: (7, 4, 2)}

# Sides of Winograd's tiles, in pixels: the one that takes the fewest products is chosen. Tiles of 3 and 4 round two
# to five times as much as PyTorch. Tiles of 2 round less than PyTorch for 3x3 kernels, up to six times as much for 5x5.
# So training has tiles of 2 only.
TILES = {'inference': (2, 3, 4), 'forward': (2,), 'input gradient': (2,), 'kernel gradient': (2,)}
MIN_TILES = 64  # in the batch: with fewer, transforming the kernel costs more than it saves
LESS_THAN = 0.7  # largest share of the plain form's products; otherwise transforming the map costs more than it saves


def unfused(function: Callable) -> Callable:
  """Compiles a function of arrays as a separate call.

  XLA:CPU fuses cheap arithmetic into each consumer and repeats it there. It removes `lax.optimization_barrier` before
  it fuses, but it keeps calls that are marked as not inlineable.

  Args:
    function: uses `jax.lax` only. Jitted helpers of jax.numpy such as `where` would become calls too.

  Returns:
    A function of the same arrays.
  """
  jitted = jax.jit(function)

  def call(*arrays):
    with set_xla_metadata(inlineable='false'):
      return jitted(*arrays)

  return call


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The CPU's form of `layers.conv`, for stride 1; see there for arguments."""
  k = kernel.shape[0]
  if k == 1:
    return pointwise(x, kernel[0, 0])[0]
  if k in PATCHES_UP_TO:
    return _conv(x, kernel)
  return xla_conv(x, kernel)


def xla_conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """XLA's own `layers.conv`, on every backend; see there for arguments."""
  pad = (kernel.shape[0] // 2,) * 2
  return lax.conv_general_dilated(x, kernel, (stride, stride), (pad, pad), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def strided_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """The CPU's form of `layers.conv` for grey images; see there for arguments.

  The gradient of the kernel is a product of patches. XLA has two forms for it, a slow and a fast one, and takes the
  slow one inside a loop. The two round differently, and several steps in a call would not be those of single calls.
  With three channels the patches take too much time and memory.
  """
  return xla_conv(x, kernel, stride)


def _strided_conv_backward(stride, saved, gradient):
  x, kernel = saved
  dx = jax.linear_transpose(lambda x: xla_conv(x, kernel, stride), x)(gradient)
  return *dx, _patches_kernel_gradient(x, gradient, kernel.shape[0], stride)


strided_conv.defvjp(lambda x, kernel, stride: (xla_conv(x, kernel, stride), (x, kernel)), _strided_conv_backward)


def pointwise(x: jax.Array, *kernels: jax.Array) -> list[jax.Array]:
  """The CPU's form of `layers.pointwise`; see there for arguments.

  One product gives the gradient of `x`, and one gives the gradients of all kernels. XLA's product is slow if both
  factors are contracted over their first axis. It is faster to transpose `x` first, once for all kernels.
  """
  return _pointwise(x, *kernels)


_transpose = unfused(lambda rows: lax.transpose(rows, (1, 0)))


@jax.custom_vjp
def _pointwise(x, *kernels):
  return [jnp.einsum('bhwi,io->bhwo', x, kernel) for kernel in kernels]


def _pointwise_backward(saved, gradients):
  x, *kernels = saved
  widths = [kernel.shape[1] for kernel in kernels]
  gradient = jnp.concatenate(gradients, axis=-1).reshape(-1, sum(widths))  # [pixels, all C_out]
  dx = gradient @ jnp.concatenate(kernels, axis=1).T
  dkernels = jnp.einsum('ip,po->io', _transpose(x.reshape(-1, x.shape[-1])), gradient)  # [C_in, all C_out]
  return (dx.reshape(x.shape), *jnp.split(dkernels, np.cumsum(widths)[:-1].tolist(), axis=1))


_pointwise.defvjp(lambda x, *kernels: (_pointwise(x, *kernels), (x, *kernels)), _pointwise_backward)


def _taps(k: int, height: int, width: int) -> list[tuple[int, int]]:
  """Offsets in a k x k window that read from the map; the other offsets read only padding."""
  return [(i, j) for i in range(k) for j in range(k) if abs(i - k // 2) < height and abs(j - k // 2) < width]


def _patches(x, k, stride=1):
  height, width = x.shape[1:3]
  pad = k // 2
  x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  return jnp.concatenate(
    [x[:, i : i + height : stride, j : j + width : stride] for i, j in _taps(k, height, width)], axis=-1
  )


def _patches_conv(x, kernel):
  k = kernel.shape[0]
  matrix = jnp.concatenate([kernel[i, j] for i, j in _taps(k, *x.shape[1:3])])
  return jnp.einsum('bhwi,io->bhwo', _patches(x, k), matrix)


def _patches_kernel_gradient(x, gradient, k, stride=1):
  taps = _taps(k, *x.shape[1:3])
  matrix = jnp.einsum('bhwi,bhwo->io', _patches(x, k, stride), gradient)
  by_tap = dict(zip(taps, jnp.split(matrix, len(taps)), strict=True))
  none = jnp.zeros_like(by_tap[taps[0]])  # for taps that read only padding
  return jnp.stack([jnp.stack([by_tap.get((i, j), none) for j in range(k)]) for i in range(k)])


def _tile(x, k, sides):
  """Returns the side of the tile that takes the fewest products, or None where Winograd's form does not pay."""
  images, height, width, _ = x.shape
  if not isinstance(images, int):  # exported for any batch size
    return None
  found = []
  for m in sides if x.dtype.itemsize >= 4 else ():  # transforms in bfloat16 would round too much
    if winograd.possible(x.shape, k, m):
      tiles, points = winograd.counts(x.shape, k, m)
      plain = len(_taps(k, height, width)) * height * width
      if images * tiles >= MIN_TILES and tiles * points <= LESS_THAN * plain:
        found.append((tiles * points, m))
  return min(found, default=(0, None))[1]


def _by_size(x, kernel, limit, sides):
  if m := _tile(x, kernel.shape[0], sides):
    return winograd.conv(x, kernel, m)
  form = _patches_conv if min(x.shape[1:3]) <= limit else xla_conv
  return form(x, kernel)


@jax.custom_vjp
def _conv(x, kernel):
  return _by_size(x, kernel, PATCHES_UP_TO[kernel.shape[0]][0], TILES['inference'])


def _conv_forward(x, kernel):
  return _by_size(x, kernel, PATCHES_UP_TO[kernel.shape[0]][0], TILES['forward']), (x, kernel)


def _conv_backward(saved, gradient):
  x, kernel = saved
  k = kernel.shape[0]
  _, input_limit, kernel_limit = PATCHES_UP_TO[k]
  dx = _by_size(gradient, kernel[::-1, ::-1].swapaxes(2, 3), input_limit, TILES['input gradient'])
  if m := _tile(x, k, TILES['kernel gradient']):
    return dx, winograd.kernel_gradient(x, gradient, k, m)
  if min(x.shape[1:3]) <= kernel_limit:
    return dx, _patches_kernel_gradient(x, gradient, k)
  return dx, *jax.linear_transpose(functools.partial(xla_conv, x), kernel)(gradient)


_conv.defvjp(_conv_forward, _conv_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, stride: int) -> jax.Array:
  """The CPU's form of `layers.max_pool`: 3x3 windows with padding 1; see there for arguments."""
  return _maxima(stride)(x)


# Cached by stride and size: outside jit, a new function would be compiled at every call.
@functools.cache
def _maxima(stride):
  return unfused(lambda x: _best_and_index(stride, x)[0])


@functools.cache
def _maxima_and_index(stride):
  return unfused(functools.partial(_best_and_index, stride))


@functools.cache
def _gather(stride, height, width):
  return unfused(functools.partial(_to_winners, stride, height, width))


def _best_and_index(stride, x):
  height, width = x.shape[1:3]
  rows, columns = (height - 1) // stride + 1, (width - 1) // stride + 1
  x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
  best = index = nan = None
  for i, j in _taps(3, height, width):
    end = (x.shape[0], i + stride * (rows - 1) + 1, j + stride * (columns - 1) + 1, x.shape[3])
    view = lax.slice(x, (0, i, j, 0), end, (1, stride, stride, 1))
    tap = lax.full_like(view, 3 * i + j, jnp.int8)
    if best is None:
      best, index, nan = view, tap, view != view
      continue
    greater = view > best  # strictly: the first maximum wins ties
    best, index = lax.select(greater, view, best), lax.select(greater, tap, index)
    nan = nan | (view != view)  # cheaper than lax.max, which looks for NaN in both of its arguments
  return lax.select(nan, lax.full_like(best, jnp.nan), best), index


def _max_pool_forward(x, stride):
  best, index = _maxima_and_index(stride)(x)
  return best, (index, jnp.zeros((*x.shape[1:3], 0)))  # the empty array carries the size of x to the backward pass


def _to_winners(stride, height, width, index, gradient):
  images, rows, columns, features = gradient.shape
  border = ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0))
  gradient = lax.pad(gradient, jnp.array(0, gradient.dtype), border)
  index = lax.pad(index, jnp.array(-1, index.dtype), border)

  def windows(remainder, count):  # windows that cover the pixels stride * n + remainder: pairs (window - n, tap)
    taps = [(d, remainder + 1 - stride * d) for d in (-1, 0, 1) if abs(d) < count]
    return [(d, tap) for d, tap in taps if 0 <= tap < 3]

  def gather(down, right):  # gradient of the pixels (stride * row + down, stride * column + right)
    total = None
    for d, i in windows(down, rows):
      for e, j in windows(right, columns):
        start, end = (0, 1 + d, 1 + e, 0), (images, 1 + d + rows, 1 + e + columns, features)
        part = lax.slice(gradient, start, end)
        part = lax.select(lax.slice(index, start, end) == jnp.int8(3 * i + j), part, lax.full_like(part, 0))
        total = part if total is None else total + part
    return lax.reshape(total, (images, rows, 1, columns, 1, features))

  remainders = range(stride)
  lines = [lax.concatenate([gather(down, right) for right in remainders], 4) for down in remainders]
  whole = lax.reshape(lax.concatenate(lines, 2), (images, stride * rows, stride * columns, features))
  return lax.slice(whole, (0, 0, 0, 0), (images, height, width, features))


def _max_pool_backward(stride, residuals, gradient):
  index, size = residuals
  return (_gather(stride, *size.shape[:2])(index, gradient),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
