"""Finds the pictures of a folder `DIR/CLASS/*` or `DIR/{train,validation,test}/CLASS/*`."""

import collections
import dataclasses
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from googlenet_jax.data import pictures
from googlenet_jax.host.errors import UserError, one_line

SPLIT_FOLDERS = {
  'train': 'train',
  'validation': 'validation',
  'val': 'validation',
  'valid': 'validation',
  'test': 'test',
}
NO_DATA = {'thumbs.db', 'desktop.ini', '__macosx'}  # left by file managers


@dataclasses.dataclass(frozen=True)
class Listing:
  """The pictures of a folder, sorted by class and file."""

  files: list[str]  # relative to the folder, with /
  classes: list[str]  # one for each file
  splits: list[str]  # one for each file: that of its folder; '' where the folder has none
  folders: dict[str, str]  # names of the folders of splits, and their splits
  notes: list[str]  # what a person should know


def same_name(name: str) -> str:
  """Returns the form of a name that is the same on every machine: macOS writes accents as characters of their own."""
  return unicodedata.normalize('NFC', name)


# Finding -------------------------------------------------------------------------------------------------------------


def find(root: pathlib.Path, known: bool = False) -> Listing:
  """Lists the pictures of a folder.

  Links are followed. Hidden files and folders, and files with other endings, are no pictures.

  Args:
    root: the folder.
    known: a run knows its files, so folders of splits and classes may be missing.

  Raises:
    UserError: the folder is missing or has another form, or fewer than two classes.
  """
  _check(root)
  walk = Walk(root)
  inner, direct = walk.children(root)
  splits = {name: SPLIT_FOLDERS[name.lower()] for name in inner if name.lower() in SPLIT_FOLDERS}
  if 'train' not in splits.values():
    if splits and len(splits) == len(inner) and not known:
      raise UserError(f'{one_line(root)} has {_names(inner)}, but no folder train: name the training pictures train')
    if splits and not known:
      walk.notes.append(f'{_names(splits)} is a class, because there is no folder train')
    rows, splits = walk.classes(root, ''), {}
    where = 'DIR/CLASS/*'
  else:
    if others := sorted(set(inner) - set(splits)):
      raise UserError(
        f'{one_line(root)} has {_names(splits)} and also {_names(others)}: classes belong below each split, such as '
        f'train/{one_line(others[0])}; if train is a class, rename its folder'
      )
    if len(set(splits.values())) < len(splits):
      raise UserError(f'{one_line(root)} has {_names(splits)}, which are two names of one split: join them')
    rows = [row for name, split in sorted(splits.items()) for row in walk.classes(root / name, split)]
    where = 'DIR/train/CLASS/*'
  if direct:
    walk.notes.append(_outside(direct, root))
  if not rows:
    there = f', but {direct:,} directly in it' if direct else walk.other_endings()
    todo = _form(root, inner) if direct or not there else 'convert them to JPEG or PNG'
    raise UserError(f'{one_line(root)} has no pictures in the form {where}{there}: {todo}')
  if len(found := {row[0] for row in rows}) < 2 and not known:
    raise UserError(
      f'{one_line(root)} has one class, {one_line(*found)}, and a classifier needs two or more: {_form(root, inner)}'
    )
  if endings := walk.other_endings():
    walk.notes.append(endings.removeprefix(', only '))
  rows.sort(key=lambda row: (row[0], same_name(row[1]), row[1]))
  classes, files, of = (list(column) for column in zip(*rows, strict=True))
  refused = [f'{one_line(path)} cannot be opened ({why}): its pictures are left out' for path, why in walk.refused]
  return Listing(files, classes, of, splits, [*_hint(root), *walk.notes, *refused])


def _check(root: pathlib.Path) -> None:
  try:
    kind = 'there is no such folder' if not root.exists() else '' if root.is_dir() else 'it is a file'
  except OSError as error:
    kind = error.strerror
  if kind:
    raise UserError(f'config.data.source_dir={one_line(root)}: {kind}; give the folder that holds a folder per class')


def _form(root: pathlib.Path, inner: Sequence[str]) -> str:
  if len(inner) == 1:
    return f'give --config.data.source_dir={one_line(root / inner[0])} if that is the folder of the classes'
  return 'put the pictures of each class into a folder with its name'


def _hint(root: pathlib.Path) -> list[str]:
  """Asks whether the folder of one split was meant to be the whole."""
  if root.name.lower() not in SPLIT_FOLDERS:
    return []
  beside = [n for n in SPLIT_FOLDERS if n != root.name.lower() and (root.parent / n).is_dir()]
  if not beside:
    return []
  return [
    f'{one_line(root)} looks like one split of {one_line(root.parent)}: with --config.data.source_dir='
    f'{one_line(root.parent)} the pictures in {_names(beside)} would be used too'
  ]


