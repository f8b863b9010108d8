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
from googlenet_jax.evaluation.output import Output
from googlenet_jax.evaluation.sources import Found, Picture, columns
from googlenet_jax.host import console, files, processes
from googlenet_jax.host.errors import UserError, one_line

SHOWN = 24  # pictures in predictions.png
THUMBNAIL = 256  # pixels: side of these pictures in memory
NAME_COLUMNS, CLASS_COLUMNS = 60, 24  # longer names are written whole, but columns are not aligned to them
BAR_FROM = 200  # pictures: fewer need no progress bar


class Answer(NamedTuple):
  """What the network says about a picture."""

  picture: Picture
  labels: list[int]  # likeliest first
  probabilities: list[float]


def predict_paths(
  workdir: pathlib.Path,
  paths: Sequence[str],
  step: int | str | None = None,
  top: int = 5,
  crop_count: int = 1,
  output: pathlib.Path | None = None,
) -> int:
  """Prints the likeliest classes of pictures, a line each; writes predictions.csv and predictions.png.

  Several processes share the pictures out. The first one prints and writes, in the order of the pictures.

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
    UserError: there is no such run, no picture could be read, or `output` cannot be written.
  """
  classifier = loading.load(workdir, step)
  processes.agree('checkpoints', {'step': classifier.steps})
  classes, top = classifier.classes, min(top, len(classifier.classes))
  found = processes.of_first(sources.find(paths, classes) if processes.is_first() else None)
  found = [Found(*one) for one in found]
  place = output_of(workdir, output, 'predict')
  read = lambda one: sources.read(one, classifier.channels, classifier.recipe.data.canvas)
  line, gallery, count = _line_writer(found, classes), _Gallery(len(found), read), _Count()
  compute = lambda batch: [_likeliest(row, top) for row in classifier.batch_probabilities(batch, crop_count)]
  with _Rows(place, top) as rows, progress(len(found)) as bar:
    # With several crops the cutting belongs to the network's program, which takes long to compile.
    own = batches(classifier, share(found), compute, grow=crop_count > 1)
    for part in gathered(own, found):
      lines = []
      for picture, likeliest in part:
        if likeliest is None:
          say_unread(picture, len(found))
          count.unread += 1
          rows.write([picture.found.name, *[''] * (2 * top), picture.found.true_class, picture.error])
          continue
        answer = Answer(picture, *likeliest)
        lines.append(line(answer))
        rows.write(_row(answer, classes))
        count.add(picture.found.true_class, classes[answer.labels[0]])
        gallery.add(answer, count.read + count.unread)
      if lines:
        console.say('\n'.join(lines))
      bar.update(len(part))
  check_read(count.read, len(found), picture)
  if count.known:
    console.say(count.accuracy())
  where = '; the column error of predictions.csv says why' if place.is_open else ''
  place.write('predictions.png', lambda path: gallery.draw(classes, path, workdir, count))
  place.say()
  return status(count.unread, len(found), where)


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


def share(found: Sequence[Found]) -> list[Found]:
  """Returns the pictures that this process reads: groups, as large as the network sees them, go round."""
  starts = range(processes.index() * PARTS[-1], len(found), processes.count() * PARTS[-1])
  return [one for start in starts for one in found[start : start + PARTS[-1]]]


def gathered(own: Iterator[list[tuple[Picture, Any]]], found: Sequence[Found]) -> Iterator[list[tuple[Picture, Any]]]:
  """Yields what all processes found out, in the order of the pictures. All processes must use it up.

  Args:
    own: from `batches`, for the `share` of this process; the results are JSON values.
    found: all pictures.

  Yields:
    As `batches`. Pictures that another process has read come without pixels.
  """
  groups = (found[start : start + PARTS[-1]] for start in range(0, len(found), PARTS[-1]))
  for _ in range(0, len(found), processes.count() * PARTS[-1]):
    part = next(own, [])
    everyone = processes.gather([[result, picture.error] for picture, result in part])
    for number, answers in enumerate(filter(None, everyone)):
      pictures = [Picture(one, error=error) for one, (_, error) in zip(next(groups), answers, strict=True)]
      if number == processes.index():
        pictures = [picture for picture, _ in part]
      yield [(picture, result) for picture, (result, _) in zip(pictures, answers, strict=True)]


def progress(total: int) -> tqdm.tqdm:
  """Returns a progress bar on stderr; it shows nothing where stderr is no terminal or there is little to do."""
  return tqdm.tqdm(
    total=total,
    unit=' pictures',
    disable=total < BAR_FROM or not (processes.is_first() and console.is_terminal(sys.stderr)),
    leave=False,
  )


