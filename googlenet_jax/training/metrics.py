"""What training counts: sums over examples. The device makes them; the host adds and divides them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import struct


class Metrics(struct.PyTreeNode):
  """Sums over the examples of one step, or of several.

  `losses['loss']` is the loss of the logits. With auxiliary classifiers there are also their losses,
  'aux_4a' and 'aux_4d', and 'total', which is minimised.
  """

  losses: dict[str, Any]  # float sums
  correct: Any  # int: right answers
  count: Any  # int: examples; without those of skipped updates
  skipped: Any = None  # int: updates that `skip_nonfinite` left out; None if the recipe leaves none out

  @classmethod
  def zero(cls) -> 'Metrics':
    """Sums over no examples."""
    return cls({}, 0, 0)

  @staticmethod
  def by_step(calls: Sequence['Metrics']) -> list['Metrics']:
    """Returns the sums of each step, on the host; those of a call may have a leading axis, one entry for each step."""
    steps = []
    for call in jax.device_get(calls):
      call = jax.tree.map(np.atleast_1d, call)
      steps += [jax.tree.map(lambda values, i=i: values[i], call) for i in range(len(call.count))]
    return steps

  def add(self, other: 'Metrics') -> 'Metrics':
    """Adds sums that are on the host, in double precision."""
    losses = {name: self.losses.get(name, 0.0) + float(value) for name, value in other.losses.items()}
    skipped = self.skipped if other.skipped is None else (self.skipped or 0) + int(other.skipped)
    return Metrics(losses, self.correct + int(other.correct), self.count + int(other.count), skipped)

  def mean(self) -> dict[str, float]:
    """Means over the examples: 'loss', 'accuracy', and with auxiliary classifiers 'loss_total', 'loss_aux_4a', ..."""
    parts = {f'loss_{name}': value / self.count for name, value in self.losses.items() if name != 'loss'}
    return {'loss': self.losses['loss'] / self.count, 'accuracy': self.correct / self.count, **parts}

  def is_finite(self) -> bool:
    """Returns whether every loss is finite; for sums on the host."""
    return all(np.isfinite(value) for value in jax.tree.leaves(self.losses))

  def to_json(self) -> dict[str, Any]:
    """Returns JSON values; `Metrics(**values)` gives the same sums."""
    return dataclasses.asdict(self)
