"""Order and batches. A training batch is a pure function of (seed, step): nothing about it needs to be saved."""

import os
from collections.abc import Iterator

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from googlenet_jax.data.splits import RecordImages, Split
from googlenet_jax.host import sharding
from googlenet_jax.host.errors import UserError

DECODERS = 16  # threads at most, each at a batch of its own
PREFETCH = 4  # batches gathered ahead by a thread; more only costs memory


def steps_per_epoch(examples: int, batch_size: int) -> int:
  """Full batches in an epoch. The last `examples % batch_size` of each epoch's new order wait for another epoch.

  Raises:
    UserError: the batch is larger than the data.
  """
  if batch_size > examples:
    raise UserError(f'batch_size={batch_size} is larger than the {examples} training images: make it smaller')
  return examples // batch_size


def train_order(
  examples: int, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
  """Indices of this process's share of every batch: `train_order(...)[step]` is int `[batch_size / process_count]`.

  Each epoch is a new permutation. Shares lie side by side, so that the global batch is the same for any number of
  processes.
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
  """Endless training batches from `first_step` on, already on their way to the devices.

  A thread gathers ahead, and the transfer of a batch runs while the step before it computes.

  Args:
    split: images and labels.
    batch_size: over all devices of all processes.
    seed: of the order.
    first_step: steps taken before.
    mesh: devices to cut the batch over.

  Yields:
    `image` uint8 `[B, H, W, C]`, `label` int32 `[B]`; see `Split.batch`.
  """
  order = train_order(len(split), batch_size, seed, jax.process_index(), jax.process_count())
  batches = _gathered_ahead(order, split)
  batches.set_state({'next_index': first_step})
  for batch in batches:
    yield sharding.shard_batch(batch, mesh)


def eval_batches(split: Split, batch_size: int, mesh: Mesh) -> Iterator[dict]:
  """Every example once, in order; the last batch is filled up with the first example.

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
  """The batches of an order of indices, gathered by threads."""
  # Gathering in memory takes one thread; records have to be decoded.
  threads = min(os.cpu_count() or 1, DECODERS) if isinstance(split.images, RecordImages) else 1
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(PREFETCH, threads))
  return iter(order.map(split.batch).to_iter_dataset(options))
