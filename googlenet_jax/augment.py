"""From stored uint8 images to the network's input, on the device, inside the jitted step.

Every random choice is keyed by example: `example_keys` depends on (seed, step, position in the global batch) and on
nothing else, so that a batch looks the same however many devices share it and however often the run was interrupted.
"""

import jax
import jax.numpy as jnp
from jax import lax


def example_keys(seed: int, step: jax.Array, positions: jax.Array) -> jax.Array:
  """Typed keys `[B]`, one an example.

  Args:
    seed: of the run.
    step: int32 scalar, the number of steps taken before this one.
    positions: int32 `[B]`, positions of the examples in the global batch.

  Returns:
    Keys to fold further numbers into, one for each use.
  """
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


def prepare(image: jax.Array, image_size: int, padding: int = 0) -> jax.Array:
  """Scales to [0, 1], resizes bilinearly (half-pixel centres, antialiased when shrinking, as PIL), pads with zeros.

  Args:
    image: uint8 `[B, H, W, C]`.
    image_size: side of the result in pixels.
    padding: pixels of zeros on each side, part of `image_size`.

  Returns:
    float32 `[B, image_size, image_size, C]` in [0, 1].
  """
  batch, height, width, channels = image.shape
  side = image_size - 2 * padding
  image = image.astype(jnp.float32) / 255
  if (height, width) != (side, side):
    # With float32 inputs a GPU or TPU would multiply in lower precision; these products are small.
    image = jax.image.resize(image, (batch, side, side, channels), 'linear', precision=lax.Precision.HIGHEST)
  return jnp.pad(image, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def random_shift(image: jax.Array, most: int, keys: jax.Array) -> jax.Array:
  """Moves each image by a whole number of pixels, uniform in [-most, most] on both axes, zeros coming in.

  Args:
    image: `[B, H, W, C]`.
    most: pixels.
    keys: typed keys `[B]`.

  Returns:
    `[B, H, W, C]`.
  """
  padded = jnp.pad(image, ((0, 0), (most, most), (most, most), (0, 0)))

  def crop(image_, key):
    top, left = jax.random.randint(key, (2,), 0, 2 * most + 1)
    return lax.dynamic_slice(image_, (top, left, 0), image.shape[1:])

  return jax.vmap(crop)(padded, keys)


def random_flip(image: jax.Array, keys: jax.Array) -> jax.Array:
  """Mirrors each image left to right with probability 1/2.

  Args:
    image: `[B, H, W, C]`.
    keys: typed keys `[B]`.

  Returns:
    `[B, H, W, C]`.
  """
  flip = jax.vmap(jax.random.bernoulli)(keys)
  return jnp.where(flip[:, None, None, None], image[:, :, ::-1], image)


def augment(image: jax.Array, keys: jax.Array, shift: int = 0, flip: bool = False) -> jax.Array:
  """Random shift, then random flip, as far as asked for.

  Args:
    image: `[B, H, W, C]`.
    keys: typed keys `[B]`; each transformation folds a number of its own into them.
    shift: most pixels to move by; 0 for none.
    flip: whether to mirror at random.

  Returns:
    `[B, H, W, C]`.
  """
  fold = jax.vmap(jax.random.fold_in, (0, None))
  if shift:
    image = random_shift(image, shift, fold(keys, 0))
  if flip:
    image = random_flip(image, fold(keys, 1))
  return image
