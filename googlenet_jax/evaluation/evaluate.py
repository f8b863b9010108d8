"""Exact evaluation: every image of a split counts once, whatever the batch size."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from googlenet_jax.classifier import Classifier
from googlenet_jax.data import crops, pipeline
from googlenet_jax.data.splits import Split
from googlenet_jax.host import sharding


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The answers of a network or an ensemble to every image of a split, in the order of the split."""

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
  def mistakes(self) -> np.ndarray:
    """int64 `[M]`: indices of the images with a wrong answer, most confident first."""
    wrong = np.flatnonzero(self.predictions != self.labels)
    return wrong[np.argsort(-self.confidences[wrong], kind='stable')]

  @property
  def accuracy(self) -> float:
    """Share of the images whose predicted class is right."""
    return float(np.mean(self.predictions == self.labels))

  def error(self, top: int = 1) -> float:
    """Returns the share of images whose class is not among the `top` likeliest."""
    likeliest = np.argsort(-self.log_probabilities, axis=-1, kind='stable')[:, :top]  # stable: ties in order
    return 1 - float(np.mean((likeliest == self.labels[:, None]).any(-1)))

  @property
  def loss(self) -> float:
    """Mean cross-entropy in nats."""
    own = np.take_along_axis(self.log_probabilities, self.labels[:, None], axis=1)
    return float(-np.mean(own, dtype=np.float64))

  @property
  def confusion(self) -> np.ndarray:
    """int64 `[num_classes, num_classes]`: a row per true class, a column per predicted class."""
    classes = self.log_probabilities.shape[1]
    flat = self.labels.astype(np.int64) * classes + self.predictions
    return np.bincount(flat, minlength=classes**2).reshape(classes, classes)

  def confused_pairs(self, most: int) -> list[tuple[int, int]]:
    """Returns true class and prediction of the most frequent mistakes, most frequent first."""
    counts = self.confusion
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind='stable')[:most]
    return [divmod(int(place), len(counts)) for place in order if wrong.flat[place]]

  @property
  def per_class_accuracy(self) -> np.ndarray:
    """float64 `[num_classes]`; NaN for a class without images."""
    confusion = self.confusion
    with np.errstate(invalid='ignore'):
      return np.diag(confusion) / confusion.sum(axis=1)


def together(evaluations: Sequence[Evaluation]) -> Evaluation:
  """Returns the answers of an ensemble: the mean of its members' probabilities."""
  log_sum = functools.reduce(np.logaddexp, [e.log_probabilities for e in evaluations])
  return Evaluation(evaluations[0].labels, log_sum - np.float32(np.log(len(evaluations))))


def damage(splits: Mapping[str, Split | None]) -> str:
  """Says how many of the pictures that were evaluated could not be read; empty if all could.

  Args:
    splits: by name; None for one that does not exist.
  """
  counts = {name: split.count_damaged() for name, split in splits.items() if split is not None}
  parts = [f'{count:,} of {len(splits[name]):,} {name} pictures' for name, count in counts.items() if count]
  stand_in = 'another picture of its class' if 'train' in counts else 'a black picture'  # see data/decoding.py
  return f'note: {" and ".join(parts)} cannot be read: each counts as {stand_in}' if parts else ''


def evaluate(
  classifier: Classifier, split: Split, crop_count: int = 1, before_batch: Callable[[], None] = lambda: None
) -> list[Evaluation]:
  """Runs every network of a classifier over every image of a split.

  Each batch is gathered once for all networks. The last batch is filled up; answers to the filling are dropped.

  Args:
    classifier: the networks, and the devices that run them.
    split: images and labels.
    crop_count: crops or views per image, one of `crops.COUNTS`.
    before_batch: called before each batch; it may raise an error to end the evaluation.

  Returns:
    One evaluation per network; `together` combines them.
  """
  mesh, networks = classifier.mesh, classifier.networks
  batch_size = crops.batch_size(classifier.batch_size, crop_count, mesh.size)
  step = classifier.predict_step(crop_count)
  outputs, ahead = [], sharding.steps_ahead()
  for batch in pipeline.eval_batches(split, batch_size, mesh):
    before_batch()
    for variables in networks:
      outputs.append(step(variables, batch))
      if len(outputs) > ahead:
        outputs[-1 - ahead] = jax.device_get(outputs[-1 - ahead])  # otherwise a large split would fill the device
  outputs = jax.device_get(outputs)
  own = (np.concatenate(outputs[i :: len(networks)])[: len(split)] for i in range(len(networks)))
  return [Evaluation(split.labels, log_probabilities) for log_probabilities in own]
