"""What does not change during a training, worked out once."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from googlenet_jax import runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import datasets, pipeline
from googlenet_jax.data.splits import Dataset
from googlenet_jax.evaluation import statistics
from googlenet_jax.host import sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.training import optimizers


@dataclasses.dataclass(frozen=True)
class Plan:
  """What does not change during a training."""

  config: ConfigDict
  workdir: pathlib.Path
  dataset: Dataset
  mesh: Mesh
  classifier: Classifier  # the compiled evaluation; it holds no weights
  statistics_step: Callable[..., Any] | None  # None without batch normalisation, see evaluation/statistics.py
  steps_per_epoch: int
  last_step: int
  learning_rate_fn: optax.Schedule
  tx: optax.GradientTransformation

  def ends_epoch(self, step: int) -> bool:
    """Returns whether `step` is the last one of an epoch or of the run."""
    return step % self.steps_per_epoch == 0 or step == self.last_step

  def evaluates(self, step: int) -> bool:
    """Returns whether an evaluation follows `step`."""
    return step % (self.config.evaluate_every_epochs * self.steps_per_epoch) == 0 or step == self.last_step

  def saves(self, step: int) -> bool:
    """Returns whether a checkpoint follows `step`."""
    every = self.config.checkpoint_every_steps
    return self.evaluates(step) or bool(every and step % every == 0)

  def checkpoints_at_once(self, step: int) -> int:
    """Returns how many checkpoints are on disk at most from `step` on: those that are kept, and the next one."""
    most = 3 if self.dataset.validation is None else 4
    come = (later for later in range(step + 1, self.last_step + 1) if self.saves(later))
    return sum(1 for _ in itertools.islice(come, most))

  def evaluated(self) -> tuple[str, ...]:
    """Returns what an evaluation adds to `metrics.jsonl`, as `split` of its records."""
    splits = ('test',) if self.dataset.validation is None else ('validation', 'test')
    return tuple(split + raw for split in splits for raw in (('', '_raw') if self.config.average_decay else ('',)))

  def epochs_without_better(self, accuracies: dict[int, float]) -> int:
    """Returns how many whole epochs ago the validation accuracy was best, at the newest validation.

    Args:
      accuracies: accuracy on the validation images by step.
    """
    if not accuracies:
      return 0
    best = max(accuracies, key=lambda step: (accuracies[step], -step))  # the first one of equals
    return (max(accuracies) - best) // self.steps_per_epoch

  def stops_early(self, accuracies: dict[int, float]) -> bool:
    """Returns whether `early_stopping` ends the run after the newest validation."""
    return 0 < self.config.early_stopping <= self.epochs_without_better(accuracies)


def make_plan(config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, dataset: Dataset | None) -> Plan:
  """Loads the data set, and works out the length of the run, its learning rate and its optimizer.

  Raises:
    UserError: something that the user can correct.
  """
  sharding.check_divides(config.batch_size, mesh, config.micro_batches)
  dataset = dataset or datasets.load(**config.data, **runs.data_of([workdir]))
  if config.early_stopping and dataset.validation is None:
    raise UserError(
      f'config.early_stopping={config.early_stopping} needs validation images, and {dataset.name} has none'
    )
  steps_per_epoch = pipeline.steps_per_epoch(len(dataset.train), config.batch_size)
  last_step = config.epochs * steps_per_epoch
  learning_rate_fn = optimizers.learning_rate_schedule(config, steps_per_epoch)
  classifier = Classifier(config, dataset.class_names, dataset.image_shape[-1], [], mesh)
  has_statistics = config.model.norm == 'batch'
  return Plan(
    config,
    workdir,
    dataset,
    mesh,
    classifier,
    statistics.make_statistics_step(classifier.graphdef, config, mesh) if has_statistics else None,
    steps_per_epoch,
    min(last_step, config.max_steps) if config.max_steps else last_step,
    learning_rate_fn,
    optimizers.make_optimizer(config, learning_rate_fn),
  )
