"""What a checkpoint holds, and what is damaged in it.

The item `meta` of a checkpoint has a checksum of its own, and the data type, shape and checksum of every array. So a
changed array, an array that is missing, and a recipe that makes other arrays can be told apart.
"""

import errno
import json
import os
import pathlib
import re
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from googlenet_jax.host import errors, processes
from googlenet_jax.host.errors import UserError


class DamagedError(Exception):
  """The checkpoint cannot be read, or does not hold what was written."""

  def __init__(self, folder: pathlib.Path, what: str):
    """Names the folder of the checkpoint and what is damaged in it."""
    super().__init__(f'checkpoint {folder} is damaged: {what}')


# What a checkpoint holds ---------------------------------------------------------------------------------------------


def leaves(items: dict[str, Any]) -> list[tuple[str, Any]]:
  """Returns the arrays of trees with their names, such as `network/params/conv1/kernel`."""
  with_paths = jax.tree_util.tree_leaves_with_path(items)
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in with_paths]


def form_of(leaf: Any) -> list[Any]:
  """Returns data type and shape of an array."""
  return [str(leaf.dtype), list(leaf.shape)]


def described(items: dict[str, Any]) -> tuple[dict[str, list[Any]], list[str]]:
  """Returns data type, shape and crc32 of every array by its name, and the names of arrays that are not finite."""
  forms, bad = {}, []
  for name, leaf in leaves(items):
    array = np.asarray(leaf)
    forms[name] = [*form_of(array), zlib.crc32(np.ascontiguousarray(array).data)]
    if not np.isfinite(array).all():
      bad.append(name)
  return forms, bad


def crc32_of_json(value: Any) -> int:
  """Returns a checksum of a JSON value, which is the same after it was written and read."""
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def old_meta(folder: pathlib.Path, meta: dict[str, Any], metrics: dict[str, Any] | None) -> dict[str, Any]:
  """Returns the `meta` of an older checkpoint (up to commit 2a31e49) in today's form: it has checksums, no shapes."""
  digest, arrays = meta.pop('crc32'), {}
  with ocp.StandardCheckpointer() as reader:
    for item in {name.partition('/')[0] for name in digest}:
      metadata = reader.metadata(folder / item).item_metadata
      if metadata is None:
        raise ValueError(f'{item} cannot be read')
      arrays |= {name: form_of(leaf) for name, leaf in leaves({item: metadata.tree})}
  arrays = {name: [*arrays[name], crc32] for name, crc32 in digest.items()}
  return {**meta, 'fresh': bool((metrics or {}).get('fresh')), 'arrays': arrays}


def check_alike(folder: pathlib.Path, written: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
  """Refuses a checkpoint of another network.

  Raises:
    UserError: names the first array that differs, with both forms.
  """
  there = {name: form for name, (*form, _) in written.items()}
  differing = [name for name in {**wanted, **there} if wanted.get(name) != there.get(name)]
  if differing:
    words = lambda form: f'{form[0]} {form[1]}' if form else 'missing'
    first, more = differing[0], f' ({len(differing)} arrays differ)' if differing[1:] else ''
    raise UserError(
      f'checkpoint {folder} is of another network than the recipe says: {first} is {words(there.get(first))} there and '
      f'{words(wanted.get(first))} in the recipe{more}. {folder.parents[1] / "run.json"} or --config was changed after '
      'the training: undo that, or give another --workdir'
    )


# What is damaged -----------------------------------------------------------------------------------------------------

# Troubles of the machine: the files may be whole.
_NUMBERS = ('ENOSPC', 'EDQUOT', 'EFBIG', 'EROFS', 'EMFILE', 'ENFILE', 'ENOMEM', 'EACCES', 'EPERM', 'EIO', 'ESTALE')
_MACHINE = [os.strerror(getattr(errno, name)) for name in _NUMBERS if hasattr(errno, name)]
_JSON = ('_CHECKPOINT_METADATA', '_METADATA', '_sharding', 'metadata', 'metrics', 'process_0')


def numbers(directory: pathlib.Path) -> list[int]:
  """Returns the numbers that are names in a folder: steps, whether they are whole or not."""
  names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
  return [int(name) for name in names if name.isascii() and name.isdecimal() and name == str(int(name))]


def move_aside(directory: pathlib.Path, damaged: dict[int, str]) -> dict[int, str]:
  """Moves checkpoints to `workdir/damaged`.

  Args:
    directory: `workdir/checkpoints`.
    damaged: what is damaged, by step.

  Returns:
    The same, with the place where each is now.
  """
  kept = directory.with_name('damaged')
  moved = {}
  for step, text in damaged.items():
    target, number = kept / str(step), 1
    while target.exists():
      number += 1
      target = kept / f'{step}_{number}'
    if processes.is_first():
      kept.mkdir(exist_ok=True)
      (directory / str(step)).rename(target)
    moved[step] = f'{text}; moved to {target}'
  return moved


def reason(error: Exception) -> str:
  """Returns why reading or writing failed. It stands far back in TensorStore's long text."""
  text = f'{error.__cause__ or ""} {error}'
  if code := re.search(r"os_error_code='(\d+)'", text):
    return os.strerror(int(code[1]))
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return next((one for one in _MACHINE if one in text), errors.reason(error)[:200])


def with_reason(what: str, error: Exception, more: str = '') -> UserError:
  """Returns what to raise: `WHAT: REASON. MORE`, and a next step at the end if there is one."""
  text = reason(error)
  parts = [f'{what}: {text}' + (f'. {more}' if more else ''), errors.advice(text)]
  return UserError('; '.join(filter(None, parts)))


def trouble(folder: pathlib.Path, error: Exception) -> Exception:
  """Returns what to raise where a checkpoint cannot be read: the machine has a trouble, or the files are damaged."""
  text = reason(error)
  if text in _MACHINE or isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
    return with_reason(f'checkpoint {folder} cannot be read', error)
  return DamagedError(folder, _culprit(folder, f'{error.__cause__ or ""} {error}'))


def _culprit(folder: pathlib.Path, text: str) -> str:
  """Names the file or array that an error of Orbax or TensorStore is about."""
  for path in sorted(folder.rglob('*')):
    if path.name in _JSON and path.is_file():
      try:
        json.loads(path.read_bytes())
      except (ValueError, RecursionError):
        return f'{path.relative_to(folder)} holds no JSON'
  text = text.partition('[tensorstore_spec')[0]  # pages of settings follow
  if file := re.search(re.escape(str(folder)) + r'/([^"\s]*[^"\s/])(?=["\s])', text):
    return f'{file[1]} is missing or damaged'
  if array := re.search(r'(?:Error reading|Metadata at) "([^"]+)/[^/"]*"', text):
    return f'{array[1].replace(".", "/")} cannot be read'
  first = text.strip().partition('\n')[0][:150]
  return f'it cannot be read ({first})'
