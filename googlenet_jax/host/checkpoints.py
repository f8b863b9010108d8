"""Checkpoints of a run. Orbax writes them in the background; checksums find damage that Orbax does not.

The two newest are kept, so damage to one loses no run. The one with the best validation accuracy is kept too.
"""

import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from googlenet_jax.host import console, damage, managers, processes, retention, shared, trial, turns
from googlenet_jax.host.errors import UserError, one_line

BEST = 'best'
# What a checkpoint needs beside its arrays. For all of them together that is enough for logs and pictures, too.
EXTRA_BYTES = 2**20


class Checkpoints:
  """The checkpoints of one run, in `workdir/checkpoints`.

  Several processes that work on the run save together: all of them must call what changes the folder. A folder that is
  opened `read_only` is read by each process for itself.
  """

  def __init__(self, workdir: pathlib.Path, accuracies: dict[int, float] | None = None, read_only: bool = False):
    """Opens the folder, and makes it if it is missing.

    Args:
      workdir: folder of the run.
      accuracies: accuracy on the validation images after a step, see `runs.validation_accuracies`. The best checkpoint
        is kept. A step is saved before it is validated, so the training adds to this dict.
      read_only: change nothing in the folder. What looks like a killed save may be a save in progress.
    """
    self.directory = workdir.resolve() / 'checkpoints'
    try:
      str(self.directory).encode()
    except UnicodeEncodeError as error:
      raise UserError(f'{one_line(self.directory)}: no UTF-8, which Orbax needs: give another --workdir') from error
    self.read_only = read_only
    self._accuracies = {} if accuracies is None else accuracies
    self._gather = (lambda value: [value]) if read_only else processes.gather
    if not read_only:
      self._bring_back()
    self._open()
    self._error: Exception | None = None  # why the newest save failed

  def _open(self) -> None:
    try:
      if not self.read_only:
        if processes.is_first():
          self.directory.mkdir(parents=True, exist_ok=True)
        shared.check(self.directory)
        shared.wait_until_alike(self.directory, lambda: sorted(damage.numbers(self.directory)))
      self._reader = self._manager = managers.reader(self.directory)
      if not self.read_only:
        self._manager = managers.writer(self.directory, self._accuracies)
    except UserError:
      raise
    except Exception as error:  # such as no permission, or too many open files
      raise damage.with_reason(f'{self.directory} cannot be opened', error) from error
    if not self.read_only:
      turns.begin(self)

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def best(self) -> int:
    """Returns the step with the highest validation accuracy.

    Raises:
      UserError: no checkpoint was validated.
    """
    step = retention.best(self.steps(), self._accuracies)
    if step is None:
      raise UserError(
        f'no checkpoint in {self.directory} has a validation accuracy: the recipe holds out no images '
        '(config.data.validation_examples=0). Give --step=N, or leave --step out for the newest'
      )
    return step

  def is_fresh(self, step: int) -> bool:
    """Returns whether the batch statistics of a checkpoint fit its weights, see `save`."""
    return self._meta(step)['fresh']

  def _is_fresh_or_damaged(self, step: int) -> bool:
    """Returns whether a checkpoint is tried early: a damaged one too, because then a warning names it."""
    try:
      return self.is_fresh(step)
    except damage.DamagedError:
      return True

  def save(self, step: int, items: dict[str, Any], meta: dict[str, Any], fresh: bool = True) -> None:
    """Writes a checkpoint, in the background if no other run is trained here. Does nothing if the step is saved.

    If the save before this one failed, a warning says so, and this one is waited for.

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
    arrays, bad = damage.described(items)
    if bad:
      count = meta.get('skipped_updates')
      left_out = f' Updates left out so far: {count}.' if count else ''
      raise UserError(
        f'step {step}: {bad[0]} is not finite; not saved.{left_out} Lower --config.learning_rate, in a new --workdir. '
        f'{self.newest()}'
      )
    arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    content = {**meta, 'fresh': fresh, 'arrays': arrays}
    meta = ocp.args.JsonSave({'content': content, 'crc32': damage.crc32_of_json(content)})
    arguments = ocp.args.Composite(**arguments, meta=meta)
    failure = self._failure()
    if failure is not None:
      if processes.count() > 1:
        self.wait()  # raises: the others cannot try again with this process
      self._open()  # removes what the failed save left
    with turns.turn(self) as waits:
      try:
        taken = self._manager.save(step, args=arguments)
        if waits or failure is not None:
          self._manager.wait_until_finished()
      except Exception as error:
        what = f'step {step} could not be saved in {self.directory}'
        raise damage.with_reason(what, error, self._last_good()) from error
    if failure is not None:
      self._error = None
      console.say(f'warning: a checkpoint could not be written ({damage.reason(failure)}); step {step} is saved')
    if not taken:  # Orbax refuses a step older than its newest
      raise UserError(f'step {step} could not be saved in {self.directory}: step {self.steps()[0]} is there already')

  def replace(self, step: int, items: dict[str, Any], meta: dict[str, Any]) -> None:
    """Writes a checkpoint anew, now with batch statistics that fit. A kill in between loses neither.

    Args:
      step: a step that is saved.
      items: as for `save`.
      meta: as for `save`.

    Raises:
      UserError: as `save`.
    """
    self.close()
    if processes.is_first():
      self._replaced.mkdir(exist_ok=True)
      (self.directory / str(step)).rename(self._replaced / str(step))
    self._gather(None)  # waits for that
    self._open()
    try:
      self.save(step, items, meta)
      self.wait()
    finally:
      self._bring_back()

  @property
  def _replaced(self) -> pathlib.Path:
    return self.directory.with_name('replaced')

  def _bring_back(self) -> None:
    """Removes checkpoints that were replaced, or brings them back if a kill or a full disk came first."""
    for old in self._replaced.glob('*') if processes.is_first() else ():
      if (self.directory / old.name).exists():
        shutil.rmtree(old)
      else:
        self.directory.mkdir(exist_ok=True)
        old.rename(self.directory / old.name)
    if processes.is_first() and self._replaced.exists():
      self._replaced.rmdir()

  def try_to_write(self, items: dict[str, Any], at_once: int) -> None:
    """Takes the space that the checkpoints of a run need, saves a small one, and removes all of it again.

    So a full disk, a quota, or a file system that cannot do what Orbax asks for ends a run before its first step.

    Args:
      items: as for `save`.
      at_once: how many checkpoints there are at most: those that are kept, and the one that is being written.

    Raises:
      UserError: says what is needed and what is free.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(items)) + EXTRA_BYTES
    small = min(jax.tree.leaves(items), key=lambda leaf: leaf.nbytes)
    with turns.turn(self):
      trial.take(self.directory, size, max(at_once - len(self.steps()), 1), small)

  def restore(self, items: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads one checkpoint and checks it against its checksums.

    Args:
      items: the items to read, as trees of `jax.ShapeDtypeStruct` with shardings.
      step: step of the checkpoint.

    Returns:
      The items on their devices, and the `meta` that was saved.

    Raises:
      DamagedError: files are missing, unreadable or changed.
      UserError: the checkpoint has other arrays than `items`; or the machine has a trouble, such as no permission.
    """
    folder, meta = self.directory / str(step), self._meta(step)
    written = {name: form for name, form in meta.pop('arrays').items() if name.partition('/')[0] in items}
    damage.check_alike(folder, written, {name: damage.form_of(leaf) for name, leaf in damage.leaves(items)})
    arguments = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
    try:
      restored = self._reader.restore(step, args=ocp.args.Composite(**arguments))
    except Exception as error:  # Orbax raises bare Exception for damaged files
      raise damage.trouble(folder, error) from error
    found = {name: restored[name] for name in items}
    for name, form in damage.described(found)[0].items():
      if form != written[name]:
        raise damage.DamagedError(folder, f'{name} is not what was saved')
    del meta['fresh']
    return found, meta

  def _meta(self, step: int) -> dict[str, Any]:
    """Returns the `meta` of a checkpoint, and `fresh` and `arrays`, see `save`; raises as `restore`."""
    folder = self.directory / str(step)
    try:
      meta = self._reader.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
      if 'content' not in meta:
        return damage.old_meta(folder, meta, self._reader.metrics(step))
      if damage.crc32_of_json(meta['content']) != meta['crc32']:
        raise ValueError('not what was saved')
    except Exception as error:
      raise damage.trouble(folder, error) from error
    return meta['content']

  def restore_whole(
    self, items: dict[str, Any], step: int | str | None = None, fresh_first: bool = False
  ) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Reads the newest checkpoint that is not damaged, or one given step.

    Damaged checkpoints that are newer than the one read are moved to `workdir/damaged`, unless this is read-only.
    Otherwise the run could not replace them: Orbax saves no step that it has, and no step before it.

    Args:
      items: as for `restore`.
      step: a step, 'best', or None for the newest that is whole.
      fresh_first: without a step, prefer the newest whose batch statistics fit its weights.

    Returns:
      As `restore`, or None if there is no checkpoint at all.

    Raises:
      UserError: there is no checkpoint of that step, or all of them are damaged; or as `restore`.
    """
    steps, unlisted = self._steps_to_try(step, fresh_first)
    damaged, found = {}, None
    for step in steps:
      text = ''
      try:
        if step in unlisted:
          raise damage.DamagedError(self.directory / str(step), 'Orbax finds no checkpoint in it')
        found = self.restore(items, step)
      except damage.DamagedError as error:
        text = str(error)
      text = next(filter(None, self._gather(text)), '')  # what one process cannot read, no process takes
      if not text:
        break
      damaged[step], found = text, None
    if damaged and found and not self.read_only:
      self._close_managers()
      damaged = damage.move_aside(self.directory, damaged)
      self._gather(None)  # the first process moves
      self._open()
    for text in damaged.values():
      console.say(f'warning: {text}' + (f'; step {step} is used' if found else ''))
    if damaged and not found:
      one = 'leave --step out for the newest that is whole' if len(steps) < len(damage.numbers(self.directory)) else ''
      raise UserError(
        f'every checkpoint tried in {self.directory} is damaged: '
        f'{one or "bring that folder back from a copy, or move it away to start anew"}'
      )
    return found

  def _steps_to_try(self, step: int | str | None, fresh_first: bool) -> tuple[list[int], list[int]]:
    """Returns the steps for `restore_whole` in the order of the tries, and the steps that Orbax does not list."""
    steps = self.steps()
    unlisted = [number for number in damage.numbers(self.directory) if number not in steps]
    steps, unlisted = self._gather([sorted({*steps, *unlisted}, reverse=True), unlisted])[0]
    if step == BEST and steps:
      steps = [self.best()]
    elif step is not None and step != BEST:
      if step not in steps:
        raise UserError(f'there is no checkpoint of step {step} in {self.directory}: there are {steps or "none"}')
      steps = [step]
    elif fresh_first:
      steps.sort(key=self._is_fresh_or_damaged, reverse=True)  # stable: among equals the newest stays first
    return steps, unlisted

  def newest(self) -> str:
    """Returns a sentence that names the newest complete checkpoint."""
    self._failure()  # waits
    return self._last_good()

  def _last_good(self) -> str:
    steps = self.steps()
    return f'Last good checkpoint: {self.directory / str(steps[0])}' if steps else 'There is no checkpoint yet'

  def is_saving(self) -> bool:
    """Returns whether a save is under way in the background."""
    return self._manager.is_saving_in_progress()

  def failed(self, wait: bool = False) -> bool:
    """Returns whether the newest save has failed in the background; by default without waiting for it."""
    return (wait or not self.is_saving()) and self._failure() is not None

  def _failure(self) -> Exception | None:
    """Waits for the save under way, and returns the error of the newest one."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # from the background thread: OSError, or TensorStore's ValueError
      self._error = error  # Orbax raises it once
    return self._error

  def wait(self) -> None:
    """Returns when everything is on disk.

    Raises:
      UserError: writing failed.
    """
    error, self._error = self._failure(), None
    if error is not None:
      what = f'a checkpoint could not be written in {self.directory}'
      raise damage.with_reason(what, error, self._last_good()) from error

  def close(self) -> None:
    """Waits, and stops the background threads."""
    self.wait()
    self._close_managers()
    turns.end(self)

  def _close_managers(self) -> None:
    for manager in {self._reader, self._manager}:
      manager.close()
