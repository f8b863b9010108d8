"""Convolution, max-pooling, normalisation, dropout: PyTorch's arithmetic, with gradients that XLA runs fast.

Every layer takes `[B, H, W, C]`. On a GPU or TPU all is XLA's own. On a CPU what XLA runs slowly is written another way
(`cpu_layers.py`); `_cpu` is the one switch.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from googlenet_jax.model import cpu_layers


def xavier_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Glorot and Bengio (2010) with PyTorch's fans: uniform in +-sqrt(6 / (fan_in + fan_out)).

  The fans are `kh * kw * in` and `kh * kw * out`. NumPy draws, seeded by the key: to compile XLA's own generator for
  each of the 57 shapes of this network takes longer than the training step.

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


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Convolves with zero padding of `k // 2` on both sides, as PyTorch's `Conv2d(padding=k // 2)`.

  Args:
    x: `[B, H, W, C_in]`.
    kernel: `[k, k, C_in, C_out]`, k odd.
    stride: step between windows, in pixels.

  Returns:
    `[B, ceil(H / stride), ceil(W / stride), C_out]`.
  """
  if _cpu() and stride == 1:
    return cpu_layers.conv(x, kernel)
  return cpu_layers.xla_conv(x, kernel, stride)


def pointwise(x: jax.Array, *kernels: jax.Array) -> list[jax.Array]:
  """The 1x1 convolutions of one map with several kernels: `[x @ kernel for kernel in kernels]`.

  On a CPU their gradients are taken together.

  Args:
    x: `[B, H, W, C_in]`.
    *kernels: each `[C_in, C_out]`.

  Returns:
    `[B, H, W, C_out]` for each kernel.
  """
  if _cpu():
    return cpu_layers.pointwise(x, *kernels)
  return [conv(x, kernel[None, None]) for kernel in kernels]


def max_pool(x: jax.Array, stride: int, window: int = 3, ceil_mode: bool = False) -> jax.Array:
  """Max-pools 3x3 windows with padding 1, as PyTorch's `MaxPool2d(3, stride, padding=1)`.

  With `ceil_mode` there is no padding, the last window may hang over the edge, and it may be of another size than 3x3:
  PyTorch's `MaxPool2d(window, stride, ceil_mode=True)`, for stride at most `window`.

  The gradient goes to the first maximum of a window of finite values in row-major order, as in XLA and in PyTorch:
  after a ReLU, ties at zero are common.

  Args:
    x: floating point `[B, H, W, C]`.
    stride: 1 or 2.
    window: side of the window in pixels; 3 without `ceil_mode`.
    ceil_mode: see above; XLA's own on every backend, and its gradient slow on a CPU.

  Returns:
    `[B, ceil(H / stride), ceil(W / stride), C]`; with `ceil_mode` `[B, ceil((H - window) / stride) + 1, .., C]`.

  Raises:
    ValueError: another window than 3x3 without `ceil_mode`, or another stride than 1 or 2.
  """
  if stride not in (1, 2):
    raise ValueError(f'stride={stride}: choose 1 or 2')
  if window != 3 and not ceil_mode:
    raise ValueError(f'window={window} needs ceil_mode=True: with padding windows are 3x3')
  if _cpu() and not ceil_mode:
    return cpu_layers.max_pool(x, stride)
  return xla_max_pool(x, stride, window, ceil_mode)


def xla_max_pool(x: jax.Array, stride: int, window: int = 3, ceil_mode: bool = False) -> jax.Array:
  """See `max_pool`: XLA's own, on every backend."""
  padding = [(1, 1), (1, 1)]
  if ceil_mode:
    padding = [(0, -(-(size - window) // stride) * stride + window - size) for size in x.shape[1:3]]
  sides, strides = (1, window, window, 1), (1, stride, stride, 1)
  return lax.reduce_window(x, -jnp.inf, lax.max, sides, strides, ((0, 0), *padding, (0, 0)))


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
  """`max(x, 0)`, any shape; the gradient at 0 is 0, as PyTorch's.

  The backward pass looks at the result, which the next layer keeps anyway, and not at `x`. Reverse mode only: `jax.jvp`
  raises.
  """
  return jnp.maximum(x, 0)


def _relu_forward(x):
  y = relu(x)
  return y, y


relu.defvjp(_relu_forward, lambda y, gradient: (jnp.where(y <= 0, 0, gradient),))


def local_response_norm(x: jax.Array) -> jax.Array:
  r"""Local response normalisation across channels (Krizhevsky et al., 2012), as in the authors' GoogLeNet.

  $y_c = x_c (1 + \frac{\alpha}{5} \sum_{|c' - c| \le 2} x_{c'}^2)^{-\beta}$ with $\alpha = 10^{-4}$ and
  $\beta = 0.75$: PyTorch's `LocalResponseNorm(5)`. The sum is a product with a band matrix, which every backend, and
  its gradient, runs fast.

  Args:
    x: `[B, H, W, C]`.

  Returns:
    The same shape and dtype; the sum is taken in float32.
  """
  channel = np.arange(x.shape[-1])
  band = (abs(channel[:, None] - channel) <= 2).astype(np.float32)
  wide = x.astype(jnp.float32)
  total = jnp.einsum('bhwi,io->bhwo', wide * wide, band, precision=lax.Precision.HIGHEST)
  return (wide * (1 + 1e-4 / 5 * total) ** -0.75).astype(x.dtype)


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
      norm: 'batch' for batch normalisation; with any other there is none.
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


def flatten(x: jax.Array) -> jax.Array:
  """`[B, H, W, C]` to `[B, C * H * W]`: channels first, as PyTorch flattens, so that linear weights carry over."""
  return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


class Linear(nnx.Module):
  """`x @ kernel + bias`, `[B, in]` to `[B, out]`; Xavier-uniform weights, zero biases."""

  def __init__(self, in_features: int, out_features: int, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
    """Makes the layer with float32 parameters that computes in `dtype`."""
    self.dtype = dtype
    self.kernel = nnx.Param(xavier_uniform(rngs.params(), (in_features, out_features)))
    self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies the layer."""
    return x.astype(self.dtype) @ self.kernel[...].astype(self.dtype) + self.bias[...].astype(self.dtype)
