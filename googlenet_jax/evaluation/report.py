"""What people want to know of an evaluation: classes, mistakes, and for two classes the curves and their areas."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from googlenet_jax.classifier import Classifier
from googlenet_jax.data.splits import Split
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.evaluation.output import Output
from googlenet_jax.host import files


class Scores(NamedTuple):
  """Scores of each class, float64 `[num_classes]`; NaN where there is nothing to divide by."""

  precision: np.ndarray  # share of the images called this class that are
  recall: np.ndarray  # share of the images of this class that are called so
  f1: np.ndarray  # harmonic mean of both
  support: np.ndarray  # int64: images of this class


class Curve(NamedTuple):
  """A curve over all thresholds, from the strictest to the loosest, and the area below it."""

  x: np.ndarray
  y: np.ndarray
  area: float


def class_scores(evaluation: Evaluation) -> Scores:
  """Returns precision, recall, F1 and support of each class."""
  return scores_of(evaluation.confusion)


def scores_of(counts: np.ndarray) -> Scores:
  """Returns the scores of each class from a confusion matrix, int64 `[num_classes, num_classes]`."""
  right, said, support = np.diag(counts), counts.sum(axis=0), counts.sum(axis=1)
  with np.errstate(invalid='ignore'):
    return Scores(right / said, right / support, 2 * right / (said + support), support)


def _at_thresholds(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns how many positive and how many other images reach each threshold; images of one score come together."""
  order = np.argsort(-scores, kind='stable')
  last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # the last image with each score
  found = np.cumsum(positive[order])[last]
  return found, 1 + last - found


def roc(positive: np.ndarray, scores: np.ndarray) -> Curve:
  """Returns the ROC curve: the share of wrong alarms (x) and the share of positive images found (y).

  The area is the chance that a positive image has a higher score than another one; equal scores count half.

  Args:
    positive: bool `[N]`.
    scores: float `[N]`; higher for images that are more likely positive.
  """
  found, alarms = (np.append(0, counts) for counts in _at_thresholds(positive, scores))
  x, y = alarms / max(alarms[-1], 1), found / max(found[-1], 1)
  return Curve(x, y, float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2)))


def precision_recall(positive: np.ndarray, scores: np.ndarray) -> Curve:
  """Returns the precision-recall curve: recall (x) and precision (y); the area is the average precision.

  Args:
    positive: bool `[N]`.
    scores: float `[N]`; higher for images that are more likely positive.
  """
  found, alarms = _at_thresholds(positive, scores)
  x, y = found / max(found[-1], 1), found / (found + alarms)
  return Curve(x, y, float(np.sum(np.diff(x, prepend=0) * y)))


def two_classes(evaluation: Evaluation) -> np.ndarray:
  """Returns scores of the second of two classes, float64 `[N]`; its log-odds, which do not round to 1."""
  log_probabilities = evaluation.log_probabilities.astype(np.float64)
  return log_probabilities[:, 1] - log_probabilities[:, 0]


# Files ---------------------------------------------------------------------------------------------------------------


def write(
  evaluation: Evaluation,
  split: Split,
  class_names: Sequence[str],
  output: Output,
  title: str,
  split_name: str = 'test',
  classifier: Classifier | None = None,
) -> None:
  """Writes per_class.csv, mistakes.csv, mistakes.png, and for two classes roc.png.

  Args:
    evaluation: the answers to `split`.
    split: images and labels.
    class_names: one per class.
    output: where the files go.
    title: recipe, split and step, for pictures.
    split_name: name of the split.
    classifier: draws class activation maps in mistakes.png.
  """

  def draw_mistakes(path: pathlib.Path) -> None:
    from googlenet_jax.evaluation import galleries  # matplotlib takes a second to import

    galleries.mistakes(evaluation, split, class_names, path, title, split_name, classifier)

  def draw_curves(path: pathlib.Path) -> None:
    from googlenet_jax.evaluation import plots

    plots.two_classes(evaluation, class_names, path, title)

  output.write('per_class.csv', lambda path: files.write_text(path, per_class_csv(evaluation, class_names)))
  output.write('mistakes.csv', lambda path: files.write_text(path, mistakes_csv(evaluation, split, class_names)))
  output.write('mistakes.png', draw_mistakes)
  if len(class_names) == 2:
    output.write('roc.png', draw_curves)


def per_class_csv(evaluation: Evaluation, class_names: Sequence[str]) -> str:
  """Returns per_class.csv; a cell without a number is empty."""
  rows = [['class', *Scores._fields]]
  for name, *scores, support in zip(class_names, *class_scores(evaluation), strict=True):
    rows.append([name, *('' if np.isnan(score) else f'{score:.6g}' for score in scores), support])
  return files.csv_text(rows)


def mistakes_csv(evaluation: Evaluation, split: Split, class_names: Sequence[str]) -> str:
  """Returns mistakes.csv: every wrong answer, most confident first."""
  rows = [['file' if split.files is not None else 'index', 'said', 'probability', 'true', 'probability_of_true']]
  for index in evaluation.mistakes:
    said, true = evaluation.predictions[index], evaluation.labels[index]
    said_p, true_p = np.exp(evaluation.log_probabilities[index, [said, true]])
    name = index if split.files is None else split.files[index]
    rows.append([name, class_names[said], f'{said_p:.6g}', class_names[true], f'{true_p:.6g}'])
  return files.csv_text(rows)
