"""Finds the picture files that a user names, and reads them ahead of the network with bounded memory."""

import collections
import concurrent.futures
import glob
import os
import sys
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from googlenet_jax.data import decoding, listing, pictures
from googlenet_jax.host import console
from googlenet_jax.host.errors import UserError, expanded_text, one_line

STANDARD_INPUT = '-'
AHEAD = 128  # pictures that are read before the network needs them


class Found(NamedTuple):
  """A picture that the user named."""

  name: str  # as given; in a folder that was given, below its name
  true_class: str = ''  # if the folder tells it
  error: str = ''  # why there is no such picture


class Picture(NamedTuple):
  """A picture that was read, or the reason why it was not."""

  found: Found
  pixels: np.ndarray | None = None  # uint8 [h, w, C]
  error: str = ''


def find(arguments: Sequence[str], classes: Collection[str]) -> list[Found]:
  """Finds pictures.

  Args:
    arguments: files; folders, whose pictures at any depth count, in sorted order; patterns such as `*.png`, if the
      shell has not expanded them; `-` for a list of these on standard input, one a line or separated by NUL bytes.
    classes: names of the classes. In a folder, the pictures in `CLASS/` and `SPLIT/CLASS/` have this true class; so
      have those of a folder `CLASS` that is given itself.

  Returns:
    The pictures in the order of the arguments, and what could not be found.

  Raises:
    UserError: there is not one picture.
  """
  arguments = [own for argument in arguments for own in (_listed() if argument == STANDARD_INPUT else [argument])]
  if not arguments:
    raise UserError('no pictures are named: give files, folders, or - for a list on standard input')
  found = [one for argument in arguments for one in _find(argument, classes)]
  if all(one.error for one in found):
    raise UserError(f'{found[0].error}{f" (and {len(found) - 1} more like it)" if found[1:] else ""}')
  return found


def _listed() -> list[str]:
  if sys.stdin is None:
    raise UserError('standard input is closed: give a list of pictures there, or name the pictures')
  data = sys.stdin.buffer.read()
  parts = data.split(b'\0') if b'\0' in data else data.splitlines()
  return [os.fsdecode(part) for part in parts if part]


def _find(argument: str, classes: Collection[str]) -> Iterator[Found]:
  try:
    argument = expanded_text(argument)
  except UserError as error:
    yield Found(argument, error=str(error))
    return
  if os.path.isdir(argument):
    found = [*_in_folder(argument, classes)]
    yield from found or [
      Found(argument, error=f'{one_line(argument)} has no pictures ({", ".join(pictures.SUFFIXES)})')
    ]
  elif not os.path.lexists(argument) and glob.has_magic(argument):
    matches = sorted(glob.glob(argument, recursive=True))
    found = []
    for match in matches:
      found += _in_folder(match, classes) if os.path.isdir(match) else [Found(match)] * pictures.is_picture_name(match)
    fits = 'only what is no picture' if matches else 'no file'
    yield from found or [Found(argument, error=f'{one_line(argument)} fits {fits}')]
  else:
    yield Found(argument)  # reading says what is wrong with it


def _in_folder(folder: str, classes: Collection[str]) -> Iterator[Found]:
  """Finds the pictures below a folder, as training does, and tells their true classes."""
  walk, own = listing.Walk(folder), listing.same_name(os.path.basename(os.path.abspath(folder)))
  for place, _, names in walk.below(folder):
    inside = [listing.same_name(part) for part in os.path.relpath(place, folder).split(os.sep)]
    if inside[0].lower() in listing.SPLIT_FOLDERS and inside[0] not in classes:
      inside = inside[1:]
    true_class = next((name for name in (*inside[:1], own) if name in classes), '')
    yield from (Found(os.path.join(place, name), true_class) for name in names)
  others = walk.other_endings().removeprefix(', only ')
  for note in [*walk.notes, *([f'{one_line(folder)} holds {others}'] if others else [])]:
    console.complain(f'note: {note}')
  for path, reason in walk.refused:
    yield Found(path, error=f'{one_line(path)} cannot be opened: {reason}')


def read(one: Found, channels: int, canvas: int) -> Picture:
  """Reads a picture; see `read_ahead`."""
  if one.error:
    return Picture(one, error=one.error)
  try:
    return Picture(one, pictures.read(one.name, channels, canvas))
  except UserError as error:
    return Picture(one, error=one_line(str(error)))


def read_ahead(found: Sequence[Found], channels: int, canvas: int) -> Iterator[Picture]:
  """Reads pictures by several threads, in order. At most AHEAD of them are in memory before they are asked for.

  Args:
    found: what to read.
    channels: 1 for grey, 3 for RGB.
    canvas: larger pictures are shrunk to this side in pixels, as in training.
  """

  waiting = collections.deque()
  pool = concurrent.futures.ThreadPoolExecutor(decoding.threads())
  try:
    for one in found:
      waiting.append(pool.submit(read, one, channels, canvas))
      if len(waiting) > AHEAD:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


def columns(text: str) -> int:
  """Returns how many columns of a terminal a text takes: letters of East Asia take two, combining marks none."""
  if text.isascii():
    return len(text)
  return sum(
    0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in 'WF' else 1 for letter in text
  )
