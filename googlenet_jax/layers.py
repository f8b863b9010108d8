"""Convolution, max-pooling, dropout: PyTorch's arithmetic, with gradients that XLA runs fast.

Every layer takes `[B, H, W, C]`. On a GPU or TPU all is XLA's own. On a CPU the same mathematics is written another way
in four places, and there only (`_cpu` is the one switch; `python experiments/layer_speed.py` times layers both ways):

- 1x1 convolutions are matrix products, and those that read the same map take their gradients in one product each;
- a pass of a 3x3 or 5x5 convolution is a product of patches and a matrix where that is faster (`PATCHES_UP_TO`);
- the gradient of max-pooling is a gather over the winners' indices (XLA's select-and-scatter is single-threaded);
- max-pooling and its gradient are compiled apart from what surrounds them (`unfused`).
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

# On a CPU a pass of a convolution is a product of patches on maps up to this side in pixels, and XLA's own on larger
# ones: by side of the kernel, for the forward pass, the gradient of the input and that of the kernel. Measured by
# experiments/layer_speed.py. XLA is slow by a factor of 4 to 20 where a kernel is larger than the map.
PATCHES_UP_TO = {3: (2, 2, math.inf), 5: (7, 4, 2)}


def xavier_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Glorot and Bengio (2010) with PyTorch's fans: uniform in +-sqrt(6 / (fan_in + fan_out)).

  The fans are `kh * kw * in` and `kh * kw * out`. NumPy draws, seeded by the key: XLA takes 20 to 30 seconds to compile
  its own generator for the 57 shapes of this network on two CPU cores, NumPy 0.1 to draw.

  Args:
    key: typed key.
    shape: `[kh, kw, in, out]` or `[in, out]`.

  Returns:
    float32 array.
  """

  def draw(data):
    bound = (6 / (math.prod(shape[:-2]) * sum(shape[-2:]))) ** 0.5
    return np.random.default_rng(np.asarray(data)).uniform(-bound, bound, shape).astype(np.float32)

  out = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.pure_callback(draw, out, jax.random.key_data(key), vmap_method='sequential')


def _cpu() -> bool:
  return jax.default_backend() == 'cpu'


