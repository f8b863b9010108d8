"""Divides the pictures of a folder into splits, and keeps the division in a file, `split.csv`."""

import collections
import csv
import hashlib
import io
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence

from googlenet_jax.data.listing import same_name
from googlenet_jax.data.splits import SKIPPED, SPLITS
from googlenet_jax.host import files as files_lib
from googlenet_jax.host import processes
from googlenet_jax.host.errors import UserError, one_line

FILE = 'split.csv'
HEAD = ['file', 'class', 'split']


def divide(
  files: Sequence[str],
  classes: Sequence[str],
  splits: Sequence[str],
  digests: Sequence[bytes],
  shares: Mapping[str, float],
  seed: int,
) -> list[str]:
  """Chooses a split for every picture whose folder does not choose one.

  A hash of seed and file name orders the pictures of a class; the first ones are for the test, the next ones for
  validation. So the same files are divided in the same way on every machine, whatever else is in other classes. A class
  gets its share rounded, and at least one picture in each split if it has enough for all. With fewer, training comes
  first, then the test. Equal files come into the same split; equal files of several classes into training.

  Args:
    files: names of pictures.
    classes: their classes.
    splits: 'validation' or 'test' if their folders say so; 'train' or '' for those that are divided.
    digests: equal for equal files; empty where no file is equal.
    shares: 'test' and 'validation' to a share of the pictures that are divided; a split that is missing gets none.
    seed: goes into the hash.

  Returns:
    'train', 'validation' or 'test' for each picture.
  """
  chosen = ['train' if split in ('', 'train') else split for split in splits]
  divided = [i for i, split in enumerate(chosen) if split == 'train']
  groups = collections.defaultdict(list)
  for i in divided:
    groups[digests[i] or i].append(i)
  rank = {i: (_hash(seed, files[i]), files[i]) for i in divided}
  of_class = collections.defaultdict(list)
  for group in groups.values():
    of_class[classes[group[0]] if len({classes[i] for i in group}) == 1 else None].append(group)
  counts = collections.Counter(classes[i] for i in divided)
  for name, own in of_class.items():
    if name is None:
      continue  # in training already
    ordered = sorted(own, key=lambda group: min(rank[i] for i in group))
    for group, split in zip(ordered, _place(ordered, _counts(counts[name], shares)), strict=True):
      for i in group:
        chosen[i] = split
  return chosen


def _place(groups: Sequence[Sequence[int]], room: Mapping[str, int]) -> list[str]:
  """Returns a split for each group of equal files: the first one with room for all of it, otherwise training."""
  left, found = dict(room), []
  for group in groups:
    split = next((split for split in left if left[split] >= len(group)), 'train')
    found.append(split)
    if split != 'train':
      left[split] -= len(group)
  for split in room:
    if split not in found and found.count('train') > 1:  # every group is too large: better one of them than none
      found[found.index('train')] = split
  return found


def _hash(seed: int, file: str) -> bytes:
  return hashlib.sha256(f'{seed}/{same_name(file)}'.encode('utf-8', 'surrogateescape')).digest()


def _counts(total: int, shares: Mapping[str, float]) -> dict[str, int]:
  """Returns how many of the pictures of a class go to the test and to validation."""
  wanted = [split for split in ('test', 'validation') if shares.get(split)]
  if total <= len(wanted):
    return dict.fromkeys(wanted[: total - 1], 1)
  counts = {split: max(1, math.floor(total * shares[split] + 0.5)) for split in wanted}
  while sum(counts.values()) >= total:
    counts[max(counts, key=counts.get)] -= 1
  return counts


def equal_files(
  files: Sequence[str], classes: Sequence[str], splits: Sequence[str], digests: Sequence[bytes]
) -> list[str]:
  """Says which pictures lie in two splits or two classes, byte for byte."""
  groups = collections.defaultdict(list)
  for i, digest in enumerate(digests):
    if digest and splits[i] != SKIPPED:
      groups[digest].append(i)
  notes = []
  for what, of in (('splits', splits), ('classes', classes)):
    pairs = []
    for group in groups.values():
      other = next((i for i in group if of[i] != of[group[0]]), None)
      if other is not None:
        pairs.append((group[0], other))
    if pairs:
      more = f', and {len(pairs) - 1:,} more' if pairs[1:] else ''
      first, second = (one_line(files[i]) for i in pairs[0])
      notes.append(f'the same picture is in two {what}: {first} and {second}{more}')
  return notes


def to_text(rows: Sequence[tuple[str, str, str]]) -> str:
  """Returns `split.csv` as text: a row of file, class and split for each picture."""
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows([HEAD, *rows])
  return text.getvalue()


def write(workdir: pathlib.Path, rows: Sequence[tuple[str, str, str]]) -> None:
  """Writes `split.csv`, in the first process only."""
  if processes.is_first():
    with files_lib.replacing(workdir / FILE) as temporary:
      temporary.write_bytes(to_text(rows).encode('utf-8', 'surrogateescape'))


def read(path: pathlib.Path) -> list[tuple[str, str, str]]:
  """Reads a `split.csv`.

  Raises:
    UserError: the file cannot be read or has another form.
  """
  try:
    text = path.read_bytes().decode('utf-8', 'surrogateescape')
  except OSError as error:
    raise UserError(f'{one_line(path)} cannot be read: {error.strerror}') from error
  try:
    head, *rows = csv.reader(io.StringIO(text, newline=''), strict=True)
  except (csv.Error, ValueError) as error:
    raise UserError(f'{one_line(path)} is damaged ({error}): take it from a copy of the run') from error
  for number, row in enumerate(itertools.chain([head], rows)):
    if (row != HEAD) if number == 0 else (len(row) != 3 or row[2] not in (*SPLITS, SKIPPED)):
      raise UserError(
        f'{one_line(path)}, row {number + 1}: expected {", ".join(HEAD)}, with {", ".join(SPLITS)} or {SKIPPED} as '
        f'split, found {one_line(",".join(row))}'
      )
  return [tuple(row) for row in rows]
