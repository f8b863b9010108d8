"""Tries whether a folder takes what will be written into it."""

import contextlib
import pathlib
import shutil

import jax
import orbax.checkpoint as ocp

from googlenet_jax.host import damage, errors, files, managers, processes
from googlenet_jax.host.errors import UserError


def take(directory: pathlib.Path, size: int, count: int, small: jax.Array) -> None:
  """Takes the space of the checkpoints of a run, saves a small one, and removes all of it again.

  All processes that work on the run must call it: they save together.

  Args:
    directory: folder of the checkpoints.
    size: bytes of a checkpoint.
    count: how many there will be at the same time.
    small: an array of a checkpoint, which is saved.

  Raises:
    UserError: says what is needed and what is free.
  """
  folder = directory / '.trial'
  _remove(folder)  # left by a kill
  try:
    if processes.is_first():
      folder.mkdir()
      for number in range(count):  # not one file: there are limits to the size of a file, too
        files.take_space(folder / str(number), size)
    processes.of_first(None)  # the folder is there now
    _save(folder, small)
    processes.of_first(None)  # and nobody needs it any more
  except Exception as error:
    _remove(folder)
    free = shutil.disk_usage(directory).free
    why = damage.reason(error)
    is_limit = 'ulimit' in errors.advice(why)
    quota = '; there may be a quota, or no room for more names of files' * (free > count * size and not is_limit)
    helps = errors.advice(why) if is_limit else 'make room'
    raise UserError(
      f'{directory} does not take the checkpoints of this run: {why}. Up to {count} of '
      f'{size / 1e6:.0f} MB come, and {free / 1e6:.0f} MB are free{quota}: {helps}, or give another --workdir'
    ) from error
  finally:
    _remove(folder)


def _remove(folder: pathlib.Path) -> None:
  if processes.is_first():
    shutil.rmtree(folder, ignore_errors=True)


def _save(folder: pathlib.Path, array: jax.Array) -> None:
  with contextlib.closing(managers.writer(folder)) as manager:
    manager.save(1, args=ocp.args.Composite(network=ocp.args.StandardSave({'x': array})))
