"""Writes files: a reader never finds half of one."""

import contextlib
import csv
import errno
import io
import json
import os
import pathlib
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from googlenet_jax.host import console, processes
from googlenet_jax.host.errors import UserError, one_line

try:
  import fcntl
except ModuleNotFoundError:  # Windows
  fcntl = None


TEMPORARY = '.googlenet_jax.'  # begins the names of files that are being written
LEFT_SECONDS = 3600.0  # after which such a file was left by a kill


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a path to write to, which then replaces `path`: a reader never finds half a file."""
  # Two programs may write the same file at once, each under a name of its own. A long name would be too long with more.
  temporary = path.with_name(f'{TEMPORARY}{secrets.token_hex(6)}')
  try:
    yield temporary
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)  # on a full disk every byte counts
    raise


def take_space(path: pathlib.Path, size: int) -> None:
  """Makes a file of `size` bytes, or raises the OSError that writing it would raise."""
  with path.open('wb') as file:
    try:
      os.posix_fallocate(file.fileno(), 0, size)  # at once, and quotas count it
    except (AttributeError, OSError) as error:
      if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
        raise
      for _ in range(-(-size // 2**20)):  # macOS, Windows, some file systems
        file.write(bytes(2**20))


def write_text(path: pathlib.Path, text: str) -> None:
  """Replaces a text file, in the first process only."""
  if processes.is_first():
    with replacing(path) as temporary:
      # surrogateescape: file names may hold bytes that are no UTF-8
      temporary.write_text(text, encoding='utf-8', errors='surrogateescape')


def write_json(path: pathlib.Path, value: Any) -> None:
  """Replaces a JSON file, in the first process only."""
  write_text(path, json.dumps(value, indent=2) + '\n')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object in a JSON file; an empty one if the file is missing or damaged, for what can do without it."""
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):
    return {}
  return content if isinstance(content, dict) else {}


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
  """Returns rows of cells as the text of a CSV file."""
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows(rows)
  return text.getvalue()


@contextlib.contextmanager
def lock(folder: pathlib.Path) -> Iterator[None]:
  """Keeps other programs on this machine out of `folder` inside the `with` block; the empty file `.lock` stays.

  Where the system or the file system knows no locks, a warning says so, and the block begins.

  Raises:
    UserError: another run holds the lock, or the folder cannot be written.
  """
  if not processes.is_first():  # the processes of one run share a folder
    yield
    return
  try:
    file = _open_lock(folder / '.lock')
  except OSError as error:
    raise UserError(f'{one_line(folder)} cannot be written ({error.strerror}): give another --workdir') from error
  with file:
    try:
      _lock(file)  # released when the file is closed, also by a kill
    except BlockingIOError as error:
      raise UserError(f'another run is writing in {folder}: wait for it, or give another --workdir') from error
    except OSError as error:
      if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        raise
      console.warn_once(f'{one_line(folder)} cannot be locked ({error.strerror}): start no second run there meanwhile')
    remove_left(folder)
    yield


def _open_lock(path: pathlib.Path) -> IO[bytes]:
  try:
    return path.open('ab')
  except PermissionError:
    return path.open('rb')  # another user made it, in a folder for both: reading is enough to lock it


def _lock(file: IO[bytes]) -> None:
  if fcntl is None:
    raise OSError(errno.ENOSYS, 'this system has no flock')
  fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_left(folder: pathlib.Path) -> None:
  """Removes files that a killed program was writing."""
  for path in folder.glob(f'{TEMPORARY}*'):
    with contextlib.suppress(FileNotFoundError):  # just renamed
      if time.time() - path.stat().st_mtime > LEFT_SECONDS:
        path.unlink()
