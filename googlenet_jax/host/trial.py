"""Tries whether a folder takes what will be written into it."""

import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

from googlenet_jax.host import damage, errors, files
from googlenet_jax.host.errors import UserError


def take(directory: pathlib.Path, size: int, count: int) -> None:
  """Takes the space of the checkpoints of a run, saves a small one, and removes all of it again.

  Args:
    directory: folder of the checkpoints.
    size: bytes of a checkpoint.
    count: how many there will be at the same time.

  Raises:
    UserError: says what is needed and what is free.
  """
  folder = directory / '.trial'
  shutil.rmtree(folder, ignore_errors=True)  # left by a kill
  try:
    folder.mkdir()
    for number in range(count):  # not one file: there are limits to the size of a file, too
      files.take_space(folder / str(number), size)
    if jax.process_count() == 1:  # Orbax waits for all processes
      _save_a_small_one(folder)
  except Exception as error:
    shutil.rmtree(folder, ignore_errors=True)
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
    shutil.rmtree(folder, ignore_errors=True)


def _save_a_small_one(folder: pathlib.Path) -> None:
  with ocp.CheckpointManager(folder) as manager:
    manager.save(1, args=ocp.args.Composite(network=ocp.args.StandardSave({'x': np.zeros(1, np.float32)})))
