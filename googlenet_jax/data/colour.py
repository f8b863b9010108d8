"""Random changes of brightness, contrast and colour in training: the paper's photometric distortions.

Each example has its own random key; see `random_keys`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from googlenet_jax.data import random_keys

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in PIL's conversion to grey
# Columns are the principal components of ImageNet's colours times their standard deviations (Krizhevsky et al., 2012).
LIGHT = (
  (-0.1234, 0.0135, 0.0018),
  (-0.1263, -0.0001, -0.0037),
  (-0.1269, -0.0131, 0.0019),
)


def enhance(image: jax.Array, operation: jax.Array, factor: jax.Array) -> jax.Array:
  """Changes brightness, contrast or colour by a factor, as PIL's ImageEnhance.

  Args:
    image: float32 `[H, W, C]` in [0, 1].
    operation: int32 scalar: 0 for brightness, 1 for contrast, 2 for colour.
    factor: float32 scalar; 1 changes nothing.

  Returns:
    float32 `[H, W, C]` in [0, 1].
  """
  grey = jnp.matmul(image, jnp.array(LUMA), precision=lax.Precision.HIGHEST) if image.shape[-1] == 3 else image.mean(-1)
  towards = [jnp.zeros_like(image), jnp.broadcast_to(grey.mean(), image.shape)]
  towards += [jnp.broadcast_to(grey[..., None], image.shape)]
  other = sum(jnp.where(operation == i, t, 0) for i, t in enumerate(towards))
  return jnp.clip(other + factor * (image - other), 0, 1)


def light(image: jax.Array, deviation: float, keys: jax.Array) -> jax.Array:
  """Changes the colour and brightness of the light: adds one random colour to the whole image.

  Source: Krizhevsky et al., "ImageNet classification with deep convolutional neural networks", 2012, section 4.1.

  Args:
    image: float32 `[B, H, W, 3]` in [0, 1].
    deviation: standard deviation of the normal distribution; 0.1 in the source.
    keys: typed keys `[B]`.

  Returns:
    float32 `[B, H, W, 3]` in [0, 1].
  """
  amounts = deviation * jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
  return jnp.clip(image + jnp.matmul(amounts, jnp.array(LIGHT).T, precision=lax.Precision.HIGHEST)[:, None, None], 0, 1)


def photometric(image: jax.Array, strength: float, keys: jax.Array) -> jax.Array:
  """Changes brightness, contrast and colour by random factors in random order, then applies `light`.

  The factors are uniform in [1 - strength, 1 + strength]; Howard's strength is 1/2. Images that do not have three
  channels count as grey: only their brightness and contrast change.

  Source: Howard, "Some improvements on deep convolutional neural network based image classification", 2013, which the
  paper cites.

  Args:
    image: float32 `[B, H, W, C]` in [0, 1].
    strength: in [0, 1].
    keys: typed keys `[B]`.

  Returns:
    float32 `[B, H, W, C]` in [0, 1].
  """
  colour = image.shape[-1] == 3
  operations = 3 if colour else 2

  def one(image, factor_key, order_key):
    factors = jax.random.uniform(factor_key, (operations,), minval=1 - strength, maxval=1 + strength)
    for operation in jax.random.permutation(order_key, operations):
      image = enhance(image, operation, factors[operation])
    return image

  image = jax.vmap(one)(image, random_keys.stream(keys, 0), random_keys.stream(keys, 1))
  return light(image, 0.2 * strength, random_keys.stream(keys, 2)) if colour else image