def unfused(function: Callable) -> Callable:
  """`function` of arrays, compiled as a call of its own.

  XLA:CPU fuses cheap arithmetic into each of its consumers, and computes it anew in every one; it removes
  `lax.optimization_barrier` before that. It leaves alone a call that is not to be inlined. `function` may use `jax.lax`
  only: each jitted helper of jax.numpy in it, such as `where`, would become a call as well.
  """
  jitted = jax.jit(function)

  def call(*arrays):
    with set_xla_metadata(inlineable='false'):
      return jitted(*arrays)

  return call


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Convolves with zero padding of `k // 2` on both sides, as PyTorch's `Conv2d(padding=k // 2)`.

  Args:
    x: `[B, H, W, C_in]`.
    kernel: `[k, k, C_in, C_out]`, k odd.
    stride: step between windows, in pixels.

  Returns:
    `[B, ceil(H / stride), ceil(W / stride), C_out]`.
  """
  k = kernel.shape[0]
  if _cpu() and stride == 1:
    if k == 1:
      return pointwise(x, kernel[0, 0])[0]
    if k in PATCHES_UP_TO:
      return _conv(x, _vary_like(x, kernel))
  return _xla_conv(x, kernel, stride)


def _xla_conv(x, kernel, stride=1):
  pad = (kernel.shape[0] // 2,) * 2
  return lax.conv_general_dilated(x, kernel, (stride, stride), (pad, pad), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _vary_like(x, kernel):
  # Inside shard_map, a derivative written by hand has to vary over the same devices as its argument.
  axes = jax.typeof(x).manual_axis_type.varying - jax.typeof(kernel).manual_axis_type.varying
  return lax.pcast(kernel, tuple(axes), to='varying') if axes else kernel


def pointwise(x: jax.Array, *kernels: jax.Array) -> list[jax.Array]:
  """The 1x1 convolutions of one map with several kernels: `[x @ kernel for kernel in kernels]`.

  On a CPU their gradients are taken together. One product gives the gradient of `x`, and one those of the kernels:
  XLA's product is slow where both factors are contracted over their first axis, so that copying `x` transposed first
  pays, once for all kernels.

  Args:
    x: `[B, H, W, C_in]`.
    *kernels: each `[C_in, C_out]`.

  Returns:
    `[B, H, W, C_out]` for each kernel.
  """
  if _cpu():
    return _pointwise(x, *[_vary_like(x, kernel) for kernel in kernels])
  return [conv(x, kernel[None, None]) for kernel in kernels]


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
  """Offsets of a k x k window that meet the map at all: the others would read only padding."""
  return [(i, j) for i in range(k) for j in range(k) if abs(i - k // 2) < height and abs(j - k // 2) < width]


def _patches(x, k):
  height, width = x.shape[1:3]
  pad = k // 2
  x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  return jnp.concatenate([x[:, i : i + height, j : j + width] for i, j in _taps(k, height, width)], axis=-1)


def _patches_conv(x, kernel):
  k = kernel.shape[0]
  matrix = jnp.concatenate([kernel[i, j] for i, j in _taps(k, *x.shape[1:3])])
  return jnp.einsum('bhwi,io->bhwo', _patches(x, k), matrix)


def _patches_kernel_gradient(x, gradient, k):
  taps = _taps(k, *x.shape[1:3])
  matrix = jnp.einsum('bhwi,bhwo->io', _patches(x, k), gradient)
  by_tap = dict(zip(taps, jnp.split(matrix, len(taps)), strict=True))
  none = jnp.zeros_like(by_tap[taps[0]])  # of a tap that meets only padding
  return jnp.stack([jnp.stack([by_tap.get((i, j), none) for j in range(k)]) for i in range(k)])


def _on_small_map(x, kernel, limit):
  form = _patches_conv if min(x.shape[1:3]) <= limit else _xla_conv
  return form(x, kernel)


@jax.custom_vjp
def _conv(x, kernel):
  return _on_small_map(x, kernel, PATCHES_UP_TO[kernel.shape[0]][0])


def _conv_backward(saved, gradient):
  x, kernel = saved
  k = kernel.shape[0]
  _, input_limit, kernel_limit = PATCHES_UP_TO[k]
  dx = _on_small_map(gradient, kernel[::-1, ::-1].swapaxes(2, 3), input_limit)
  if min(x.shape[1:3]) <= kernel_limit:
    return dx, _patches_kernel_gradient(x, gradient, k)
  return dx, *jax.vjp(functools.partial(_xla_conv, x), kernel)[1](gradient)


_conv.defvjp(lambda x, kernel: (_conv(x, kernel), (x, kernel)), _conv_backward)


def max_pool(x: jax.Array, stride: int, window: int = 3, ceil_mode: bool = False) -> jax.Array:
  """Max-pools 3x3 windows with padding 1, as PyTorch's `MaxPool2d(3, stride, padding=1)`.

  With `ceil_mode` there is no padding, the last window may hang over the edge, and it may be of another size than 3x3:
  PyTorch's `MaxPool2d(window, stride, ceil_mode=True)`, for stride at most `window`.

  The gradient goes to the first maximum of a window in row-major order, as in XLA and in PyTorch: after a ReLU, ties
  at zero are common.

  Args:
    x: floating point `[B, H, W, C]`.
    stride: 1 or 2.
    window: side of the window in pixels; 3 without `ceil_mode`.
    ceil_mode: see above; XLA's own on every backend, and its gradient slow on a CPU.

  Returns:
    `[B, ceil(H / stride), ceil(W / stride), C]`; with `ceil_mode` `[B, ceil((H - window) / stride) + 1, .., C]`.

  Raises:
    ValueError: another window than 3x3 without `ceil_mode`.
  """
  if window != 3 and not ceil_mode:
    raise ValueError(f'window={window} needs ceil_mode=True: with padding windows are 3x3')
  if _cpu() and not ceil_mode:
    return _indexed_max_pool(x, stride)
  padding = [(1, 1), (1, 1)]
  if ceil_mode:
    padding = [(0, -(-(size - window) // stride) * stride + window - size) for size in x.shape[1:3]]
  sides, strides = (1, window, window, 1), (1, stride, stride, 1)
  return lax.reduce_window(x, -jnp.inf, lax.max, sides, strides, ((0, 0), *padding, (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _indexed_max_pool(x, stride):
  return unfused(lambda x: _best_and_index(stride, x)[0])(x)


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
    greater = view > best  # strictly: ties stay with the first
    best, index = lax.select(greater, view, best), lax.select(greater, tap, index)
    nan = nan | (view != view)  # by itself: lax.max, which passes NaN on, looks for it in both of its arguments
  return lax.select(nan, lax.full_like(best, jnp.nan), best), index


def _indexed_max_pool_forward(x, stride):
  best, index = unfused(functools.partial(_best_and_index, stride))(x)
  return best, (index, jnp.zeros((*x.shape[1:3], 0)))  # an empty array carries the size of x to the backward pass


def _to_winners(stride, height, width, index, gradient):
  images, rows, columns, features = gradient.shape
  border = ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0))
  gradient = lax.pad(gradient, jnp.array(0, gradient.dtype), border)
  index = lax.pad(index, jnp.array(-1, index.dtype), border)

  def windows(remainder, count):  # over the pixels stride * n + remainder: (window - n, tap) of those that there are
    taps = [(d, remainder + 1 - stride * d) for d in (-1, 0, 1) if abs(d) < count]
    return [(d, tap) for d, tap in taps if 0 <= tap < 3]

  def gather(down, right):  # of the pixels stride * row + down, stride * column + right
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


def _indexed_max_pool_backward(stride, residuals, gradient):
  index, size = residuals
  return (unfused(functools.partial(_to_winners, stride, *size.shape[:2]))(index, gradient),)


_indexed_max_pool.defvjp(_indexed_max_pool_forward, _indexed_max_pool_backward)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
  """`max(x, 0)`, any shape; the gradient at 0 is 0, as PyTorch's.

  The backward pass looks at the result, which the next layer keeps anyway, and not at `x`.
  """
  return jnp.maximum(x, 0)


def _relu_forward(x):
  y = relu(x)
  return y, y


relu.defvjp(_relu_forward, lambda y, gradient: (jnp.where(y <= 0, 0, gradient),))


def dropout(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
  """Zeroes features with probability `rate` and scales the others by `1 / (1 - rate)`.

  One key an example, not one a batch: the mask of an example is then the same however many devices share the batch.

  Args:
    x: `[B, F]`.
    rate: probability in [0, 1).
    keys: typed keys `[B]`.

  Returns:
    `[B, F]`.
  """
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
  return jnp.where(keep, x / (1 - rate), 0)


class Conv(nnx.Module):
  """Convolution, then batch normalisation if asked for, then ReLU.

  Weights are Xavier-uniform and biases zero, as the article initialises. With batch normalisation there is no bias:
  the normalisation would take it out again.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    kernel_size: int,
    stride: int = 1,
    *,
    norm: str = 'none',
    dtype: jax.typing.DTypeLike = jnp.float32,
    axis_name: str | None = None,
    rngs: nnx.Rngs,
  ):
    """Makes the layer.

    Args:
      in_features: input channels.
      out_features: output channels.
      kernel_size: side of the square kernel in pixels, odd.
      stride: step between windows in pixels.
      norm: 'none' or 'batch'.
      dtype: of the computation; parameters are float32.
      axis_name: mesh axis over which batch statistics are averaged, or None.
      rngs: stream `params`.
    """
    self.stride = stride
    self.dtype = dtype
    shape = (kernel_size, kernel_size, in_features, out_features)
    self.kernel = nnx.Param(xavier_uniform(rngs.params(), shape))
    if norm == 'batch':
      self.bias = None
      self.norm = nnx.BatchNorm(out_features, momentum=0.9, epsilon=1e-3, dtype=dtype, axis_name=axis_name, rngs=rngs)
    else:
      self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))
      self.norm = None

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """`[B, H, W, in]` to `[B, ceil(H / stride), ceil(W / stride), out]`; `train` normalises by the batch."""
    return self._finish(conv(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride), train)

  def _finish(self, x, train):
    if self.norm is not None:
      x = self.norm(x, use_running_average=not train)
    else:
      x = x + self.bias[...].astype(self.dtype)
    return relu(x)


def read_one_map(layers: Sequence[Conv], x: jax.Array, train: bool = False) -> list[jax.Array]:
  """`[layer(x, train) for layer in layers]` for 1x1 layers of one dtype, by `pointwise`."""
  dtype = layers[0].dtype
  maps = pointwise(x.astype(dtype), *[layer.kernel[0, 0].astype(dtype) for layer in layers])
  return [layer._finish(y, train) for layer, y in zip(layers, maps, strict=True)]
