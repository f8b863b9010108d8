"""Which checkpoints are kept: the two newest, and the one with the best validation accuracy."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers


def best(steps: Sequence[int], accuracies: dict[int, float]) -> int | None:
  """Returns the step with the highest accuracy, the last of equal ones; None if no step was validated."""
  validated = [step for step in steps if step in accuracies]
  return max(validated, key=lambda step: (accuracies[step], step), default=None)


@dataclasses.dataclass
class TwoNewestAndBest(checkpoint_managers.PreservationPolicy):
  """Says to Orbax which checkpoints to keep."""

  accuracies: dict[int, float]  # read at each save

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Returns for each checkpoint whether it is kept."""
    steps = [checkpoint.step for checkpoint in checkpoints]  # ascending
    kept = {*steps[-2:], best(steps, self.accuracies)}
    return [step in kept for step in steps]
