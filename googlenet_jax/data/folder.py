"""A data set from a folder of pictures, see `listing.py` for its form."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from googlenet_jax.data import dividing, headers, listing
from googlenet_jax.data.decoding import Damage, FolderImages, threads
from googlenet_jax.data.splits import SKIPPED, SPLITS, Dataset, Split
from googlenet_jax.host import console, progress
from googlenet_jax.host.errors import UserError, expanded, one_line

NAMED = 5  # files, classes, ... in a line
UNEQUAL = 10  # times as many pictures in one class as in another


def load(
  source_dir: str | os.PathLike,
  canvas: int = 512,
  channels: int = 0,
  validation_share: float = 0.1,
  test_share: float = 0.1,
  split_seed: int = 0,
  max_unreadable: float = 0.01,
  memory_mb: int = 2000,
  split_file: pathlib.Path | None = None,
  image_shape: tuple[int, int, int] | None = None,
  used: Sequence[str] = SPLITS,
) -> Dataset:
  """Loads the pictures of a folder, and says in a few lines what is there.

  Args:
    source_dir: the folder, `DIR/CLASS/*` or `DIR/{train,validation,test}/CLASS/*`.
    canvas: most pixels on a side; larger pictures are shrunk.
    channels: 1 for grey, 3 for colour; 0: grey if every picture is grey.
    validation_share: share for validation, if there is no such folder; 0: none.
    test_share: share for the test, if there is no such folder.
    split_seed: seed of the split.
    max_unreadable: largest share of pictures that cannot be read.
    memory_mb: pictures that take more megabytes are not kept in memory.
    split_file: the `split.csv` of a run, whose splits are taken; None to divide the pictures.
    image_shape: canvas and channels of a run; None to take what the pictures need.
    used: the splits that are needed: they are kept in memory, if they fit, and their files must be there.

  Returns:
    The data set. Its splits have `files`, and `skipped` has what cannot be read.

  Raises:
    UserError: the folder has another form, too many pictures cannot be read, or the splits lack something.
  """
  if not source_dir:
    raise UserError('config.data.name=folder needs a folder of pictures: give --config.data.source_dir=DIR')
  root = expanded(source_dir, 'config.data.source_dir').absolute()
  found = listing.find(root, known=split_file is not None)
  looked = headers.look(root, found.files)
  reasons = {found.files[i]: reason for i, reason in looked.reasons.items()}
  damage = Damage(root, len(found.files), max_unreadable, reasons)
  for note in found.notes:
    console.say(f'note: {note}')
  _name_some('unreadable', list(reasons.values()))
  if split_file is None:
    shares = {'test': test_share, 'validation': validation_share}
    chosen = _divided(found, looked, shares, split_seed)
  else:
    chosen = _followed(root, found, looked, split_file, used)
  for note in dividing.equal_files(chosen.files, chosen.classes, chosen.splits, chosen.digests):
    console.say(f'note: {note}')
  side, _, channels = image_shape or _image_shape(chosen, canvas, channels)
  dataset = _dataset(root, chosen, side, channels, damage)
  megabytes = sum(split in used for split in chosen.splits) * side * side * channels / 1e6
  if megabytes <= memory_mb:
    dataset, how = _in_memory(root, dataset, used, replace=split_file is not None)
    how = f'in memory ({megabytes:,.0f} MB, {how})'
  else:
    how = f'decoded in each epoch: {megabytes:,.0f} MB are more than config.data.memory_mb={memory_mb}'
  _say(dataset, how)
  return dataset


@dataclasses.dataclass(frozen=True)
class _Chosen:
  """Pictures with their splits."""

  files: list[str]
  classes: list[str]
  splits: list[str]  # one of SPLITS, or SKIPPED
  digests: list[bytes]
  sides: np.ndarray  # int32 [N], longer side; 0 for a file that cannot be read
  grey: np.ndarray  # bool [N]


def _name_some(what: str, lines: Sequence[str]) -> None:
  for line in lines[:NAMED]:
    console.say(f'{what}: {line}')
  if lines[NAMED:]:
    console.say(f'{what}: {len(lines) - NAMED:,} more')


# Splits --------------------------------------------------------------------------------------------------------------


def _divided(found: listing.Listing, looked: headers.Look, shares: dict[str, float], seed: int) -> _Chosen:
  """Divides the pictures; unreadable files are skipped."""
  given = set(found.splits)
  shares = {split: share for split, share in shares.items() if split not in given and share}
  if 'train' in given and shares:
    parts = ' and '.join(f'{share:.0%} for {split}' for split, share in shares.items())
    lacking = [split for split in shares if split not in found.folders.values()]
    missing = [f'there is no folder for {" or ".join(lacking)}'] if lacking else []
    missing += [f'there are no classes below {name}/' for name, split in found.folders.items() if split in shares]
    console.say(f'note: {" and ".join(missing)}: {parts} are taken from the training pictures')
  good = np.flatnonzero(looked.sides > 0)
  columns = ([column[i] for i in good] for column in (found.files, found.classes, found.splits, looked.digests))
  divided = iter(dividing.divide(*columns, shares, seed))
  splits = [next(divided) if side else SKIPPED for side in looked.sides]
  return _Chosen(found.files, found.classes, splits, looked.digests, looked.sides, looked.grey)


def _followed(
  root: pathlib.Path,
  found: listing.Listing,
  looked: headers.Look,
  split_file: pathlib.Path,
  used: Sequence[str],
) -> _Chosen:
  """Takes the splits of a run. Files of splits that are not used may be gone."""
  rows = dividing.read(split_file)
  alike = {listing.same_name(file): i for i, file in enumerate(found.files)}
  exactly = {file: i for i, file in enumerate(found.files)}
  places = [exactly.get(file, alike.get(listing.same_name(file))) for file, _, _ in rows]
  if gone := [file for (file, _, split), i in zip(rows, places, strict=True) if i is None and split in used]:
    more = f' and {len(gone) - 1:,} more' if gone[1:] else ''
    raise UserError(
      f'{one_line(root)} lacks {one_line(gone[0])}{more}, listed in {one_line(split_file)}: put them back, '
      'give their folder as --config.data.source_dir, or train anew in another --workdir'
    )
  kept = [(row, i) for row, i in zip(rows, places, strict=True) if i is not None or row[2] != SKIPPED]
  if not kept:
    raise UserError(f'{one_line(split_file)} lists no pictures: take it from a copy of the run')
  if new := len(found.files) - len({i for _, i in kept if i is not None}):
    console.say(f'note: {new:,} pictures are not in {one_line(split_file)}: they are new and left out')
  rows, places = (list(column) for column in zip(*kept, strict=True))
  files, classes, splits = (list(column) for column in zip(*rows, strict=True))
  files = [file if i is None else found.files[i] for file, i in zip(files, places, strict=True)]  # as spelled here
  places = [-1 if i is None else i for i in places]  # the last place: what is not there
  digests, sides, grey = [*looked.digests, b''], np.append(looked.sides, 0), np.append(looked.grey, False)
  return _Chosen(files, classes, splits, [digests[i] for i in places], sides[places], grey[places])


def _image_shape(chosen: _Chosen, canvas: int, channels: int) -> tuple[int, int, int]:
  """Returns the smallest canvas, up to `canvas`, that takes all pictures; grey if all are, unless `channels` says."""
  side = min(canvas, int(chosen.sides.max()))
  return side, side, channels or (1 if chosen.grey[chosen.sides > 0].all() else 3)


def _dataset(root: pathlib.Path, chosen: _Chosen, side: int, channels: int, damage: Damage) -> Dataset:
  """Makes the data set, with pictures that are decoded on demand."""
  names = _class_names(root, chosen)
  number = {name: i for i, name in enumerate(names)}
  made = {}
  for split in SPLITS:
    here = [i for i, of in enumerate(chosen.splits) if of == split]
    files = np.array([chosen.files[i] for i in here], object)
    labels = np.array([number[chosen.classes[i]] for i in here], np.int32)
    images = FolderImages(root, files, side, channels, damage, labels if split == 'train' else None)
    made[split] = Split(images, labels, None, files, damage.reasons) if here else None
  if made['test'] is None:
    raise UserError(f'{one_line(root)} has no pictures for the test: a class needs two or more that are not equal')
  skipped = [i for i, split in enumerate(chosen.splits) if split == SKIPPED]
  skipped = tuple((chosen.files[i], chosen.classes[i]) for i in skipped)
  return Dataset(root.name or 'folder', *made.values(), names, (side, side, channels), skipped)


def _class_names(root: pathlib.Path, chosen: _Chosen) -> tuple[str, ...]:
  """Returns the classes in sorted order, and says which splits lack which."""
  has = {split: set() for split in SPLITS}
  for of, split in zip(chosen.classes, chosen.splits, strict=True):
    if split != SKIPPED:
      has[split].add(of)
  names = sorted(set().union(*has.values()))
  if lacking := sorted(set(names) - has['train']):
    raise UserError(
      f'{one_line(root)}: no picture to train on in {some(lacking)}, which other splits have: add some, or delete it'
    )
  for split in ('test', 'validation'):
    if (lacking := sorted(set(names) - has[split])) and has[split]:
      console.say(f'note: no {split} pictures of {some(lacking)}: {split} accuracy says nothing about them')
  if len(names) < 2:
    raise UserError(f'{one_line(root)} has one class with pictures that can be read, {some(names)}: two are needed')
  return tuple(names)


def some(names: Sequence[str]) -> str:
  """Names the first few classes, and counts the others."""
  return ', '.join(names[:NAMED]) + (f' and {len(names) - NAMED:,} more classes' if names[NAMED:] else '')


# Memory --------------------------------------------------------------------------------------------------------------


def _in_memory(root: pathlib.Path, dataset: Dataset, used: Sequence[str], replace: bool) -> tuple[Dataset, str]:
  """Decodes the pictures of some splits, and says how fast; without `replace` damaged ones are skipped."""
  parts = {name: getattr(dataset, name) for name in used if getattr(dataset, name) is not None}
  total, skipped, done = sum(map(len, parts.values())), [*dataset.skipped], []
  with progress.waiting(f'decoding {total:,} pictures', '', lambda: f'{len(done):,} of {total:,}') as waiting:
    for name, split in parts.items():
      images, sizes, good = split.images.decoded(replace, done)
      damaged = np.setdiff1d(np.arange(len(split)), good)
      skipped += [(split.files[i], dataset.class_names[split.labels[i]]) for i in damaged]
      parts[name] = Split(images, split.labels[good], sizes, split.files[good], split.damaged)
  if 'validation' in parts and not len(parts['validation']):
    parts['validation'] = None
  if 'test' in parts and not len(parts['test']):
    raise UserError(f'{one_line(root)}: no test picture can be read: add some, or delete them and start anew')
  dataset = dataclasses.replace(dataset, **parts, skipped=tuple(skipped))
  left = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
  if not left.all():
    lacking = [dataset.class_names[i] for i in np.flatnonzero(left == 0)]
    raise UserError(f'{one_line(root)}: no picture to train on in {some(lacking)} can be read: add some, or delete it')
  return dataset, f'decoded at {total / waiting.seconds:,.0f} pictures a second by {threads()} threads'


def _say(dataset: Dataset, how: str) -> None:
  """Says in one line what the data set has, and in a note if classes are very unequal."""
  splits = [split for split in (dataset.train, dataset.validation, dataset.test) if split is not None]
  counts = np.bincount(np.concatenate([split.labels for split in splits]), minlength=len(dataset.class_names))
  fewest, most = counts.min(), counts.max()
  of_class = f'{fewest:,} to {most:,} a class, smallest {dataset.class_names[counts.argmin()]}'
  of_class = f'{fewest:,} a class' if fewest == most else of_class
  held = len(dataset.validation) if dataset.validation else 0
  console.say(
    f'{dataset.name}: {len(counts)} classes, {counts.sum():,} pictures ({of_class}); '
    f'{len(dataset.train):,} to train on, {held:,} validation, {len(dataset.test):,} test; '
    f'{len(dataset.skipped):,} skipped; {how}'
  )
  train = np.bincount(dataset.train.labels, minlength=len(counts))
  if train.max() > UNEQUAL * max(train.min(), 1):
    console.say(
      f'note: {dataset.class_names[train.argmax()]} has {train.max() / train.min():.0f} times as many training '
      f'pictures as {dataset.class_names[train.argmin()]}: --config.class_weights=balanced makes classes count the same'
    )