def say_unread(picture: Picture, total: int) -> None:
  """Says on stderr why a picture cannot be read; `check_read` says it where there is no other."""
  if total > 1 and processes.is_first():
    console.complain(f'error: {picture.error}')


def check_read(read: int, total: int, last: Picture) -> None:
  """Raises UserError if not one picture could be read."""
  if not read:
    raise UserError(f'none of {total} pictures can be read' if total > 1 else last.error)


def status(unread_count: int, total: int, where: str = '') -> int:
  """Returns the exit status: 0, or 1 if some pictures could not be read, which it says on stderr."""
  if unread_count and processes.is_first():
    console.complain(f'{unread_count} of {total} pictures could not be read{where}')
  return int(unread_count > 0)


def output_of(workdir: pathlib.Path, output: pathlib.Path | None, name: str) -> Output:
  """Returns the place for the files of a mode: the folder that the user gave, or `name` in the workdir."""
  return Output(output or (workdir if workdir.is_dir() else workdir.with_suffix('')) / name, output is not None)


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


class _Rows:
  """Writes predictions.csv row by row, and keeps the rows that are complete, whatever ends the work."""

  def __init__(self, output: Output, top: int):
    """Begins the file with its head; without a place nothing is written.

    Args:
      output: where it goes.
      top: classes in a row.
    """
    self._output, self._file, self._replacing = output, None, contextlib.ExitStack()
    self._ends = []  # bytes of the file after each row
    if output.is_open:
      self._path = output.path('predictions.csv')
      try:
        self._temporary = self._replacing.enter_context(files.replacing(self._path))
        self._file = self._temporary.open('wb', buffering=0)
      except OSError as error:
        output.stop(error, self._path)
    head = [f'{what}_{place}' for place in range(1, top + 1) for what in ('class', 'probability')]
    self.write(['file', *head, 'true_class', 'error'])

  def write(self, row: list) -> None:
    """Adds a row. If it cannot be written, the rows so far are kept, and later ones are not written."""
    if self._file is None:
      return
    # surrogateescape: the bytes of a file name, also where they are no UTF-8
    left = files.csv_text([row]).encode(errors='surrogateescape')
    try:
      while left:
        left = left[self._file.write(left) :]
    except OSError as error:
      self._end(whole=False)
      self._output.stop(error, self._path)
    else:
      self._ends.append(self._file.tell())

  def _end(self, whole: bool) -> None:
    file, self._file = self._file, None
    file.close()
    if not whole and self._ends[1:]:
      os.truncate(self._temporary, self._ends[-1])
      console.complain(f'note: {self._path} holds the first {len(self._ends) - 1} pictures')
    elif not whole:
      self._temporary.unlink()  # an older file stays
      return
    try:
      self._replacing.close()
      self._output.note(self._path)
    except OSError as error:
      self._output.stop(error, self._path)

  def __enter__(self) -> '_Rows':
    return self

  def __exit__(self, kind, error, trace) -> None:
    if self._file is not None:
      self._end(whole=error is None)


def _likeliest(row: np.ndarray, top: int) -> tuple[list[int], list[float]]:
  """Returns labels and probabilities of the likeliest classes."""
  labels = np.argsort(-row, kind='stable')[:top]
  return labels.tolist(), row[labels].tolist()


def _row(answer: Answer, classes: Sequence[str]) -> list[str]:
  cells = []
  for label, probability in zip(answer.labels, answer.probabilities, strict=True):
    cells += [classes[label], f'{probability:.6g}']
  return [answer.picture.found.name, *cells, answer.picture.found.true_class, '']


class _Gallery:
  """Keeps small copies of some pictures, spread evenly, for predictions.png."""

  def __init__(self, total: int, read: Callable[[Found], Picture]):
    """Keeps some of `total` pictures; `read` reads those that another process has read."""
    self._due = list(np.unique(np.linspace(0, total - 1, SHOWN).astype(int)))
    self._answers, self._read = [], read

  def add(self, answer: Answer, place: int) -> None:
    """Keeps a picture if one is due at this place, counted from 1, or was due at places that cannot be read."""
    if processes.is_first() and self._due and place > self._due[0]:
      picture = answer.picture if answer.picture.pixels is not None else self._read(answer.picture.found)
      if picture.pixels is None:  # it was removed meanwhile
        return
      self._due.pop(0)
      image, size = splits.on_canvas([picture.pixels], THUMBNAIL)
      (pixels,) = splits.pictures({'image': image, 'size': size})
      self._answers.append(answer._replace(picture=answer.picture._replace(pixels=pixels)))

  def draw(self, classes: Sequence[str], path: pathlib.Path, workdir: pathlib.Path, count: _Count) -> None:
    """Draws the pictures with their answers."""
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
