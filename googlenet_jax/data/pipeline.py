"""Order and batches. A training batch is a pure function of (seed, step): there is no state to save."""

import functools
from collections.abc import Iterator

import grain
import numpy as np
from jax.sharding import Mesh

from googlenet_jax.data import decoding
from googlenet_jax.data.splits import Split
from googlenet_jax.host import processes, sharding
from googlenet_jax.host.errors import UserError

PREFETCH = 4  # batches prepared ahead; more only costs memory
PREFETCH_BYTES = 10**9  # they take no more than this; one batch is always prepared
NO_END = 2**31 - 1  # steps: more than anybody takes


def steps_per_epoch(examples: int, batch_size: int) -> int:
  """Returns the number of full batches in an epoch.

  Each epoch leaves out the last `examples % batch_size` of its own new order.

  Args:
    examples: number of training examples.
    batch_size: over all devices.

  Returns:
    At least 1.

  Raises:
    UserError: the batch is larger than the data.
  """
  if batch_size > examples:
    raise UserError(
      f'batch_size={batch_size} is larger than the {examples} training images: make it smaller, such as '
      f'--config.batch_size={max(1, examples // 2)}'
    )
  return examples // batch_size


def train_indices(step: int, examples: int, batch_size: int, seed: int) -> np.ndarray:
  """Returns the training examples of one batch. Each epoch is a new permutation of all examples.

  Args:
    step: number of steps before this one.
    examples: number of training examples.
    batch_size: over all devices of all processes.
    seed: seed of the order.

  Returns:
    int32 `[batch_size]`.
  """
  epoch, number = divmod(step, examples // batch_size)
  return _permutation(examples, seed, epoch)[number * batch_size : (number + 1) * batch_size]


@functools.lru_cache(maxsize=4)
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
  """The order of an epoch. Sorting random numbers is used because NumPy guarantees the numbers, not its shuffles."""
  return np.random.Philox(key=[seed, epoch]).random_raw(examples).argsort(kind='stable').astype(np.int32)


def my_share(indices: np.ndarray) -> np.ndarray:
  """Returns this process's part of a batch, `[.., batch_size / processes]` of `[.., batch_size]`."""
  return np.split(indices, processes.count(), axis=-1)[processes.index()]


def train_batches(split: Split, batch_size: int, seed: int, first_step: int, mesh: Mesh) -> Iterator[dict]:
  """Yields training batches without end, from `first_step` on.

  Threads prepare batches ahead. The transfer to the devices runs while the previous step computes.

  Args:
    split: images and labels.
    batch_size: over all devices of all processes.
    seed: seed of the order.
    first_step: number of steps before the first batch.
    mesh: devices that share the batch.

  Yields:
    `image` uint8 `[B, H, W, C]`, `label` int32 `[B]`, `index` int32 `[B]`, the place in the split; see `Split.batch`.
  """

  def gather(step):
    indices = my_share(train_indices(step, len(split), batch_size, seed))
    return {**split.batch(indices), 'index': indices}

  batches = _prepared_ahead(grain.MapDataset.range(NO_END).map(gather), split, batch_size)
  batches.set_state({'next_index': first_step})
  for batch in batches:
    yield sharding.shard_batch(batch, mesh)


def eval_batches(split: Split, batch_size: int, mesh: Mesh) -> Iterator[dict]:
  """Yields every example once, in order. Copies of the first example fill the last batch.

  Args:
    split: images and labels.
    batch_size: over all devices of all processes.
    mesh: devices that share the batch.

  Yields:
    `image` uint8 `[B, H, W, C]`, `label` int32 `[B]`; see `Split.batch`.
  """
  share = batch_size // processes.count()
  mine = processes.index() * share + np.arange(share)

  def gather(start):
    return split.batch(np.where(start + mine < len(split), start + mine, 0))

  for batch in _prepared_ahead(grain.MapDataset.range(0, len(split), batch_size).map(gather), split, batch_size):
    yield sharding.shard_batch(batch, mesh)


def ahead(split: Split, batch_size: int) -> tuple[int, int]:
  """Returns how many threads prepare batches, and how many batches they prepare ahead.

  Args:
    split: images and labels.
    batch_size: over all devices of all processes.
  """
  # One thread is enough for images in memory. Images on disk must be decoded.
  threads = 1 if split.in_memory else decoding.threads()
  fitting = PREFETCH_BYTES // (split.bytes_each * (batch_size // processes.count()))
  count = max(1, min(fitting, max(PREFETCH, threads)))
  return min(threads, count), count


def _prepared_ahead(batches: grain.MapDataset, split: Split, batch_size: int) -> grain.DatasetIterator:
  """Iterates over the batches of a split, prepared by threads."""
  threads, count = ahead(split, batch_size)
  return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=count)))
