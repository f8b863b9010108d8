"""Convolution, max-pooling and dropout with PyTorch's arithmetic, and gradients that XLA runs fast.

Layers take maps `[B, H, W, C]`. `cpu_layers.py` and `gpu_layers.py` replace the operations that XLA runs slowly on a
CPU or GPU. `by_platform` is the only switch. On a TPU all operations are XLA's own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from googlenet_jax.model import cpu_layers, gpu_layers, normalisation


def xavier_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draws weights uniformly in +-sqrt(6 / (fan_in + fan_out)), with PyTorch's fans.

  The fans are `kh * kw * in` and `kh * kw * out`. NumPy draws the numbers, seeded by the key. Compiling XLA's generator
  for each of the network's 57 shapes would take longer than compiling the training step. Outside jit NumPy is called at
  once, because a callback is a program too, and so is `jnp.asarray`.

  Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010.

  Args:
    key: typed key.
    shape: `[kh, kw, in, out]` or `[in, out]`.

  Returns:
    float32 array of that shape.
  """

  def draw(data):
    bound = (6 / (math.prod(shape[:-2]) * sum(shape[-2:]))) ** 0.5
    return np.random.default_rng(np.asarray(data)).uniform(-bound, bound, shape).astype(np.float32)

  data = jax.random.key_data(key)
  if not isinstance(data, jax.core.Tracer):
    return jax.device_put(draw(data))
  return jax.pure_callback(draw, jax.ShapeDtypeStruct(shape, jnp.float32), data, vmap_method='sequential')


