"""Checkpoints of a run. Orbax writes them in the background; checksums find damage that Orbax does not.

The two newest are kept, so damage to one loses no run. The one with the best validation accuracy is kept too.
"""

import contextlib
import dataclasses
import pathlib
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from googlenet_jax.host import console
from googlenet_jax.host.errors import UserError

BEST = 'best'
# Orbax has one counter for all saves of a process. Two saves at once mix up their answers, lose files or wait forever.
_one_save = threading.Lock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences Orbax's warnings about our options, such as that a read-only manager saves nothing."""
  level = logging.get_verbosity()
  logging.set_verbosity(min(level, logging.ERROR))
  yield
  logging.set_verbosity(level)


class DamagedError(Exception):
  """The checkpoint cannot be read, or does not hold what was written."""


def _best(steps: Sequence[int], accuracies: dict[int, float]) -> int | None:
  """Returns the step with the highest accuracy, the last of equal ones; None if no step was validated."""
  validated = [step for step in steps if step in accuracies]
  return max(validated, key=lambda step: (accuracies[step], step), default=None)


@dataclasses.dataclass
class _TwoNewestAndBest(checkpoint_managers.PreservationPolicy):
  """Says to Orbax which checkpoints to keep."""

  accuracies: dict[int, float]  # read at each save

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    steps = [checkpoint.step for checkpoint in checkpoints]  # ascending
    kept = {*steps[-2:], _best(steps, self.accuracies)}
    return [step in kept for step in steps]


