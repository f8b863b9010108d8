"""Random keys: one for each example, made from (seed, step, position in the global batch), and a stream for each use.

Nothing else changes a key, except that a choice for all epochs has the index of the image in the place of step and
position. A batch is therefore the same for any number of devices, and in a run that was interrupted.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Numbers of the streams. Add new ones at the end: other numbers would change the results of every recipe.
SHIFT, FLIP, DROPOUT, CROP, PHOTOMETRIC, ERASING, CUTMIX, MIXUP, ALTERNATING = range(9)
EVERY_STEP = 2**32 - 1  # in the place of a step, for choices that do not change with it; no run has so many steps


def example_keys(seed: int | jax.Array, step: jax.Array, positions: jax.Array) -> jax.Array:
  """Makes one key for each example; use it through `stream`.

  Args:
    seed: seed of the run.
    step: int32 scalar, number of steps before this one.
    positions: int32 `[B]`, positions of the examples in the global batch.

  Returns:
    Typed keys `[B]`.
  """
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


def image_keys(seed: int | jax.Array, index: jax.Array) -> jax.Array:
  """Makes one key for each image of the training split, the same in every epoch; use it through `stream`.

  Args:
    seed: seed of the run.
    index: int32 `[B]`, indices of the images in the training split.

  Returns:
    Typed keys `[B]`.
  """
  return example_keys(seed, jnp.uint32(EVERY_STEP), index)


def stream(keys: jax.Array, number: int) -> jax.Array:
  """Derives keys `[B]` for one use from keys `[B]`. Different numbers give independent keys."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def sampling_seed(seed: int, member: int) -> int:
  """Returns the seed of order, augmentation and dropout: the recipe's for member 0, another one for each other member.

  Args:
    seed: seed of the recipe.
    member: number of the network in its ensemble.
  """
  return seed if member == 0 else int(np.random.SeedSequence([seed, member]).generate_state(1)[0] >> 1)
