"""Normalisation across channels, as in the paper, and of channels over the batch."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def local_response_norm(x: jax.Array) -> jax.Array:
  r"""Normalises responses across neighbouring channels, as in the paper's GoogLeNet.

  $y_c = x_c (1 + \frac{\alpha}{5} \sum_{|c' - c| \le 2} x_{c'}^2)^{-\beta}$ with $\alpha = 10^{-4}$ and
  $\beta = 0.75$, which is PyTorch's `LocalResponseNorm(5)`. The sum is computed as a product with a band matrix: every
  backend runs that and its gradient fast.

  Source: Krizhevsky et al., "ImageNet classification with deep convolutional neural networks", 2012, section 3.3.

  Args:
    x: `[B, H, W, C]`.

  Returns:
    Array of the same shape and dtype; the sum is computed in float32.
  """
  channel = np.arange(x.shape[-1])
  band = (abs(channel[:, None] - channel) <= 2).astype(np.float32)
  wide = x.astype(jnp.float32)
  total = jnp.einsum('bhwi,io->bhwo', wide * wide, band, precision=lax.Precision.HIGHEST)
  return (wide * (1 + 1e-4 / 5 * total) ** -0.75).astype(x.dtype)


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
  """Normalises each channel, with the arithmetic of `flax.nnx.BatchNorm` but as a function.

  In float32 results are equal to Flax's bit for bit. In bfloat16 they are more exact: everything inside is float32,
  where Flax rounds scale, bias and running statistics to bfloat16.

  Source: Ioffe and Szegedy, "Batch normalization", 2015, arXiv:1502.03167.

  Args:
    x: `[B, H, W, C]`.
    scale: `[C]`.
    bias: `[C]`.
    mean: running mean `[C]`.
    var: running variance `[C]`.
    train: normalise with the statistics of the batch instead of the running ones.
    momentum: what the running statistics keep of their old values in one step.
    epsilon: is added to the variance.

  Returns:
    `[B, H, W, C]`, and the new running statistics `(mean, var)`; `()` if not `train`.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  statistics = ()
  if train:
    count = x.size // x.shape[-1]
    old, squares = (mean, var), lax.square(wide)
    mean = lax.reduce_sum(wide, (0, 1, 2)) / count
    var = lax.reduce_sum(squares, (0, 1, 2)) / count - lax.square(mean)
    var = lax.max(var, jnp.zeros_like(var))  # rounding can make it negative
    statistics = moved(old, (mean, var), momentum)
  y = (wide - mean) * (lax.rsqrt(var + epsilon) * scale) + bias
  return y.astype(x.dtype), statistics


def moved(old: tuple[jax.Array, ...], new: tuple[jax.Array, ...], momentum: float) -> tuple[jax.Array, ...]:
  """Moves running statistics towards the statistics of a batch: `momentum` is the share of the old ones."""
  return tuple(momentum * before + (1 - momentum) * now for before, now in zip(old, new, strict=True))
