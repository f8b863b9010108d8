"""`--mode=predict`: names the classes of picture files."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from googlenet_jax import loading
from googlenet_jax.classifier import PARTS, Classifier
from googlenet_jax.data import inputs, splits
from googlenet_jax.evaluation import sources
from googlenet_jax.evaluation.sources import Found, Picture, columns
from googlenet_jax.host import console, files
from googlenet_jax.host.errors import UserError, one_line

SHOWN = 24  # pictures in predictions.png
THUMBNAIL = 256  # pixels: side of these pictures in memory
NAME_COLUMNS, CLASS_COLUMNS = 60, 24  # longer names are written whole, but columns are not aligned to them
BAR_FROM = 200  # pictures: fewer need no progress bar


class Answer(NamedTuple):
  """What the network says about a picture."""

  picture: Picture
  labels: np.ndarray  # int64 [top], likeliest first
  probabilities: np.ndarray  # float32 [top]


def predict_paths(
  workdir: pathlib.Path,
  paths: Sequence[str],
  step: int | str | None = None,
  top: int = 5,
  crop_count: int = 1,
  output: pathlib.Path | None = None,
) -> int:
  """Prints the likeliest classes of pictures, a line each; writes predictions.csv and predictions.png.

  Args:
    workdir: folder of a run or an ensemble, or a file of weights.
    paths: files, folders, patterns, `-`; see `sources.find`.
    step: step of the checkpoint, 'best', or None for the newest.
    top: classes for each picture.
    crop_count: crops or views per picture, one of `crops.COUNTS`.
    output: folder to write to; by default `predict` in the workdir. If that cannot be written, nothing is.

  Returns:
    The exit status: 0, or 1 if pictures could not be read.

  Raises:
    UserError: there is no such run, or no picture could be read.
  """
  classifier = loading.load(workdir, step)
  classes, top = classifier.classes, min(top, len(classifier.classes))
  found = sources.find(paths, classes)
  folder = output_folder(workdir, output, 'predict')
  line, gallery, count = _line_writer(found, classes), _Gallery(len(found)), _Count()
  compute = lambda batch: classifier.batch_probabilities(batch, crop_count)
  with _csv_rows(folder, top) as write, progress(len(found)) as bar:
    # With several crops the cutting belongs to the network's program, which takes long to compile.
    for part in batches(classifier, found, compute, grow=crop_count > 1):
      lines = []
      for picture, row in part:
        if row is None:
          say_unread(picture, len(found))
          count.unread += 1
          write([picture.found.name, *[''] * (2 * top), picture.found.true_class, picture.error])
          continue
        labels = np.argsort(-row, kind='stable')[:top]
        answer = Answer(picture, labels, row[labels])
        lines.append(line(answer))
        write(_row(answer, classes))
        count.add(picture.found.true_class, classes[labels[0]])
        gallery.add(answer, count.read + count.unread)
      if lines:
        console.say('\n'.join(lines))
      bar.update(len(part))
  check_read(count.read, len(found), picture)
  if count.known:
    console.say(count.accuracy())
  if folder:
    gallery.draw(classes, folder / 'predictions.png', workdir, count)
    console.say(f'written to {folder}: predictions.csv, predictions.png')
  return status(count.unread, len(found), '; the column error of predictions.csv says why' if folder else '')


@dataclasses.dataclass
class _Count:
  """How many pictures were read, how many of them have a known class, and how many answers are right."""

  read: int = 0
  unread: int = 0
  known: int = 0
  right: int = 0

  def add(self, true_class: str, said: str) -> None:
    self.read += 1
    self.known += bool(true_class)
    self.right += true_class == said

  def accuracy(self) -> str:
    whose = 'pictures' if self.known == self.read else 'pictures whose class the folder tells'
    return f'accuracy {self.right / self.known:.4f} ({self.right} of {self.known} {whose})'


# What --mode=explain uses too ----------------------------------------------------------------------------------------


def batches(
  classifier: Classifier, found: Sequence[Found], compute: Callable[[dict[str, np.ndarray]], Sequence], grow: bool
) -> Iterator[list[tuple[Picture, Any]]]:
  """Reads pictures and computes something for as many at once as the network sees.

  Args:
    classifier: it prepares the pictures.
    found: what to read.
    compute: gets a batch of `inputs.on_canvas` and returns a result for each of its pictures.
    grow: whether the canvas never becomes smaller, so `compute` compiles few programs.

  Yields:
    Pictures in the order of `found`, each with its result, or None for one that cannot be read.
  """
  side, read = 1, sources.read_ahead(found, classifier.channels, classifier.recipe.data.canvas)
  while part := list(itertools.islice(read, PARTS[-1])):
    readable = [picture.pixels for picture in part if picture.pixels is not None]
    results = iter(())
    if readable:
      batch = inputs.on_canvas(readable, classifier.recipe.data.canvas, side)
      side = batch['image'].shape[1] if grow else 1
      results = iter(compute(batch))
    yield [(picture, None if picture.pixels is None else next(results)) for picture in part]


def progress(total: int) -> tqdm.tqdm:
  """Returns a progress bar on stderr; it shows nothing where stderr is no terminal or there is little to do."""
  return tqdm.tqdm(
    total=total, unit=' pictures', disable=total < BAR_FROM or not console.is_terminal(sys.stderr), leave=False
  )


def say_unread(picture: Picture, total: int) -> None:
  """Says on stderr why a picture cannot be read; `check_read` says it where there is no other."""
  if total > 1:
    console.complain(f'error: {picture.error}')


def check_read(read: int, total: int, last: Picture) -> None:
  """Raises UserError if not one picture could be read."""
  if not read:
    raise UserError(f'none of {total} pictures can be read' if total > 1 else last.error)


def status(unread_count: int, total: int, where: str = '') -> int:
  """Returns the exit status: 0, or 1 if some pictures could not be read, which it says on stderr."""
  if unread_count:
    console.complain(f'{unread_count} of {total} pictures could not be read{where}')
  return int(unread_count > 0)


def output_folder(workdir: pathlib.Path, output: pathlib.Path | None, name: str) -> pathlib.Path | None:
  """Makes the folder for the files of a mode; None, with a note, if the workdir cannot be written.

  Raises:
    UserError: `output` is given and cannot be written.
  """
  folder = output or (workdir if workdir.is_dir() else workdir.with_suffix('')) / name
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with files.replacing(folder / '.writable') as temporary:
      temporary.touch()
    (folder / '.writable').unlink()
  except OSError as error:
    if output:
      raise UserError(f'--output={output} cannot be written: {error.strerror}') from error
    note = f'note: {folder} cannot be written ({error.strerror}), so no files are: --output=DIR names another folder'
    console.complain(note)
    return None
  return folder


# Lines, rows, pictures -----------------------------------------------------------------------------------------------


def _line_writer(found: Sequence[Found], classes: Sequence[str]) -> Callable[[Answer], str]:
  """Returns a function that writes an answer as a line; the columns of all lines are aligned."""
  fitting = lambda texts, most: max((width for text in texts if (width := columns(text)) <= most), default=0)
  name_width = fitting((one_line(one.name) for one in found if not one.error), NAME_COLUMNS)
  class_width = fitting(map(one_line, classes), CLASS_COLUMNS)
  padded = lambda text, width: text + ' ' * (width - columns(text))

  def line(answer: Answer) -> str:
    parts = [
      f'{padded(one_line(classes[label]), class_width)} {probability:.2f}'
      for label, probability in zip(answer.labels, answer.probabilities, strict=True)
    ]
    return '  '.join([padded(one_line(answer.picture.found.name), name_width), *parts])

  return line


@contextlib.contextmanager
def _csv_rows(folder: pathlib.Path | None, top: int) -> Iterator[Callable[[list], None]]:
  """Gives a function that adds a row to predictions.csv, or does nothing without a folder.

  If the block ends early, predictions.csv holds the rows that are complete, and a note says so.
  """
  if folder is None:
    yield lambda row: None
    return
  head = [f'{what}_{place}' for place in range(1, top + 1) for what in ('class', 'probability')]
  path, ends = folder / 'predictions.csv', []  # bytes of the file after each row
  with files.replacing(path) as temporary:
    try:
      with temporary.open('wb') as file:

        def write(row: list) -> None:
          # surrogateescape: the bytes of a file name, also where they are no UTF-8
          file.write(files.csv_text([row]).encode(errors='surrogateescape'))
          file.flush()
          ends.append(file.tell())

        write(['file', *head, 'true_class', 'error'])
        yield write
    except BaseException:
      if ends[1:]:
        os.truncate(temporary, ends[-1])
        temporary.replace(path)
        console.complain(f'note: {path} holds the first {len(ends) - 1} pictures')
      raise


def _row(answer: Answer, classes: Sequence[str]) -> list[str]:
  cells = []
  for label, probability in zip(answer.labels, answer.probabilities, strict=True):
    cells += [classes[label], f'{probability:.6g}']
  return [answer.picture.found.name, *cells, answer.picture.found.true_class, '']


class _Gallery:
  """Keeps small copies of some pictures, spread evenly, for predictions.png."""

  def __init__(self, total: int):
    self._due = list(np.unique(np.linspace(0, total - 1, SHOWN).astype(int)))
    self._answers = []

  def add(self, answer: Answer, place: int) -> None:
    """Keeps a picture if one is due at this place, counted from 1, or was due at places that cannot be read."""
    if self._due and place > self._due[0]:
      self._due.pop(0)
      image, size = splits.on_canvas([answer.picture.pixels], THUMBNAIL)
      (pixels,) = splits.pictures({'image': image, 'size': size})
      self._answers.append(answer._replace(picture=answer.picture._replace(pixels=pixels)))

  def draw(self, classes: Sequence[str], path: pathlib.Path, workdir: pathlib.Path, count: _Count) -> None:
    """Draws the pictures with their answers."""
    if not files.is_writer():
      return
    from googlenet_jax.evaluation import galleries  # matplotlib takes a second to import
    from googlenet_jax.evaluation.drawing import plural

    spread = f'{len(self._answers)} of ' if len(self._answers) < count.read else ''
    title = (
      f'{spread}{plural(count.read, "picture")}{", evenly spread," if spread else ""} and the answers of {workdir}'
    )
    title += f'\n{count.accuracy()}' if count.known else ''
    shown = [
      (answer.picture.pixels, answer.picture.found, classes[answer.labels[0]], float(answer.probabilities[0]))
      for answer in self._answers
    ]
    galleries.answers(shown, path, title)
