"""Random keys, one an example: (seed, step, position in the global batch), and a stream for each use.

A batch looks the same however many devices share it and however often the run was interrupted, because nothing else
enters.
"""

import jax

SHIFT, FLIP, DROPOUT, CROP, PHOTOMETRIC, ERASING = range(6)  # streams of an example's key


def example_keys(seed: int | jax.Array, step: jax.Array, positions: jax.Array) -> jax.Array:
  """Typed keys `[B]`, one an example.

  Args:
    seed: of the run.
    step: int32 scalar, the number of steps taken before this one.
    positions: int32 `[B]`, positions of the examples in the global batch.

  Returns:
    Keys to take a stream of for each use.
  """
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


def stream(keys: jax.Array, number: int) -> jax.Array:
  """Keys `[B]` for one use of the keys `[B]`; independent of those of any other number."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, number)
