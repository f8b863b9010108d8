"""Exact evaluation: every image of a split counts once, whatever the batch size."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from googlenet_jax import augment, checkpoints, datasets, input_pipeline, monitor, parallel
from googlenet_jax import config as config_lib
from googlenet_jax.errors import UserError
from googlenet_jax.splits import Split
from googlenet_jax.state import create_state, restore


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What the network said of every image, in the order of the split."""

  labels: np.ndarray  # int32 [N]
  predictions: np.ndarray  # int32 [N]
  losses: np.ndarray  # float32 [N], cross-entropy in nats
  confidences: np.ndarray  # float32 [N], probability of the prediction
  num_classes: int

  @property
  def accuracy(self) -> float:
    """Share of the images that were named rightly."""
    return float(np.mean(self.predictions == self.labels))

  @property
  def loss(self) -> float:
    """Mean cross-entropy in nats."""
    return float(np.mean(self.losses, dtype=np.float64))

  @property
  def confusion(self) -> np.ndarray:
    """int64 `[num_classes, num_classes]`: row, the true class; column, the prediction."""
    flat = self.labels.astype(np.int64) * self.num_classes + self.predictions
    return np.bincount(flat, minlength=self.num_classes**2).reshape(self.num_classes, self.num_classes)

  @property
  def per_class_accuracy(self) -> np.ndarray:
    """float64 `[num_classes]`; NaN for a class without images."""
    confusion = self.confusion
    with np.errstate(invalid='ignore'):
      return np.diag(confusion) / confusion.sum(axis=1)


def make_eval_step(graphdef: nnx.GraphDef, config: Any, mesh: Mesh) -> Callable[..., Any]:
  """Builds the jitted step `(params, batch_stats, batch) -> (predictions, losses, confidences)`, each `[B]`."""

  def step(params, batch_stats, batch):
    image = augment.prepare(batch['image'], config.image_size, config.augment.padding)
    logits = nnx.merge(graphdef, params, batch_stats)(image)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    return logits.argmax(-1).astype(jnp.int32), losses, jax.nn.softmax(logits).max(-1)

  sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P(parallel.AXIS)), out_specs=P(parallel.AXIS))
  # Whole on every device, so that every process can read all of it.
  return jax.jit(sharded, out_shardings=NamedSharding(mesh, P()))


def evaluate(
  eval_step: Callable[..., Any], state: Any, split: Split, batch_size: int, mesh: Mesh, num_classes: int
) -> Evaluation:
  """Runs the network over every image of a split.

  Args:
    eval_step: from `make_eval_step`.
    state: with `params` and `batch_stats`.
    split: images and labels.
    batch_size: over all devices; the last batch is filled up and the filling dropped.
    mesh: devices.
    num_classes: of the data set.

  Returns:
    The evaluation.
  """
  outputs, ahead = [], parallel.steps_ahead()
  for batch in input_pipeline.eval_batches(split, batch_size, mesh):
    outputs.append(eval_step(state.params, state.batch_stats, batch))
    if len(outputs) > ahead:
      jax.block_until_ready(outputs[-1 - ahead])
  columns = [np.concatenate(column)[: len(split)] for column in zip(*jax.device_get(outputs), strict=True)]
  return Evaluation(split.labels, *columns, num_classes)


def evaluate_checkpoint(config: Any, workdir: pathlib.Path, step: int | None, split_name: str) -> None:
  """Evaluates a checkpoint of a run, prints the result and writes `evaluation.json` into the workdir.

  Args:
    config: the recipe of the run.
    workdir: folder of the run.
    step: of the checkpoint; None for the newest.
    split_name: 'train', 'validation' or 'test'.

  Raises:
    UserError: no such checkpoint or split, or another recipe.
  """
  if not (workdir / 'checkpoints').is_dir():
    raise UserError(f'{workdir} holds no checkpoints: train first, or give the --workdir of a run')
  config_lib.check_same(config, workdir, config_lib.FOR_EVALUATION)
  mesh = parallel.make_mesh()
  parallel.check_divides(config.batch_size, mesh)
  dataset = datasets.load(**config.data)
  split = getattr(dataset, split_name)
  if split is None:
    raise UserError('--split=validation: this recipe holds no images out (config.data.validation_examples=0)')
  graphdef, state = create_state(config, len(dataset.class_names), dataset.image_shape[-1], optax.identity(), mesh)
  saved = checkpoints.Checkpoints(workdir, read_only=True)
  restored = restore(saved, state, step, only='network')
  saved.close()
  if restored is None:
    raise UserError(f'{workdir} holds no checkpoint yet: train first')
  state, _ = restored
  eval_step = make_eval_step(graphdef, config, mesh)
  result = evaluate(eval_step, state, split, config.batch_size, mesh, len(dataset.class_names))
  _show(result, dataset.class_names, f'{workdir}, step {int(state.step)}, {len(split)} {split_name} images')
  if jax.process_index() == 0:
    checkpoints.write_json(
      workdir / 'evaluation.json',
      {
        'split': split_name,
        'step': int(state.step),
        'examples': len(split),
        'accuracy': result.accuracy,
        'loss': result.loss,
        'per_class_accuracy': {  # JSON knows no NaN
          name: None if np.isnan(accuracy) else accuracy
          for name, accuracy in zip(dataset.class_names, result.per_class_accuracy.tolist(), strict=True)
        },
        'confusion_matrix': result.confusion.tolist(),
      },
    )
    monitor.say(f'written to {workdir / "evaluation.json"}')


def _show(result: Evaluation, class_names: tuple[str, ...], title: str) -> None:
  monitor.say(title)
  width = max(map(len, class_names))
  monitor.say('accuracy by class, and the confusion matrix (rows: true class, columns: prediction)')
  for name, accuracy, row in zip(class_names, result.per_class_accuracy, result.confusion, strict=True):
    monitor.say(f'  {name:>{width}}  {accuracy:6.4f}  ' + ' '.join(f'{count:5d}' for count in row))
  right = int((result.predictions == result.labels).sum())
  monitor.say(f'accuracy {result.accuracy:.4f} ({right} of {len(result.labels)}), loss {result.loss:.4f}')