class Checkpoints:
  """The checkpoints of one run, in `workdir/checkpoints`."""

  def __init__(
    self,
    workdir: pathlib.Path,
    accuracies: dict[int, float] | None = None,
    read_only: bool = False,
    one_at_a_time: bool = False,
  ):
    """Opens the folder, and makes it if it is missing.

    Args:
      workdir: folder of the run.
      accuracies: accuracy on the validation images after a step, see `runs.validation_accuracies`. The best checkpoint
        is kept. A step is saved before it is validated, so the training adds to this dict.
      read_only: change nothing in the folder. What looks like a killed save may be a save in progress.
      one_at_a_time: for threads that save several runs. Each save waits for its turn, and until it is on disk.
    """
    self.directory = workdir.resolve() / 'checkpoints'
    self.read_only = read_only
    self._accuracies = {} if accuracies is None else accuracies
    self._one_at_a_time = one_at_a_time
    with _quiet():
      options = ocp.CheckpointManagerOptions(
        preservation_policy=_TwoNewestAndBest(self._accuracies),
        cleanup_tmp_directories=not read_only,
        create=not read_only,
        read_only=read_only,
      )
      self._manager = ocp.CheckpointManager(self.directory, options=options)

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def best(self) -> int:
    """Returns the step with the highest validation accuracy.

    Raises:
      UserError: no checkpoint was validated.
    """
    step = _best(self.steps(), self._accuracies)
    if step is None:
      raise UserError(
        f'no checkpoint in {self.directory} has a validation accuracy: the recipe holds out no images '
        '(config.data.validation_examples=0). Give --step=N, or leave --step out for the newest'
      )
    return step

  def is_fresh(self, step: int) -> bool:
    """Returns whether the batch statistics of a checkpoint fit its weights, see `save`."""
    meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    if 'fresh' not in meta:  # saved by version 0.2.0 or older
      meta = self._manager.metrics(step) or {}
    return bool(meta.get('fresh'))

  def save(self, step: int, items: dict[str, Any], meta: dict[str, Any], fresh: bool = True) -> None:
    """Writes a checkpoint, in the background unless `one_at_a_time`. Does nothing if the step is saved already.

    Args:
      step: number of steps taken.
      items: trees of arrays; each can be restored without the others.
      meta: JSON values to save with the items.
      fresh: whether the batch statistics fit the weights, see `evaluation/statistics.py`.

    Raises:
      UserError: a weight is not finite, or writing fails.
    """
    if step in self._manager.all_steps():
      return
    digest, bad = _digest(items)
    if bad:
      raise UserError(f'step {step}: {bad[0]} is not finite; not saved. Lower the learning rate. {self.newest()}')
    arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    meta = {**meta, 'fresh': fresh, 'crc32': digest}
    arguments = ocp.args.Composite(**arguments, meta=ocp.args.JsonSave(meta))
    with _one_save if self._one_at_a_time else contextlib.nullcontext():
      try:
        taken = self._manager.save(step, args=arguments)
      except Exception as error:  # perhaps an error of the previous save, from its thread
        raise UserError(f'step {step} could not be saved in {self.directory}: {_reason(error)}') from error
      if self._one_at_a_time:
        self.wait()
    if not taken:  # Orbax refuses a step older than its newest
      raise UserError(f'step {step} could not be saved in {self.directory}: step {self.steps()[0]} is there already')

  def restore(self, items: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads one checkpoint and checks it against its checksums.

    Args:
      items: the items to read, as trees of `jax.ShapeDtypeStruct` with shardings.
      step: step of the checkpoint.

    Returns:
      The items on their devices, and the `meta` that was saved.

    Raises:
      DamagedError: files are missing, unreadable or changed.
    """
    arguments = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(**arguments, meta=ocp.args.JsonRestore()))
    except Exception as error:  # Orbax raises bare Exception for damaged files
      first = (str(error).strip() or type(error).__name__).splitlines()[0]
      raise DamagedError(f'checkpoint {step} in {self.directory} cannot be read ({first[:150]})') from error
    written = restored.meta.pop('crc32')
    restored.meta.pop('fresh', None)
    found = {name: restored[name] for name in items}
    changed = [name for name, crc in _digest(found)[0].items() if written.get(name) != crc]
    if changed:
      raise DamagedError(f'checkpoint {step} in {self.directory} is damaged: {changed[0]} is not what was saved')
    return found, restored.meta

  def restore_whole(
    self, items: dict[str, Any], step: int | str | None = None, fresh_first: bool = False
  ) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Reads the newest checkpoint that is not damaged, or one given step.

    Damaged checkpoints that are newer than the one read are deleted, unless this is read-only. Otherwise the run could
    not replace them: Orbax saves no step that it has, and no step before it.

    Args:
      items: as for `restore`.
      step: a step, 'best', or None for the newest that is whole.
      fresh_first: without a step, prefer the newest whose batch statistics fit its weights.

    Returns:
      As `restore`, or None if there is no checkpoint at all.

    Raises:
      UserError: there is no checkpoint of that step, or all of them are damaged.
    """
    steps = self.steps()
    if step == BEST and steps:
      steps = [self.best()]
    elif step is not None and step != BEST:
      if step not in steps:
        raise UserError(f'there is no checkpoint of step {step} in {self.directory}: there are {steps or "none"}')
      steps = [step]
    elif fresh_first:
      steps.sort(key=self.is_fresh, reverse=True)  # stable: among equals the newest stays first
    damaged = {}
    for step in steps:
      try:
        found = self.restore(items, step)
      except DamagedError as error:
        damaged[step] = error
        continue
      for bad, error in damaged.items():
        console.say(f'warning: {error}' + ('' if self.read_only else f'; deleted, step {step} is whole'))
        if not self.read_only:
          self._manager.delete(bad)
      return found
    for error in damaged.values():
      console.say(f'warning: {error}')
    if steps:
      raise UserError(f'every checkpoint tried in {self.directory} is damaged: move that folder away to start anew')
    return None

  def newest(self) -> str:
    """Returns a sentence that names the newest complete checkpoint."""
    self.wait()
    steps = self.steps()
    return f'Last good checkpoint: {self.directory / str(steps[0])}' if steps else 'There is no checkpoint yet'

  def wait(self) -> None:
    """Returns when everything is on disk.

    Raises:
      UserError: writing failed.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # from the background thread: OSError, or TensorStore's ValueError
      raise UserError(f'a checkpoint could not be written in {self.directory}: {_reason(error)}') from error

  def close(self) -> None:
    """Waits, and stops the background threads."""
    self.wait()
    self._manager.close()


def _reason(error: Exception) -> str:
  full = 'No space left on device'  # stands far back in TensorStore's long text
  return full if full in str(error) else str(error)[:200]


def _digest(items: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
  """Returns the crc32 of every array by its path, and the paths of arrays that are not finite."""
  digest, bad = {}, []
  for path, leaf in jax.tree_util.tree_leaves_with_path(items):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    array = np.asarray(leaf)
    digest[name] = zlib.crc32(np.ascontiguousarray(array).data)
    if not np.isfinite(array).all():
      bad.append(name)
  return digest, bad
