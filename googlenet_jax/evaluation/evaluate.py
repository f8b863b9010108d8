"""Exact evaluation: every image of a split counts once, whatever the batch size; crops and ensembles by the paper."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from googlenet_jax.data import crops, pipeline
from googlenet_jax.data.splits import Split
from googlenet_jax.host import sharding


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What a network, or several, said of every image, in the order of the split."""

  labels: np.ndarray  # int32 [N]
  log_probabilities: np.ndarray  # float32 [N, num_classes]

  @functools.cached_property
  def predictions(self) -> np.ndarray:
    """int64 `[N]`."""
    return self.log_probabilities.argmax(-1)

  @property
  def confidences(self) -> np.ndarray:
    """float32 `[N]`: probability of the prediction."""
    return np.exp(self.log_probabilities.max(-1))

  @property
  def accuracy(self) -> float:
    """Share of the images that were named rightly."""
    return float(np.mean(self.predictions == self.labels))

  def error(self, top: int = 1) -> float:
    """Share of the images whose class is not among the `top` likeliest."""
    likeliest = np.argsort(-self.log_probabilities, axis=-1, kind='stable')[:, :top]  # of equal ones the first
    return 1 - float(np.mean((likeliest == self.labels[:, None]).any(-1)))

  @property
  def loss(self) -> float:
    """Mean cross-entropy in nats."""
    own = np.take_along_axis(self.log_probabilities, self.labels[:, None], axis=1)
    return float(-np.mean(own, dtype=np.float64))

  @property
  def confusion(self) -> np.ndarray:
    """int64 `[num_classes, num_classes]`: row, the true class; column, the prediction."""
    classes = self.log_probabilities.shape[1]
    flat = self.labels.astype(np.int64) * classes + self.predictions
    return np.bincount(flat, minlength=classes**2).reshape(classes, classes)

  @property
  def per_class_accuracy(self) -> np.ndarray:
    """float64 `[num_classes]`; NaN for a class without images."""
    confusion = self.confusion
    with np.errstate(invalid='ignore'):
      return np.diag(confusion) / confusion.sum(axis=1)


def together(evaluations: Sequence[Evaluation]) -> Evaluation:
  """What an ensemble says: the mean of its members' probabilities."""
  log_sum = functools.reduce(np.logaddexp, [e.log_probabilities for e in evaluations])
  return Evaluation(evaluations[0].labels, log_sum - np.float32(np.log(len(evaluations))))


def make_eval_step(graphdef: nnx.GraphDef, config: Any, mesh: Mesh, crop_count: int = 1) -> Callable[..., Any]:
  """Builds the jitted step `((params, batch_stats), batch) -> log-probabilities`, float32 `[B, num_classes]`."""

  def step(variables, batch):
    network = nnx.merge(graphdef, *variables)
    return crops.log_probabilities(network, batch, crop_count, config.image_size, config.augment)

  sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(sharding.AXIS)), out_specs=P(sharding.AXIS))
  # Whole on every device, so that every process can read all of it.
  return jax.jit(sharded, out_shardings=NamedSharding(mesh, P()))


def evaluate(
  eval_step: Callable[..., Any], networks: Sequence[tuple[Any, Any]], split: Split, batch_size: int, mesh: Mesh
) -> list[Evaluation]:
  """Runs networks over every image of a split; each batch is gathered once, for all of them.

  Args:
    eval_step: from `make_eval_step`.
    networks: `params` and `batch_stats` of each.
    split: images and labels.
    batch_size: over all devices; the last batch is filled up and the filling dropped.
    mesh: devices.

  Returns:
    The evaluation of each network.
  """
  outputs, ahead = [], sharding.steps_ahead()
  for batch in pipeline.eval_batches(split, batch_size, mesh):
    for variables in networks:
      outputs.append(eval_step(variables, batch))
      if len(outputs) > ahead:
        outputs[-1 - ahead] = jax.device_get(outputs[-1 - ahead])  # or a large split would fill the device
  outputs = jax.device_get(outputs)
  own = (np.concatenate(outputs[i :: len(networks)])[: len(split)] for i in range(len(networks)))
  return [Evaluation(split.labels, log_probabilities) for log_probabilities in own]
