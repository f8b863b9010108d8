"""Adds up what the steps of a training report, and turns the sums into records and lines."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from googlenet_jax.data import pipeline
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.host import console, files, progress, sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.training import feed
from googlenet_jax.training.metrics import Metrics
from googlenet_jax.training.plan import Plan

DIVERGED = 'diverged.json'
NAMED = 5  # images of a bad batch in the message; the file has all


def new_meta(config: ConfigDict) -> dict[str, Any]:
  """Returns the counts of a run that has not begun. Every checkpoint holds them."""
  counts = {'train_seconds': 0.0, 'train_examples': 0, 'compile_seconds': 0.0, 'skipped_updates': 0}
  return {**counts, 'epoch_sums': Metrics.zero().to_json(), 'epochs': config.epochs}


class Tally:
  """The counts of a run, on the host."""

  def __init__(self, plan: Plan, meta: dict[str, Any], seed: int, newest: Callable[[], str]):
    """Begins where a run stands.

    Args:
      plan: what does not change.
      meta: see `new_meta`; the log points change it.
      seed: decides the order of images.
      newest: returns a sentence that names the newest checkpoint.
    """
    self.plan, self.meta, self.watch = plan, meta, progress.Stopwatch()
    self._seed, self._newest, self._ahead = seed, newest, sharding.steps_ahead()
    self.epoch = Metrics(**meta['epoch_sums'])  # sums since the epoch began
    self._recent: list[Metrics] = []  # one for each call since the last log point, on the devices

  def add(self, metrics: Metrics) -> None:
    """Takes what a call of the step returns, without waiting for it. The host runs only a few calls ahead."""
    self._recent.append(metrics)
    if len(self._recent) > self._ahead:
      jax.block_until_ready(self._recent[-1 - self._ahead].count)

  def is_ahead_of_log(self) -> bool:
    """Returns whether there are steps since the last log point."""
    return bool(self._recent)

  def log_point(self, step: int) -> dict[str, Any] | None:
    """Adds up the steps since the last log point, and stops the watch.

    Args:
      step: steps taken.

    Returns:
      The record with the means over these steps; None if `skip_nonfinite` left all of them out.

    Raises:
      UserError: the loss of a step was not finite, or a whole epoch was left out.
    """
    steps, interval = Metrics.by_step(self._recent), Metrics.zero()  # waits for the devices
    seconds = self.watch.stop()
    self._recent.clear()
    for number, metrics in enumerate(steps, start=step - len(steps)):
      if not metrics.is_finite():
        raise UserError(self._diverged(number, 'the loss is'))
      self.epoch = (Metrics.zero() if number % self.plan.steps_per_epoch == 0 else self.epoch).add(metrics)
      interval = interval.add(metrics)
    if self.plan.ends_epoch(step) and not self.epoch.count:
      raise UserError(
        f'step {step}: no update of this epoch had a finite loss and gradient, so all were left out. '
        f'Lower --config.learning_rate, in a new --workdir. {self._newest()}'
      )
    self.meta['train_seconds'] += seconds
    self.meta['train_examples'] += interval.count
    self.meta['skipped_updates'] = self.meta.get('skipped_updates', 0) + (interval.skipped or 0)
    self.meta['epoch_sums'] = self.epoch.to_json()
    if not interval.count:
      return None
    record = make_record(self.plan, step, 'train', interval.mean(), interval.count / seconds)
    return record | feed.decoding_speed(self.plan.dataset.train, self.plan.config.batch_size)

  def check_weights(self, step: int, params: Any) -> None:
    """Raises UserError if weights are not finite. The last update did it: after an earlier one, the loss shows it.

    With `skip_nonfinite` an earlier update, which was finite itself, may have done it: those after it are left out.

    Args:
      step: steps taken.
      params: trees of weights.
    """
    if all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
      return
    if not self.plan.config.skip_nonfinite:
      raise UserError(self._diverged(step - 1, 'its update makes weights that are'))
    rate = float(self.plan.learning_rate_fn(step - 1))
    raise UserError(
      f'step {step}: the weights are not finite, at a learning rate of {rate:g}; not saved. Updates left out so far: '
      f'{self.meta["skipped_updates"]}. Lower --config.learning_rate, in a new --workdir. {self._newest()}'
    )

  def _diverged(self, number: int, what: str) -> str:
    """Says which batch led to something that is not finite, and writes all its images to DIVERGED.

    Args:
      number: steps before that of the batch.
      what: subject and verb.
    """
    split, rate = self.plan.dataset.train, float(self.plan.learning_rate_fn(number))
    indices = pipeline.train_indices(number, len(split), self.plan.config.batch_size, self._seed).tolist()
    content = {'step': number + 1, 'learning_rate': rate, 'images': indices}
    if split.files is not None:
      content['files'] = [split.name_of(index) for index in indices]
    path = self.plan.workdir / DIVERGED
    with console.side_output(str(path)):
      files.write_json(path, content)
    named = ', '.join(map(str, content.get('files', indices)[:NAMED])) + ', ...' * (len(indices) > NAMED)
    return (
      f'step {number + 1}: {what} not finite, at a learning rate of {rate:g}. '
      f'Its batch has the training images {named} (all of them: {path}). '
      'Lower --config.learning_rate, or set --config.clip_norm=1, in a new --workdir; if only single batches are bad, '
      f'leave them out with --config.skip_nonfinite. {self._newest()}'
    )


def make_record(plan: Plan, step: int, split: str, means: dict[str, float], speed: float) -> dict[str, Any]:
  """Makes a line of `metrics.jsonl`, see `runs.RECORD`."""
  loss, accuracy, *_ = means.values()
  return {
    'step': step,
    'epoch': step / plan.steps_per_epoch,
    'split': split,
    'loss': loss,
    'accuracy': accuracy,
    'learning_rate': float(plan.learning_rate_fn(step - 1)),  # the rate of the last step
    'examples_per_second': speed,
    **{name: value for name, value in means.items() if name.startswith('loss_')},
  }


def epoch_line(epoch: float, train: Metrics, evaluations: dict[str, Evaluation], bottleneck: str = '') -> str:
  """Says how an epoch went."""
  means = train.mean()
  parts = [f'train loss {means["loss"]:.3f}, acc {means["accuracy"]:.4f}']
  if train.skipped:
    parts.append(f'{train.skipped} updates were not finite and are left out')
  for name, found in evaluations.items():
    if name.endswith('_raw'):
      parts[-1] += f' (raw weights {found.accuracy:.4f})'
    else:
      parts.append(f'{name} loss {found.loss:.3f}, acc {found.accuracy:.4f}')
  return f'epoch {epoch:.4g}: ' + '; '.join([*parts, bottleneck] if bottleneck else parts)
