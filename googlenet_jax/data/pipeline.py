"""Order and batches. A training batch is a pure function of (seed, step): there is no state to save."""

import os
from collections.abc import Iterator

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from googlenet_jax.data.splits import RecordImages, Split
from googlenet_jax.host import sharding
from googlenet_jax.host.errors import UserError

DECODERS = 16  # most threads, each working on its own batch
PREFETCH = 4  # batches prepared ahead; more only costs memory


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
    raise UserError(f'batch_size={batch_size} is larger than the {examples} training images: make it smaller')
  return examples // batch_size


def train_order(
  examples: int, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
  """Returns the indices of this process's share of every batch.

  Each epoch is a new permutation. Shares are contiguous parts of the batch: the global batch is the same for any number
  of processes.

  Args:
    examples: number of training examples.
    batch_size: over all processes.
    seed: seed of the order.
    process_index: number of this process.
    process_count: number of processes.

  Returns:
    Data set whose element `step` is int `[batch_size / process_count]`.
  """
  share = batch_size // process_count
  mine = slice(process_index * share, (process_index + 1) * share)
  return (
    grain.MapDataset.range(examples)
    .seed(seed)
    .shuffle()
    .batch(batch_size, drop_remainder=True)
    .repeat()
    .map(lambda indices: indices[mine])
  )


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
    `image` uint8 `[B, H, W, C]`, `label` int32 `[B]`; see `Split.batch`.
  """
  order = train_order(len(split), batch_size, seed, jax.process_index(), jax.process_count())
  batches = _gathered_ahead(order, split)
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
  share = batch_size // jax.process_count()
  mine = jax.process_index() * share + np.arange(share)

  def indices(start):
    return np.where(start + mine < len(split), start + mine, 0)

  for batch in _gathered_ahead(grain.MapDataset.range(0, len(split), batch_size).map(indices), split):
    yield sharding.shard_batch(batch, mesh)


def _gathered_ahead(order: grain.MapDataset, split: Split) -> grain.DatasetIterator:
  """Iterates over the batches for an order of indices, prepared by threads."""
  # One thread is enough for images in memory. Images on disk must be decoded.
  threads = min(os.cpu_count() or 1, DECODERS) if isinstance(split.images, RecordImages) else 1
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(PREFETCH, threads))
  return iter(order.map(split.batch).to_iter_dataset(options))
