"""Checkpoints behind five verbs: save, restore, delete, list (`steps`), close. Orbax writes them, asynchronously.

Kept are the two newest, so that damage to one loses no run, and the best by validation accuracy where there is one.
"""

import contextlib
import fcntl
import json
import pathlib
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from googlenet_jax.host.errors import UserError

NO_ACCURACY = -1.0  # of a checkpoint that was never validated: worse than every accuracy
# Orbax tells the saves of a process apart by a number that is the process's own: two at once answer for each other,
# and lose files or wait for ever.
_one_save = threading.Lock()


class DamagedError(Exception):
  """The checkpoint cannot be read, or does not hold what was written."""


class Checkpoints:
  """The checkpoints of one run, in `workdir/checkpoints`."""

  def __init__(self, workdir: pathlib.Path, read_only: bool = False, shared: bool = False):
    """Opens the folder, and makes it where it is missing.

    Args:
      workdir: folder of the run.
      read_only: nothing in the folder changes: what looks like the rest of a killed save may be one under way.
      shared: other threads save other runs: one at a time, each until it is on disk.
    """
    self.directory = workdir.resolve() / 'checkpoints'
    self.read_only = read_only
    self._shared = shared

    def accuracy(metrics):
      return metrics['accuracy'] if metrics else NO_ACCURACY

    policy = checkpoint_managers.AnyPreservationPolicy(
      [checkpoint_managers.LatestN(2), checkpoint_managers.BestN(get_metric_fn=accuracy, n=1)]
    )
    options = ocp.CheckpointManagerOptions(
      best_fn=accuracy,
      preservation_policy=policy,
      cleanup_tmp_directories=not read_only,
      create=not read_only,
      read_only=read_only,
    )
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def save(self, step: int, items: dict[str, Any], meta: dict[str, Any], accuracy: float | None = None) -> None:
    """Writes a checkpoint, in the background unless `shared`; nothing happens if the step is saved already.

    Args:
      step: number of steps taken.
      items: trees of arrays, each of which can be restored without the others.
      meta: JSON values to keep beside it.
      accuracy: on the validation images, where there are any: the best one's checkpoint is kept.

    Raises:
      UserError: a weight is not finite, or the disk does not take it.
    """
    if step in self._manager.all_steps():
      return
    digest, bad = _digest(items)
    if bad:
      raise UserError(f'step {step}: {bad[0]} is not finite; not saved. Lower the learning rate. {self.newest()}')
    metrics = {'accuracy': NO_ACCURACY if accuracy is None else accuracy}
    arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    arguments = ocp.args.Composite(**arguments, meta=ocp.args.JsonSave({**meta, 'crc32': digest}))
    with _one_save if self._shared else contextlib.nullcontext():
      try:
        taken = self._manager.save(step, args=arguments, metrics=metrics)
      except Exception as error:  # also what the background thread of the save before met
        raise UserError(f'step {step} could not be saved in {self.directory}: {_reason(error)}') from error
      if self._shared:
        self.wait()
    if not taken:  # Orbax takes no step before the newest that it has
      raise UserError(f'step {step} could not be saved in {self.directory}: step {self.steps()[0]} is there already')

  def restore(self, items: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads one checkpoint and checks it against the checksums written with it.

    Args:
      items: the items to read, as trees of `jax.ShapeDtypeStruct` with shardings.
      step: which one.

    Returns:
      The items on their devices, and what was given as `meta`.

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
    found = {name: restored[name] for name in items}
    changed = [name for name, crc in _digest(found)[0].items() if written.get(name) != crc]
    if changed:
      raise DamagedError(f'checkpoint {step} in {self.directory} is damaged: {changed[0]} is not what was saved')
    return found, restored.meta

  def delete(self, step: int) -> None:
    """Removes one checkpoint."""
    self._manager.delete(step)

  def newest(self) -> str:
    """A phrase that names the newest complete checkpoint."""
    self.wait()
    steps = self.steps()
    return f'Last good checkpoint: {self.directory / str(steps[0])}' if steps else 'There is no checkpoint yet'

  def wait(self) -> None:
    """Returns when everything is on disk.

    Raises:
      UserError: the disk did not take it.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # what the background thread met: OSError, or TensorStore's ValueError
      raise UserError(f'a checkpoint could not be written in {self.directory}: {_reason(error)}') from error

  def close(self) -> None:
    """Waits, and stops the background threads."""
    self.wait()
    self._manager.close()


def _reason(error: Exception) -> str:
  full = 'No space left on device'  # which stands far behind in TensorStore's text
  return full if full in str(error) else str(error)[:200]


def _digest(items: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
  """crc32 of every array by its path, and the paths of those that are not finite."""
  digest, bad = {}, []
  for path, leaf in jax.tree_util.tree_leaves_with_path(items):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    array = np.asarray(leaf)
    digest[name] = zlib.crc32(np.ascontiguousarray(array).data)
    if not np.isfinite(array).all():
      bad.append(name)
  return digest, bad


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a path to write to, which then takes the place of `path`: a reader never finds half of a file."""
  temporary = path.with_name(path.name + '.tmp')
  yield temporary
  temporary.replace(path)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file as `replacing` does."""
  with replacing(path) as temporary:
    temporary.write_text(text)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON as `write_text` does."""
  write_text(path, json.dumps(value, indent=2) + '\n')


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Within the `with` block no other program gets this lock, on one machine; the empty file `.lock` stays.

  Raises:
    UserError: another run has it.
  """
  if jax.process_index() != 0:  # the processes of one run share a workdir
    yield
    return
  with (workdir / '.lock').open('a') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the file is closed, also by a kill
    except BlockingIOError as error:
      raise UserError(f'another run is writing in {workdir}: wait for it, or give another --workdir') from error
    yield
