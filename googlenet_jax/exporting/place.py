"""The folder of an export: filled under another name beside its place, and renamed when it is whole.

The folder being filled is `.export_` with 12 hex digits. It holds LOCK, which says the name of the place and is locked
while the program lives. The older export that it replaces has the same name with `_old` for a moment. So the next
export can tell what a killed program left, and what another program is writing.
"""

import contextlib
import hashlib
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from typing import IO

from googlenet_jax.host import console, files
from googlenet_jax.host.errors import UserError, one_line, reason

try:
  import fcntl
except ModuleNotFoundError:  # Windows
  fcntl = None

CARD = 'card.json'
LOCK = '.lock'
OLD = '_old'
OURS = re.compile(r'\.export_[0-9a-f]{12}')
LEFT_SECONDS = 86400.0  # after which a folder was left by a kill, where no lock can tell
SEEN = (LOCK, '__pycache__', '.DS_Store')  # what programs leave in a folder


def check(place: pathlib.Path) -> None:
  """Refuses a place that cannot be replaced, or that holds what is no export, or an export that somebody changed.

  Raises:
    UserError: says which.
  """
  if not os.path.lexists(place):
    return
  if not place.is_dir():
    raise UserError(f'{place} is a file: give a folder by --output')
  if os.path.ismount(place):
    raise UserError(f'{place} is a mount point, which cannot be replaced: give a folder in it, such as {place}/export')
  there = {path.name for path in place.iterdir()} - set(SEEN)
  own = files.read_json(place / CARD).get('files')
  own = own if isinstance(own, dict) else {}
  if others := sorted(there - {*own, CARD} if own else there):
    more = f' and {len(others) - 3} more' if others[3:] else ''
    raise UserError(
      f'{place} holds {", ".join(others[:3])}{more}, which is no export: give another folder by --output, or empty it'
    )
  for name in sorted(there - {CARD}):
    if own[name] != facts(place / name):
      raise UserError(
        f'{place / name} was changed since it was exported: move it elsewhere, or give another folder by --output'
      )


def facts(path: pathlib.Path) -> dict[str, int | str]:
  """Returns what card.json says of a file: its size and its sha256."""
  with path.open('rb') as file:
    return {'bytes': path.stat().st_size, 'sha256': hashlib.file_digest(file, 'sha256').hexdigest()}


@contextlib.contextmanager
def filled(place: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a folder to fill beside `place`, which then replaces it whole. After a failure nothing of it is left."""
  parent = place.parent
  made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
  try:
    parent.mkdir(parents=True, exist_ok=True)
    clean(parent)
    folder = parent / f'.export_{secrets.token_hex(6)}'
    folder.mkdir()
    lock = (folder / LOCK).open('wb')
  except OSError as error:
    raise UserError(f'{place} cannot be written ({reason(error)}): give another folder by --output') from error
  with lock:
    try:
      known = _try_lock(lock)
      lock.write(os.fsencode(place.name))  # only now: `_is_left` takes an empty file for one that is not locked yet
      lock.flush()
      if known is None:
        lock.close()  # Windows renames no folder with open files
      yield folder
      check(place)  # somebody may have written there meanwhile
      _replace(folder, place)
    except BaseException:
      shutil.rmtree(folder, ignore_errors=True)
      with contextlib.suppress(OSError):  # somebody may use them by now
        for empty in made:
          empty.rmdir()
      raise


def _replace(folder: pathlib.Path, place: pathlib.Path) -> None:
  old = folder.with_name(folder.name + OLD)
  before = place.exists()
  if before:
    place.rename(old)
  try:
    folder.rename(place)
  except BaseException:
    if before:
      old.rename(place)
    raise
  (place / LOCK).unlink()
  shutil.rmtree(old, ignore_errors=True)


def _try_lock(file: IO[bytes]) -> bool | None:
  """Locks a file; returns whether it worked, and None where the system or the file system knows no locks."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except (OSError, AttributeError):
    return None
  return True


def clean(parent: pathlib.Path) -> None:
  """Removes what killed programs left in a folder, and puts an older export back where it is missing.

  A folder is left if its name is ours and nobody holds its lock; without a lock to ask, if it is a day old.
  """
  for old in parent.glob(f'.export_*{OLD}'):
    folder = old.with_name(old.name.removesuffix(OLD))
    if not OURS.fullmatch(folder.name):
      continue
    if not folder.exists():  # it took its place, and the program was killed while it removed the older export
      shutil.rmtree(old, ignore_errors=True)
    elif _is_left(folder):
      place = parent / os.fsdecode((folder / LOCK).read_bytes())
      if not place.exists():
        old.rename(place)
        console.say(f'note: {one_line(place)} is back: an export that was to replace it was killed')
  for folder in parent.glob('.export_*'):
    if OURS.fullmatch(folder.name) and _is_left(folder):
      shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: pathlib.Path) -> bool:
  try:
    with (folder / LOCK).open('rb+') as lock:
      free = _try_lock(lock) if lock.read() else None
    return time.time() - folder.stat().st_mtime > LEFT_SECONDS if free is None else free
  except OSError:  # without the file, it is just being made or renamed, or it is somebody else's
    return False
