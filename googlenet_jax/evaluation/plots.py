"""Pictures of a run."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from googlenet_jax.data.splits import Split
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.host.checkpoints import replacing

MISTAKES = 40  # shown at most
LABELLED_CLASSES = 20  # with more than this, cells and ticks of the confusion matrix stay without text


def _save(figure: Figure, path: pathlib.Path) -> None:
  FigureCanvasAgg(figure)  # draws without a screen and without pyplot's global state
  with replacing(path) as temporary:
    figure.savefig(temporary, dpi=120, format='png')


def curves(records: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws train loss, train accuracy and test accuracy against epochs, as the article's figure does.

  Args:
    records: lines of `metrics.jsonl`.
    path: of the PNG.
  """
  figure = Figure(figsize=(7, 4.2), layout='constrained')
  axes = figure.add_subplot()
  lines = [
    ('train', 'loss', 'train loss', 'C0-'),
    ('train', 'accuracy', 'train accuracy', 'C4--'),
    ('validation', 'accuracy', 'validation accuracy', 'C1:'),
    ('test', 'accuracy', 'test accuracy', 'C2-.'),
    ('test_raw', 'accuracy', 'test accuracy, raw weights', 'C5:'),
  ]
  for split, key, label, style in lines:
    points = [(r['epoch'], r[key]) for r in records if r['split'] == split]
    if points:
      axes.plot(*zip(*points, strict=True), style, label=label, marker='' if split == 'train' else 'o', ms=4)
  axes.set_xlabel('epoch')
  axes.set_xlim(left=0)
  axes.set_ylim(bottom=0)
  axes.grid(alpha=0.3)
  if axes.lines:
    axes.legend()
  _save(figure, path)


def confusion(evaluation: Evaluation, class_names: Sequence[str], path: pathlib.Path) -> None:
  """Draws the confusion matrix: rows are the true classes, columns the predictions, colours the share of the row.

  Args:
    evaluation: of a split.
    class_names: one a class.
    path: of the PNG.
  """
  counts = evaluation.confusion
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  figure = Figure(figsize=(7.5, 6.8), layout='constrained')
  axes = figure.add_subplot()
  image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
  if len(class_names) <= LABELLED_CLASSES:
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha='right')
    axes.set_yticks(range(len(class_names)), class_names)
    for (row, column), count in np.ndenumerate(counts):
      if count:
        color = 'white' if shares[row, column] > 0.5 else 'black'
        axes.text(column, row, count, ha='center', va='center', color=color, fontsize=8)
  axes.set_xlabel('prediction')
  axes.set_ylabel('true class')
  axes.set_title(f'accuracy {evaluation.accuracy:.4f} over {len(evaluation.labels)} images')
  figure.colorbar(image, ax=axes, label='share of the true class', shrink=0.8)
  _save(figure, path)


def mistakes(evaluation: Evaluation, split: Split, class_names: Sequence[str], path: pathlib.Path) -> None:
  """Shows the images that the network got most confidently wrong, with what it said and what they are.

  Args:
    evaluation: of `split`.
    split: images and labels.
    class_names: one a class.
    path: of the PNG.
  """
  wrong = np.flatnonzero(evaluation.predictions != evaluation.labels)
  worst = wrong[np.argsort(-evaluation.confidences[wrong], kind='stable')][:MISTAKES]
  columns = 8
  rows = max(1, -(-len(worst) // columns))
  figure = Figure(figsize=(11, 0.6 + 1.75 * rows), layout='constrained')
  shown = '' if len(wrong) == len(worst) else f'; the {len(worst)} most confident'
  figure.suptitle(f'mistakes: {len(wrong)} in {len(evaluation.labels)} images{shown}')
  if not len(worst):
    figure.text(0.5, 0.4, 'no mistakes', ha='center')
  for place, index in enumerate(worst, start=1):
    axes = figure.add_subplot(rows, columns, place)
    image = split.picture(int(index))
    axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=255)
    said, true = class_names[evaluation.predictions[index]], class_names[evaluation.labels[index]]
    axes.set_title(f'{said} {evaluation.confidences[index]:.0%}\nis {true}', fontsize=7)
    axes.set_axis_off()
  _save(figure, path)


def augmentations(stored: Sequence[np.ndarray], seen: np.ndarray, labels: Sequence[str], path: pathlib.Path) -> None:
  """Shows images of a training batch, and below each what the network sees of it.

  Args:
    stored: uint8 `[H, W, C]` each.
    seen: float `[N, S, S, C]` in [0, 1].
    labels: names of their classes.
    path: of the PNG.
  """
  columns = 8
  rows = -(-len(stored) // columns)
  figure = Figure(figsize=(11, 0.5 + 2.9 * rows), layout='constrained')
  figure.suptitle('a training batch: stored images, and below each what the network sees')
  for place, (image, view, label) in enumerate(zip(stored, seen, labels, strict=True)):
    row, column = divmod(place, columns)
    for below, picture in ((0, image / 255), (1, np.clip(view, 0, 1))):
      axes = figure.add_subplot(2 * rows, columns, (2 * row + below) * columns + column + 1)
      axes.imshow(picture[..., 0] if picture.shape[-1] == 1 else picture, cmap='gray', vmin=0, vmax=1)
      axes.set_axis_off()
      if not below:
        axes.set_title(label, fontsize=7)
  _save(figure, path)


def protocol(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws the errors of the paper's table 3 against the cost.

  Args:
    rows: of `protocol.row`.
    path: of the PNG.
  """
  figure = Figure(figsize=(8, 4), layout='constrained')
  for axes, key, title in zip(figure.subplots(1, 2), ('top1_error', 'top5_error'), ('top-1', 'top-5'), strict=True):
    for models in sorted({r['models'] for r in rows}):
      own = [r for r in rows if r['models'] == models]
      costs, errors = [r['cost'] for r in own], [100 * r[key] for r in own]
      axes.plot(costs, errors, 'o-', label=f'{models} model{"s" * (models > 1)}')
      for r, cost, error in zip(own, costs, errors, strict=True):
        axes.annotate(f'{r["crops"]}', (cost, error), textcoords='offset points', xytext=(4, 4), fontsize=8)
    axes.set_xscale('log')
    axes.margins(0.15)  # for the numbers beside the outermost points
    axes.set_xlabel('cost: models times crops (beside a point: crops)')
    axes.set_ylabel(f'{title} error, %')
    axes.grid(alpha=0.3)
    axes.legend()
  _save(figure, path)
