"""Writes files: a reader never finds half of one."""

import contextlib
import csv
import fcntl
import io
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from googlenet_jax.host.errors import UserError


def is_writer() -> bool:
  """Returns whether this process writes the files of a run. Only the first process does."""
  return jax.process_index() == 0


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a path to write to, which then replaces `path`: a reader never finds half a file."""
  temporary = path.with_name(path.name + '.tmp')
  yield temporary
  temporary.replace(path)


def write_text(path: pathlib.Path, text: str) -> None:
  """Replaces a text file, in the first process only."""
  if is_writer():
    with replacing(path) as temporary:
      # surrogateescape: file names may hold bytes that are no UTF-8
      temporary.write_text(text, encoding='utf-8', errors='surrogateescape')


def write_json(path: pathlib.Path, value: Any) -> None:
  """Replaces a JSON file, in the first process only."""
  write_text(path, json.dumps(value, indent=2) + '\n')


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
  """Returns rows of cells as the text of a CSV file."""
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows(rows)
  return text.getvalue()


@contextlib.contextmanager
def lock(folder: pathlib.Path) -> Iterator[None]:
  """Keeps other programs on this machine out of `folder` inside the `with` block; the empty file `.lock` stays.

  Raises:
    UserError: another run holds the lock.
  """
  if not is_writer():  # the processes of one run share a folder
    yield
    return
  with (folder / '.lock').open('a') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the file is closed, also by a kill
    except BlockingIOError as error:
      raise UserError(f'another run is writing in {folder}: wait for it, or give another --workdir') from error
    yield
