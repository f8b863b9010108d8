"""Crops and resizes in one linear operation, on the device: every pixel of the result is a weighted sum.

Resizing is separable: a resized crop is `rows @ image @ columns.T` with two small matrices. Each image may have its own
matrices and its own size. Images of many sizes lie in the upper left of a common canvas.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

KERNELS = ('linear', 'cubic', 'nearest', 'area')


def _linear(t):
  return jnp.maximum(1 - abs(t), 0)


def _cubic(t):  # Keys (1981) with a = -1/2, as in PIL and jax.image
  t = abs(t)
  near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
  return jnp.where(t < 1, near, jnp.where(t < 2, far, 0))


def sampling_matrix(
  start: jax.Array, extent: jax.Array, size: jax.Array, out: int, length: int, kernel: jax.Array | int = 0
) -> jax.Array:
  """Returns the matrix that resizes the stretch `[start, start + extent)` of a line of pixels to `out` pixels.

  Pixel j covers [j, j + 1). 'linear' and 'cubic' use wider kernels to shrink a line (antialiasing), and read pixels
  outside the stretch, as PIL's `resize(box=...)`. 'nearest' takes the pixel at the centre. 'area' weighs pixels by
  their overlap with the part that becomes one pixel, as in TensorFlow.

  Args:
    start: float, scalar or `[B]`, in pixels.
    extent: float, scalar or `[B]`, in pixels.
    size: pixels of the line that belong to the image, scalar or `[B]`; the others get weight 0.
    out: pixels in the result.
    length: pixels in the line.
    kernel: index into KERNELS, scalar or `[B]`.

  Returns:
    float32 `[out, length]` or `[B, out, length]`. Rows sum to 1; a row without any pixel of the image sums to 0.
  """
  start, extent, size = (jnp.asarray(a, jnp.float32)[..., None, None] for a in (start, extent, size))
  scale = extent / out
  left = start + jnp.arange(out, dtype=jnp.float32)[:, None] * scale  # start of the part that becomes one pixel
  centre, pixel = left + scale / 2, jnp.arange(length, dtype=jnp.float32)
  t = (pixel + 0.5 - centre) / jnp.maximum(scale, 1)
  nearest = pixel == jnp.clip(jnp.floor(centre), 0, size - 1)
  area = jnp.maximum(jnp.minimum(pixel + 1, left + scale) - jnp.maximum(pixel, left), 0)
  choices = (_linear(t), _cubic(t), nearest.astype(jnp.float32), area)
  if isinstance(kernel, int):
    weights = choices[kernel]
  else:
    weights = sum(jnp.where((kernel == k)[..., None, None], choice, 0) for k, choice in enumerate(choices))
  weights = jnp.where(pixel < size, weights, 0)
  total = weights.sum(-1, keepdims=True)
  return weights / jnp.where(total == 0, 1, total)


def resample(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Computes `rows @ image @ columns.T` for each image and channel.

  Args:
    image: float32 `[B, H, W, C]`.
    rows: float32 `[B, h, H]` or `[h, H]`.
    columns: float32 `[B, w, W]` or `[w, W]`.

  Returns:
    float32 `[B, h, w, C]`.
  """
  # By default a GPU or TPU multiplies float32 in lower precision. Full precision costs little in small products.
  multiply = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  rows_letters, columns_letters = ('bnm'[3 - matrix.ndim :] for matrix in (rows, columns))
  image = multiply(f'{rows_letters},bmwc->bnwc', rows, image)
  return multiply(f'{columns_letters},bhmc->bhnc', columns, image)