def _outside(count: int, folder: pathlib.Path) -> str:
  return f'pictures directly in {one_line(folder)} ({count:,}) belong to no class: they are left out'


def _names(names: Iterable[str]) -> str:
  names = sorted(names)
  return ', '.join(f'{one_line(name)}/' for name in names[:5]) + (', ...' if names[5:] else '')


class Walk:
  """Reads folders, and collects what it left out."""

  def __init__(self, root: pathlib.Path):
    self._root, self.notes, self._endings = root, [], collections.Counter()
    self.refused = []  # path and reason of folders that cannot be opened
    self._above = set()  # identities of folders that a link must not lead back to

  def other_endings(self) -> str:
    """Returns how many files had which endings that are not those of pictures; empty if there were none."""
    if not self._endings:
      return ''
    most = sorted(self._endings.items(), key=lambda item: (-item[1], item[0]))[:4]
    most = ', '.join(f'{count:,} {one_line(ending)}' for ending, count in most)
    return f', only files that are no pictures: {most}{", ..." if len(self._endings) > 4 else ""}'

  def _entries(self, folder: pathlib.Path | str) -> tuple[list[os.DirEntry], list[str]]:
    """Returns the folders in a folder, and the names of its pictures, sorted. One that cannot be opened is empty."""
    folders, names = [], []
    try:
      with os.scandir(folder) as entries:
        for entry in entries:
          if entry.name.startswith('.') or entry.name.lower() in NO_DATA:
            continue
          if _is_folder(entry):
            folders.append(entry)
          elif pictures.is_picture_name(entry.name):
            names.append(entry.name)
          else:
            self._endings[os.path.splitext(entry.name)[1].lower() or 'without ending'] += 1
    except OSError as error:
      self.refused.append((os.fspath(folder), error.strerror))
    return sorted(folders, key=lambda entry: entry.name), sorted(names)

  def children(self, folder: pathlib.Path) -> tuple[list[str], int]:
    """Returns the names of the folders in a folder, and the number of pictures directly in it."""
    self._above.add(_identity(folder))
    folders, names = self._entries(folder)
    return [entry.name for entry in folders], len(names)

  def classes(self, parent: pathlib.Path, split: str) -> list[tuple[str, str, str]]:
    """Returns class, file and split of every picture in the class folders of a folder."""
    folders, direct = self._entries(parent)
    if direct and split:
      self.notes.append(_outside(len(direct), parent))
    self._above.add(_identity(parent))
    rows, spellings = [], set()
    for entry in folders:
      name = same_name(entry.name)
      if one_line(name) != name:
        raise UserError(f'{one_line(entry.path)}: the name of a class cannot be printed: rename the folder')
      if name in spellings:
        raise UserError(f'{one_line(parent)} has two folders {name} in two Unicode forms: join them')
      spellings.add(name)
      before = len(self.notes) + len(self.refused)
      files = self._files(entry)
      rows += [(name, file, split) for file in files]
      if not files and len(self.notes) + len(self.refused) == before:
        self.notes.append(f'{one_line(entry.path)} has no pictures: it is no class')
    return rows

  def _files(self, top: os.DirEntry) -> list[str]:
    """Returns the pictures below a class folder, relative to the root."""
    files = []
    for path, folders, names in self.below(top.path):
      if path == top.path and any(name.lower() == 'train' for name in folders):
        raise UserError(
          f'{one_line(path)} holds {_names(folders)}: splits belong above the classes, such as '
          f'{one_line(self._root)}/train/{one_line(top.name)}; if {one_line(top.name)} is the folder of all pictures, '
          f'give --config.data.source_dir={one_line(path)}'
        )
      start = os.path.relpath(path, self._root).replace(os.sep, '/')
      files += [f'{start}/{name}' for name in names]
    return files

  def below(self, top: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields a folder and every folder below it, with the names of the folders and pictures in it.

    Each real folder counts once, because links may form loops.
    """
    seen, left = set(self._above), [top]
    while left:
      path = left.pop()
      identity = _identity(path)
      if identity in seen:
        self.notes.append(f'{one_line(path)} is a link to a folder that is read already: it is left out')
        continue
      seen.add(identity)
      folders, names = self._entries(path)
      yield path, [entry.name for entry in folders], names
      left += [entry.path for entry in reversed(folders)]


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
  status = os.stat(folder)
  return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # a loop of links: opening it as a picture says so
    return False
