"""A run as the report reads it: with answers and pictures if the data and a checkpoint are here, otherwise without."""

import csv
import dataclasses
import functools
import io
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from googlenet_jax import loading, runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.evaluation import stored
from googlenet_jax.host import backend, console, files, sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.page import results
from googlenet_jax.page.results import ClassRow, Results

CURVES_ONLY = (
  'This run has saved no checkpoint yet, so the report has its curves and its layers only. Make it again after the '
  'first checkpoint.'
)
NO_DATA = (
  'The images of this run are not on the machine that answered them, so there are no pictures, and only what the '
  'files of the run say of its answers. --config.data.source_dir=DIR (or data_dir) says where they are now.'
)


@dataclasses.dataclass(frozen=True)
class Subject:
  """A run or an ensemble, and what is known of it."""

  workdir: pathlib.Path
  run: runs.Run
  classifier: Classifier  # without networks if there is no checkpoint
  results: Results | None
  notes: tuple[str, ...]  # what is missing, and how to get it

  @property
  def name(self) -> str:
    """Name of the folder."""
    return self.workdir.resolve().name

  @property
  def data(self) -> str:
    """Name of the data set; of a folder of pictures its own name."""
    if self.results:
      return self.results.dataset
    data = self.run.config.data
    return pathlib.PurePath(data.source_dir).name or data.name

  @property
  def folders(self) -> list[pathlib.Path]:
    """The folder of each member; a single run has one."""
    return runs.members(self.workdir)

  @functools.cached_property
  def content(self) -> dict[str, Any]:
    """run.json as it is; the first member's."""
    return files.read_json(self.folders[0] / runs.FILE)

  @functools.cached_property
  def summary(self) -> dict[str, Any]:
    """summary.json; empty for an ensemble or a run that has not ended."""
    return files.read_json(self.workdir / 'summary.json')

  @functools.cached_property
  def evaluation(self) -> dict[str, Any]:
    """evaluation.json of the test images; empty if nobody evaluated the run, or if it has other classes."""
    return stored.read(self.workdir, len(self.run.classes))

  @property
  def confusion(self) -> np.ndarray | None:
    """The confusion matrix of the test images, from answers or from evaluation.json; None if nobody knows it."""
    if self.results:
      return self.results.confusion
    return np.array(self.evaluation['confusion_matrix']) if self.evaluation else None

  @property
  def accuracy(self) -> tuple[float, str] | None:
    """The accuracy on the test images, and where it comes from; None if nobody knows it."""
    if self.results:
      right, count = np.trace(self.results.confusion), len(self.results.split)
      together = f', {len(self.classifier.networks)} networks together' if self.classifier.networks[1:] else ''
      return self.results.evaluation.accuracy, f'{right:,} of {count:,} {self.results.split_name} images{together}'
    if found := self.evaluation:
      return found['accuracy'], f'{found["examples"]:,} test images, from evaluation.json at step {found["step"]}'
    if isinstance(found := self.summary.get('test_accuracy'), float):
      return found, f'test images, from summary.json at step {self.summary.get("steps")}'
    return None

  @property
  def loss(self) -> float | None:
    """The loss on the test images; None if nobody knows it."""
    if self.results:
      return self.results.evaluation.loss
    found = self.evaluation.get('loss', self.summary.get('test_loss'))
    return found if isinstance(found, float) else None

  def per_class(self) -> tuple[list[ClassRow], str]:
    """Returns the scores of the classes, and where they come from; an empty list if nobody knows them."""
    if self.results:
      return self.results.per_class(), f'{len(self.results.split):,} {self.results.split_name} images'
    if self.evaluation:
      return results.class_rows(self.run.classes, self.confusion), 'from evaluation.json'
    return _rows_of_file(self.workdir / 'per_class.csv', self.run.classes), 'from per_class.csv'


def _rows_of_file(path: pathlib.Path, classes: tuple[str, ...]) -> list[ClassRow]:
  """Reads per_class.csv; an empty list if it is missing, damaged, or about other classes."""
  try:
    rows = [*csv.reader(io.StringIO(path.read_text(encoding='utf-8', errors='surrogateescape'), newline=''))][1:]
    found = [
      ClassRow(name, *(float(score) if score else None for score in scores), int(support))
      for name, *scores, support in rows
    ]
  except (OSError, ValueError, TypeError, csv.Error):
    return []
  return found if tuple(row.name for row in found) == classes else []


def is_weights(workdir: pathlib.Path) -> bool:
  """Returns whether it is a file of weights, and not the folder of a run."""
  return workdir.suffix in loading.WEIGHTS and workdir.is_file()


def can_answer(workdir: pathlib.Path) -> bool:
  """Returns whether a run, or every member of an ensemble, has a checkpoint."""
  return all(map(runs.has_checkpoints, runs.members(workdir)))


def run_in(workdir: pathlib.Path) -> runs.Run:
  """Returns what run.json says of a run, or of the first member of an ensemble.

  Raises:
    UserError: there is no run.
  """
  if is_weights(workdir):
    raise UserError(f'{workdir} is a file of weights, which knows no run: give the folder of a run')
  return runs.read(runs.members(workdir)[0])


def of_both(data: Mapping[str, str] | None, one: pathlib.Path, other: pathlib.Path) -> Mapping[str, str] | None:
  """Returns `data`, where the images of a run are now, if another run was trained on the same ones; or else None."""
  if not data or is_weights(other):
    return None
  trained_on = lambda folder: [run_in(folder).config.data[key] for key in ('name', 'source_dir', 'data_dir')]
  return data if trained_on(one) == trained_on(other) else None


def without_weights(run: runs.Run) -> Classifier:
  """Returns the classifier of a run that has no checkpoint: it knows its layers, and can answer nothing."""
  backend.start()
  return Classifier(run.config, run.classes, run.image_shape[-1], [], sharding.make_mesh(jax.local_devices()))


def read(workdir: pathlib.Path, step: int | str | None, data: Mapping[str, str] | None = None) -> Subject:
  """Reads a run, and answers its test images if they and a checkpoint are here.

  Args:
    workdir: folder of the run or the ensemble.
    step: step of the checkpoint, 'best', or None for the newest.
    data: where the run's images are now, as for `loading.load`.

  Raises:
    UserError: there is no run, no such checkpoint, it is damaged, or the images are not in `data`.
  """
  run = run_in(workdir)
  if step is None and not can_answer(workdir):
    console.say(f'note: {workdir}: {CURVES_ONLY}')
    return Subject(workdir, run, without_weights(run), None, (CURVES_ONLY,))
  classifier = loading.load(workdir, step, data=data)

  def say(why: str) -> None:
    if data:
      raise UserError(why)
    console.say(f'note: {why}')  # not in the report: it may name folders of this machine

  found = results.load_results(workdir, classifier, 'test', say)
  return Subject(workdir, run, classifier, found, (NO_DATA,) if found is None else tuple(filter(None, [found.note])))
