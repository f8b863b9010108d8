"""Batch statistics that fit the weights, for prediction (Wu and Johnson, 2021, "Rethinking 'Batch' in BatchNorm").

The training step keeps running averages of the statistics, as PyTorch does: 90 % old, 10 % new. They lag behind the
weights. While the weights change fast, a network with 57 normalised layers predicts nonsense with them. Training never
reads them. So before an evaluation they are replaced by the statistics of recent training batches at the current
weights.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from googlenet_jax.data import augment, mixing, pipeline, random_keys
from googlenet_jax.data.splits import Split
from googlenet_jax.host import sharding

EXAMPLES = 1024  # digits after one epoch: test loss 1.04 with 512 to 1,408 images, 1.05 to 1.12 with 64


def make_statistics_step(graphdef: nnx.GraphDef, config: ConfigDict, mesh: Mesh) -> Callable[..., Any]:
  """Builds the jitted step `(params, batch_stats, seed, step, epoch, batch) -> batch_stats`, from this batch alone.

  The images are those that the training step `step` sees, mixed if the recipe mixes them; dropout is off. With
  micro-batches, the training step mixed them with other images. Frozen stages keep their statistics.
  """

  def statistics(params, batch_stats, seed, step, epoch, batch):
    batch = augment.with_mirrored(batch, seed, epoch, config.augment)
    keys = random_keys.example_keys(seed, step, jnp.arange(batch['label'].shape[0]))
    network = nnx.merge(graphdef, params, batch_stats)
    network.set_attributes(nnx.BatchNorm, momentum=0.0)
    image, _ = mixing.training_input(batch, keys, config)
    network.end_points(image, True, freeze=config.freeze)
    return nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

  whole = sharding.whole(mesh)
  return jax.jit(statistics, in_shardings=(whole,) * 5 + (sharding.cut(mesh),), out_shardings=whole)


def recompute(
  step_fn: Callable[..., Any],
  networks: list[tuple[Any, Any]],
  split: Split,
  config: ConfigDict,
  seed: int,
  step: int,
  mesh: Mesh,
) -> list[Any]:
  """Returns the batch statistics of each network over recent training batches: those just before `step`.

  The mean is the mean over batches. The variance is the mean variance plus the variance of the means.

  Args:
    step_fn: from `make_statistics_step`.
    networks: `(params, batch_stats)` of each network.
    split: training images.
    config: the recipe.
    seed: seed of the order of images and of augmentation.
    step: number of steps taken. The result is a function of weights, seed and step, so a resumed run gets the same.
    mesh: devices.
  """
  steps_per_epoch = pipeline.steps_per_epoch(len(split), config.batch_size)
  count = min(steps_per_epoch, math.ceil(EXAMPLES / config.batch_size))
  first = max(0, step - count)
  batches = pipeline.train_batches(split, config.batch_size, seed, first, mesh)
  found = [[] for _ in networks]
  for number in range(first, first + count):
    batch = next(batches)
    place = [jnp.int32(value) for value in (seed, number, number // steps_per_epoch)]
    for own, (params, batch_stats) in zip(found, networks, strict=True):
      own.append(step_fn(params, batch_stats, *place, batch))
  return [_combined(own) for own in jax.device_get(found)]


def _combined(batches: list[Any]) -> Any:
  flat = [traverse_util.flatten_dict(batch) for batch in batches]
  combined = {}
  for path, leaf in flat[0].items():
    value = np.mean([one[path] for one in flat], axis=0, dtype=np.float64)
    if path[-1] == 'var':
      value += np.var([one[(*path[:-1], 'mean')] for one in flat], axis=0, dtype=np.float64)
    combined[path] = value.astype(leaf.dtype)
  return traverse_util.unflatten_dict(combined)
