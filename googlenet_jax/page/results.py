"""What a page and a report show of a run: answers with their pictures, tables, curves. No HTML is in here."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from googlenet_jax import runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import datasets
from googlenet_jax.data.splits import SPLITS, Split
from googlenet_jax.evaluation import evaluate, report
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.host import console, progress
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import layer_table

SIDE = 160  # pixels: the longer side of a thumbnail


class Answer(NamedTuple):
  """The answer to one image of a split."""

  name: str  # its file, or its place such as '#7'
  true: str  # its class
  said: str  # the class that the network says
  probability: float  # that of `said`
  probability_of_true: float

  @property
  def is_right(self) -> bool:
    """Whether the network says the class of the image."""
    return self.said == self.true


class ClassRow(NamedTuple):
  """Scores of one class; None where there is nothing to divide by."""

  name: str
  precision: float | None
  recall: float | None
  f1: float | None
  support: int  # images of the class


@dataclasses.dataclass(frozen=True)
class Results:
  """The answers of a run to every image of a split. `load_results` makes them."""

  classifier: Classifier
  dataset: str  # its name
  split_name: str
  split: Split
  evaluations: tuple[Evaluation, ...]  # one per network
  counts: dict[str, int]  # images by split
  note: str = ''  # about pictures that could not be read

  @property
  def classes(self) -> tuple[str, ...]:
    """Names of the classes, by label."""
    return self.classifier.classes

  @functools.cached_property
  def evaluation(self) -> Evaluation:
    """The answers of all networks together."""
    return evaluate.together(self.evaluations)

  @functools.cached_property
  def confusion(self) -> np.ndarray:
    """int64 `[num_classes, num_classes]`: a row per true class, a column per answer."""
    return self.evaluation.confusion

  @functools.cached_property
  def mistakes(self) -> np.ndarray:
    """int64 `[M]`: indices of the images with a wrong answer, most confident first."""
    return self.evaluation.mistakes

  @functools.cached_property
  def _by_confidence(self) -> np.ndarray:
    return np.argsort(-self.evaluation.confidences, kind='stable')

  def cell(self, true: int, said: int) -> np.ndarray:
    """Returns the indices of the images in a cell of the confusion matrix, int64 `[n]`, most confident first."""
    order = self._by_confidence
    return order[(self.evaluation.labels[order] == true) & (self.evaluation.predictions[order] == said)]

  def samples(self, count: int, only_right: bool = True) -> np.ndarray:
    """Returns up to `count` indices, spread evenly over the classes and the split.

    Args:
      count: how many.
      only_right: whether to take right answers only.
    """
    found = self.evaluation
    among = np.flatnonzero(found.predictions == found.labels) if only_right else np.arange(len(found.labels))
    among = among[np.argsort(found.labels[among], kind='stable')]
    return among[np.unique(np.linspace(0, len(among) - 1, min(count, len(among))).astype(int))]

  def answer(self, index: int) -> Answer:
    """Returns the answer to one image."""
    found = self.evaluation
    true, said = found.labels[index], found.predictions[index]
    probability, of_true = np.exp(found.log_probabilities[index, [said, true]]).tolist()
    return Answer(self.split.name_of(index), self.classes[true], self.classes[said], probability, of_true)

  def name(self, index: int) -> str:
    """Returns the file of an image, or its place such as '#7' in a set without files."""
    return self.split.name_of(index)

  def thumbnail(self, index: int, side: int = SIDE, enlarge: bool = True) -> Image.Image:
    """Returns an image as a small picture.

    Args:
      index: place of the image in the split.
      side: most pixels of the longer side.
      enlarge: whether a much smaller picture is enlarged by a whole factor, so its pixels stay squares.
    """
    return thumbnail(self.split.picture(index), side, enlarge)

  def heat_maps(
    self, indices: Sequence[int], labels: Sequence[int] | None = None, side: int = SIDE
  ) -> list[Image.Image]:
    """Returns images under the class activation map of one class each; see `evaluation.heat_maps`.

    Args:
      indices: places of the images in the split.
      labels: the class of each map; by default the one that the network says.
      side: most pixels of the longer side.

    Returns:
      One picture per image; an empty list if the network has no maps that tell places apart.
    """
    indices = np.asarray(indices, int)
    if not self.classifier.tells_places or not len(indices):
      return []
    from googlenet_jax.evaluation import heat_maps  # matplotlib takes a second to import

    labels = self.evaluation.predictions[indices] if labels is None else labels
    drawn = heat_maps.of_said(self.classifier.of_this_process(), self.split.batch(indices), labels)
    return [thumbnail(np.round(255 * picture).astype(np.uint8), side) for picture in drawn]

  def per_class(self) -> list[ClassRow]:
    """Returns precision, recall, F1 and support of each class, by label."""
    return class_rows(self.classes, self.confusion)


def load_results(
  workdir: pathlib.Path, classifier: Classifier, split: str = 'test', say: Callable[[str], None] = console.say
) -> Results | None:
  """Answers every image of a split with a run's network.

  Args:
    workdir: folder of the run or the ensemble.
    classifier: what `loading.load(workdir)` returned.
    split: 'train', 'validation' or 'test'.
    say: takes the line that says why there are no results.

  Returns:
    The results; None if the data set is not on this machine, or has no such split.
  """
  try:
    dataset = datasets.load(**classifier.recipe.data, **runs.data_of(runs.members(workdir)), used=(split,))
    images = getattr(dataset, split)
    if images is None:
      say(f'no pictures: the recipe holds out no {split} images')
      return None
    with progress.waiting(f'answering {len(images):,} {split} images'):
      found = evaluate.evaluate(classifier, images)
  except (UserError, ImportError) as error:
    say(f'no pictures: the data set {classifier.recipe.data.name} cannot be loaded here: {error}')
    return None
  counts = {name: len(own) for name in SPLITS if (own := getattr(dataset, name)) is not None}
  note = evaluate.damage({split: images}).removeprefix('note: ')
  return Results(classifier, dataset.name, split, images, tuple(found), counts, note)


def class_rows(classes: Sequence[str], confusion: np.ndarray) -> list[ClassRow]:
  """Returns the scores of each class from a confusion matrix."""
  scores = report.scores_of(confusion)
  numbers = [[None if np.isnan(score) else float(score) for score in column] for column in scores[:3]]
  return [ClassRow(*row) for row in zip(classes, *numbers, scores.support.tolist(), strict=True)]


def most_confused(confusion: np.ndarray, most: int) -> list[int]:
  """Returns up to `most` labels that are confused most, ascending: those of the largest mistakes in turn.

  With no more classes than that, all of them.
  """
  if len(confusion) <= most:
    return [*range(len(confusion))]
  wrong = confusion - np.diag(np.diag(confusion))
  chosen: dict[int, None] = {}
  for place in np.argsort(-wrong, axis=None, kind='stable')[: most**2]:  # these pairs have `most` labels at least
    new = [label for label in map(int, divmod(int(place), len(confusion))) if label not in chosen]
    if len(chosen) + len(new) <= most:
      chosen |= dict.fromkeys(new)
  return sorted(chosen)


def thumbnail(pixels: np.ndarray, side: int = SIDE, enlarge: bool = True) -> Image.Image:
  """Returns uint8 `[h, w, C]` as a picture no larger than `side`; see `Results.thumbnail`."""
  image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
  longest = max(image.size)
  factor = side // longest if enlarge else 1
  if longest > side:
    size = [max(1, round(side * length / longest)) for length in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)
  return image.resize([factor * length for length in image.size], Image.Resampling.NEAREST) if factor > 1 else image


# What a run knows without its data ------------------------------------------------------------------------------------


def curves(workdir: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Returns the records of `metrics.jsonl` by split, in the order of SPLITS; splits without records are left out.

  Each record has step, epoch, loss, accuracy, learning_rate and examples_per_second.
  """
  found = runs.records(workdir)
  return {name: own for name in SPLITS if (own := [record for record in found if record['split'] == name])}


def layer_rows(classifier: Classifier) -> list[list[str]]:
  """Returns the layer table as text: the head, a row for each layer, the totals. It needs no weights."""
  return layer_table.cells(layer_table.layer_table(classifier.shape, classifier.recipe.image_size))