def by_platform(own: Callable, *arrays: Any, cpu: Callable | None = None, gpu: Callable | None = None) -> Any:
  """Applies the form of an operation for the platform that the program is lowered for.

  A program that is exported on a CPU for a GPU has the forms for a GPU. The forms are traced for every platform, and
  only those of the program's platform are lowered. Outside jit it is the platform of the default device.

  Args:
    own: XLA's own form, a function of the arrays.
    *arrays: arrays, or trees of them.
    cpu: the form for a CPU; None for XLA's own.
    gpu: the form for a GPU; None for XLA's own.

  Returns:
    What the form returns. All forms return the same shapes.
  """
  forms = {name: form for name, form in (('cpu', cpu), ('cuda', gpu), ('rocm', gpu)) if form}
  return lax.platform_dependent(*arrays, **forms, default=own) if forms else own(*arrays)


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Convolves with zero padding of `k // 2` on both sides, as PyTorch's `Conv2d(padding=k // 2)`.

  Args:
    x: `[B, H, W, C_in]`.
    kernel: `[k, k, C_in, C_out]`, k odd.
    stride: step between windows, in pixels.

  Returns:
    `[B, ceil(H / stride), ceil(W / stride), C_out]`.
  """
  strided = lambda x, kernel: cpu_layers.strided_conv(x, kernel, stride)
  few = x.shape[-1] <= gpu_layers.FEW_CHANNELS and kernel.shape[0] > 1 and stride <= 2
  return by_platform(
    lambda x, kernel: cpu_layers.xla_conv(x, kernel, stride),
    x,
    kernel,
    cpu=cpu_layers.conv if stride == 1 else strided if x.shape[-1] == 1 else None,
    gpu=(lambda x, kernel: gpu_layers.conv(x, kernel, stride)) if few else None,
  )


def pointwise(x: jax.Array, *kernels: jax.Array) -> list[jax.Array]:
  """Applies several 1x1 convolutions to one map: `[x @ kernel for kernel in kernels]`.

  On a CPU their gradients are computed together.

  Args:
    x: `[B, H, W, C_in]`.
    *kernels: each `[C_in, C_out]`.

  Returns:
    `[B, H, W, C_out]` for each kernel.
  """
  own = lambda x, *kernels: [cpu_layers.xla_conv(x, kernel[None, None]) for kernel in kernels]
  return by_platform(own, x, *kernels, cpu=cpu_layers.pointwise)


def max_pool(x: jax.Array, stride: int, window: int = 3, ceil_mode: bool = False) -> jax.Array:
  """Max-pools 3x3 windows with padding 1, as PyTorch's `MaxPool2d(3, stride, padding=1)`.

  With `ceil_mode` it is PyTorch's `MaxPool2d(window, stride, ceil_mode=True)`, for `stride <= window`: there is no
  padding, the last window may reach over the edge, and windows of other sizes are allowed.

  The gradient goes to the first maximum of a window in row-major order, as in XLA and PyTorch, if all values are
  finite. The order matters because ties at zero are common after a ReLU.

  Args:
    x: floating point `[B, H, W, C]`.
    stride: 1 or 2.
    window: side of the window in pixels; must be 3 without `ceil_mode`.
    ceil_mode: see above. On a CPU it uses XLA's own operation, whose gradient is slow.

  Returns:
    `[B, ceil(H / stride), ceil(W / stride), C]`; with `ceil_mode` `[B, ceil((H - window) / stride) + 1, .., C]`.

  Raises:
    ValueError: the stride is not 1 or 2, or the window is not 3 without `ceil_mode`.
  """
  if stride not in (1, 2):
    raise ValueError(f'stride={stride}: choose 1 or 2')
  if window != 3 and not ceil_mode:
    raise ValueError(f'window={window} needs ceil_mode=True: padded windows are 3x3')
  return by_platform(
    lambda x: xla_max_pool(x, stride, window, ceil_mode),
    x,
    cpu=None if ceil_mode else lambda x: cpu_layers.max_pool(x, stride),
    gpu=None if window > gpu_layers.LARGEST_WINDOW else lambda x: gpu_layers.max_pool(x, stride, window, ceil_mode),
  )


def xla_max_pool(x: jax.Array, stride: int, window: int = 3, ceil_mode: bool = False) -> jax.Array:
  """XLA's own `max_pool`, on every backend; see there for arguments."""
  padding = [(1, 1), (1, 1)]
  if ceil_mode:
    padding = [(0, -(-(size - window) // stride) * stride + window - size) for size in x.shape[1:3]]
  sides, strides = (1, window, window, 1), (1, stride, stride, 1)
  return lax.reduce_window(x, -jnp.inf, lax.max, sides, strides, ((0, 0), *padding, (0, 0)))


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
  """Returns `max(x, 0)` for any shape; the gradient at 0 is 0, as in PyTorch.

  The backward pass reads the result, which the next layer keeps anyway, instead of `x`. Only reverse mode works:
  `jax.jvp` raises.
  """
  return jnp.maximum(x, 0)


def _relu_forward(x):
  y = relu(x)
  return y, y


relu.defvjp(_relu_forward, lambda y, gradient: (jnp.where(y <= 0, 0, gradient),))


def dropout(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
  """Zeroes features with probability `rate` and scales the others by `1 / (1 - rate)`.

  Each example has its own key. Its mask is then the same for any number of devices.

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
  """Convolution, optional batch normalisation, ReLU.

  Initial weights are Xavier-uniform and initial biases zero, as in d2l. With batch normalisation there is no bias: the
  normalisation would remove it.
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
    rngs: nnx.Rngs,
  ):
    """Makes the layer.

    Args:
      in_features: input channels.
      out_features: output channels.
      kernel_size: side of the square kernel in pixels, odd.
      stride: step between windows in pixels.
      norm: 'batch' adds batch normalisation; other values add nothing.
      dtype: type of the computation; parameters are float32.
      rngs: stream `params`.
    """
    self.stride = stride
    self.dtype = dtype
    shape = (kernel_size, kernel_size, in_features, out_features)
    self.kernel = nnx.Param(xavier_uniform(rngs.params(), shape))
    if norm == 'batch':
      self.bias = None
      self.norm = nnx.BatchNorm(out_features, momentum=0.9, epsilon=1e-3, dtype=dtype, rngs=rngs)
    else:
      self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))
      self.norm = None

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[B, H, W, in_features]`.
      train: normalise with the statistics of the batch, and update the running statistics.

    Returns:
      `[B, ceil(H / stride), ceil(W / stride), out_features]`.
    """
    y = conv(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride)
    on_gpu = self._finish(train, gpu_layers) if self.norm and train else None  # they differ in training only
    y, statistics = by_platform(self._finish(train), y, *self._vectors(), gpu=on_gpu)
    self._store(statistics)
    return y

  def _vectors(self) -> list[jax.Array]:
    """What follows the convolution needs these: one value for each channel."""
    if self.norm is None:
      return [self.bias[...]]
    return [variable[...] for variable in (self.norm.scale, self.norm.bias, self.norm.mean, self.norm.var)]

  def _finish(self, train, forms=normalisation):
    """Returns what follows the convolution, as a function of the map and `_vectors` that does not mix channels.

    It returns the map, and the new running statistics if there are any. `forms` is the module of `batch_norm`:
    `normalisation`, or `gpu_layers` for a GPU.
    """
    if self.norm is None:
      return lambda x, bias: (relu(x + bias.astype(x.dtype)), ())
    options = {'train': train, 'momentum': self.norm.momentum, 'epsilon': self.norm.epsilon}

    def normalise(x, *vectors):
      y, statistics = forms.batch_norm(x, *vectors, **options)
      return relu(y), statistics

    return normalise

  def _store(self, statistics):
    if statistics:
      self.norm.mean[...], self.norm.var[...] = statistics


def read_one_map(layers: Sequence[Conv], x: jax.Array, train: bool = False) -> list[jax.Array]:
  """Applies several 1x1 layers to one map: `[layer(x, train) for layer in layers]`.

  On a GPU they are one layer, with joined channels.

  Args:
    layers: 1x1 layers that differ in their channels only.
    x: `[B, H, W, in_features]`.
    train: see `Conv.__call__`.

  Returns:
    `[B, H, W, out_features]` for each layer.
  """
  dtype, finish = layers[0].dtype, layers[0]._finish(train)
  finish_on_gpu = layers[0]._finish(train, gpu_layers)

  def separate(x, kernels, vectors):
    maps = pointwise(x, *kernels)
    return [finish(y, *each) for y, each in zip(maps, vectors, strict=True)]

  out = by_platform(
    separate,
    x.astype(dtype),
    [layer.kernel[0, 0].astype(dtype) for layer in layers],
    [layer._vectors() for layer in layers],
    gpu=lambda x, kernels, vectors: gpu_layers.read_one_map(finish_on_gpu, x, kernels, vectors),
  )
  for layer, (_, statistics) in zip(layers, out, strict=True):
    layer._store(statistics)
  return [y for y, _ in out]


def flatten(x: jax.Array) -> jax.Array:
  """Flattens `[B, H, W, C]` to `[B, C * H * W]`: channels first, as in PyTorch, whose linear weights then fit."""
  return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


class Linear(nnx.Module):
  """`x @ kernel + bias`; initial weights are Xavier-uniform, initial biases zero."""

  def __init__(self, in_features: int, out_features: int, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
    """Makes the layer.

    Args:
      in_features: length of the input.
      out_features: length of the output.
      dtype: type of the computation; parameters are float32.
      rngs: stream `params`.
    """
    self.dtype = dtype
    self.kernel = nnx.Param(xavier_uniform(rngs.params(), (in_features, out_features)))
    self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies the layer: `[B, in_features]` to `[B, out_features]`."""
    return x.astype(self.dtype) @ self.kernel[...].astype(self.dtype) + self.bias[...].astype(self.dtype)
