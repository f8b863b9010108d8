"""Pictures that show numbers: curves, confusion matrix, errors of crops and ensembles."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from googlenet_jax.data import crops
from googlenet_jax.evaluation import drawing, report
from googlenet_jax.evaluation.drawing import NORMAL, SMALL, TITLE, fit, percent, plural, user_text
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.evaluation.own_matplotlib import (
  Axes,
  Figure,
  LinearSegmentedColormap,
  MaxNLocator,
  PowerNorm,
  ScalarMappable,
)

LOG_RATIO = 20  # the loss axis is logarithmic if the highest loss is more than this many times the median
CELL_SHARES = 12  # up to this many classes, cells of the confusion matrix have counts and shares
CELL_COUNTS = 20  # up to this many, counts alone; above, a list below the matrix has the numbers
PAIRS = 15  # largest number of pairs of classes in that list

# A wide pale line with hollow squares stays visible below a thin broken line with dots.
LINES = {
  'train': {'label': 'train', 'color': drawing.TRAIN, 'ls': '-', 'lw': 1.5},
  'validation': {
    'label': 'validation', 'color': drawing.VALIDATION, 'ls': '-', 'lw': 4, 'alpha': 0.55, 'marker': 's', 'ms': 8,
    'markerfacecolor': 'none', 'markeredgewidth': 1.6,
  },
  'validation_raw': {
    'label': 'validation, raw weights', 'color': drawing.VALIDATION, 'ls': ':', 'lw': 1.2, 'marker': '+', 'ms': 7,
  },
  'test_raw': {'label': 'test, raw weights', 'color': drawing.TEST, 'ls': ':', 'lw': 1.2, 'marker': 'x', 'ms': 5},
  'test': {'label': 'test', 'color': drawing.TEST, 'ls': '--', 'lw': 1.6, 'marker': 'o', 'ms': 4},
}  # fmt: skip


# Curves ---------------------------------------------------------------------------------------------------------------


def curves(records: Sequence[dict[str, Any]], path: pathlib.Path, title: str) -> None:
  """Draws loss, accuracy and learning rate against epochs.

  Args:
    records: lines of `metrics.jsonl`.
    path: the PNG to write.
    title: recipe, data and final figures.
  """
  drawing.save(path, _curves_figure, records, title)


def _curves_figure(records: Sequence[dict[str, Any]], title: str) -> Figure:
  figure = drawing.new_figure(7.0, title)
  loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.1))
  for axes, key in ((loss, 'loss'), (accuracy, 'accuracy')):
    for split, style in LINES.items():
      _draw_line(axes, [r for r in records if r['split'] == split], key, style)
  trained = [r for r in records if r['split'] == 'train']
  _draw_line(rate, trained, 'learning_rate', {'color': drawing.LEARNING_RATE, 'lw': 1.5})
  drawing.label_axes(loss, '', 'loss (nats)')
  drawing.label_axes(accuracy, '', 'accuracy (share right)')
  drawing.label_axes(rate, 'epoch', 'learning rate')
  figure.align_ylabels()
  _limit_loss(loss, [r['loss'] for r in records])
  _limit_accuracy(accuracy, [r['accuracy'] for r in records])
  rate.set_ylim(0, 1.1 * max([r['learning_rate'] for r in trained], default=0.0) or 1)
  rate.set_xlim(0, 1.02 * max([r['epoch'] for r in records], default=0.0) or 1)
  for axes in (loss, accuracy, rate):
    axes.grid(alpha=0.3)
  if loss.lines:
    figure.legend(handles=loss.lines, loc='outside lower center', ncols=5, fontsize=NORMAL, frameon=False)
  return figure


def _draw_line(axes: Axes, records: Sequence[dict[str, Any]], key: str, style: dict[str, Any]) -> None:
  if not records:
    return
  if len(records) <= 2:
    style = {'marker': '.', **style}  # a line through one point is invisible
  every = max(1, len(records) // 10)  # markers; the last point has one
  points = [r['epoch'] for r in records], [r[key] for r in records]
  axes.plot(*points, markevery=((len(records) - 1) % every, every), **style)


def _limit_loss(axes: Axes, losses: Sequence[float]) -> None:
  """Makes the axis logarithmic if a few very high losses would flatten the others."""
  losses = [loss for loss in losses if math.isfinite(loss) and loss > 0] or [1.0]
  if max(losses) > LOG_RATIO * np.median(losses):
    axes.set_yscale('log')
    axes.set_ylim(min(losses) / 1.3, max(losses) * 1.3)
    axes.yaxis.set_major_formatter('{x:g}')
    axes.set_ylabel('loss (nats, log scale)')
  else:
    axes.set_ylim(0, 1.05 * max(losses))


def _limit_accuracy(axes: Axes, accuracies: Sequence[float]) -> None:
  """Leaves room around the values, within [0, 1]. The limits are at least 0.1 apart."""
  low, high = min(accuracies, default=0.0), max(accuracies, default=1.0)
  room = max(0.06 * (high - low), (0.1 - (high - low)) / 2)
  axes.set_ylim(max(0.0, low - room), min(1.02, high + room))


# Confusion matrix -----------------------------------------------------------------------------------------------------


def confusion(evaluation: Evaluation, class_names: Sequence[str], path: pathlib.Path, title: str) -> None:
  """Draws the confusion matrix: rows are true classes, columns predictions. Blue cells are right, orange ones wrong.

  With many classes the cells have no numbers. A list then shows the pairs that are confused most often.

  Args:
    evaluation: predictions and labels.
    class_names: one per class.
    path: the PNG to write.
    title: recipe, split and step.
  """
  drawing.save(path, _confusion_figure, evaluation, class_names, title)


def _confusion_figure(evaluation: Evaluation, class_names: Sequence[str], title: str) -> Figure:
  counts, classes = evaluation.confusion, len(class_names)
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  title += f'\naccuracy {evaluation.accuracy:.4f} ({np.trace(counts)} of {plural(len(evaluation.labels), "image")})'
  if classes <= CELL_COUNTS:
    figure = drawing.new_figure(min(max(0.52 * classes, 3.0), 6.2) + 1.7, title)
    axes = figure.add_subplot()
    for scale, cells in zip(_scales(shares), (~np.eye(classes, dtype=bool), np.eye(classes, dtype=bool)), strict=True):
      axes.imshow(np.ma.masked_array(shares, ~cells | (counts == 0)), cmap=scale.cmap, norm=scale.norm)
    drawing.label_axes(axes, 'prediction', 'true class')
    _label_classes(axes, evaluation.per_class_accuracy, class_names)
    for (row, column), count in np.ndenumerate(counts):
      if count:
        text = f'{count}\n{percent(shares[row, column])}' if classes <= CELL_SHARES else _short(count)
        axes.text(column, row, text, ha='center', va='center', fontsize=SMALL)
  else:
    pairs = evaluation.confused_pairs(PAIRS)
    heights = 5.6, 0.7 + 0.23 * len(pairs)
    figure = drawing.new_figure(sum(heights) + 0.4, title)
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    _draw_cells(above.add_subplot(), shares)
    _draw_pairs(below.add_subplot(), pairs, counts, class_names)
  return figure


def _short(count: int) -> str:
  """At most four characters below a million."""
  return str(count) if count < 10_000 else f'{count / 1000:.0f}k'


def _scales(shares: np.ndarray) -> tuple[ScalarMappable, ScalarMappable]:
  """Colour scales for mistakes and for right answers. The one for mistakes ends at the largest and is not linear."""
  highest = max(np.max(shares, where=~np.eye(len(shares), dtype=bool), initial=0.0), 0.01)
  scales = []
  for name, colors, power, top in (
    ('wrong', ['#FBE6BC', drawing.WRONG], 0.5, highest),
    ('right', ['#E4F3FC', drawing.RIGHT], 1.0, 1.0),
  ):
    colors = LinearSegmentedColormap.from_list(name, colors)
    scales.append(ScalarMappable(PowerNorm(power, vmin=0, vmax=top), colors))
  return scales[0], scales[1]


def _label_classes(axes: Axes, accuracies: np.ndarray, class_names: Sequence[str]) -> None:
  """Writes the names of the classes, and on the right the share of each that is right."""
  places = range(len(class_names))
  turned = {'rotation': 45, 'ha': 'right', 'rotation_mode': 'anchor'} if max(map(len, class_names)) > 3 else {}
  axes.set_xticks(places, [fit(name, 95, SMALL) for name in class_names], **turned, **user_text())
  axes.set_yticks(places, [fit(name, 110, SMALL) for name in class_names], **user_text())
  right = axes.secondary_yaxis('right')
  right.set_yticks(places, ['no images' if np.isnan(share) else f'{100 * share:.1f} %' for share in accuracies])
  right.tick_params(labelsize=SMALL, length=0)
  right.set_ylabel('accuracy of the class', fontsize=NORMAL)


def _draw_cells(axes: Axes, shares: np.ndarray) -> None:
  """Draws a matrix of many classes without numbers. Every cell has a visible size."""
  rows, columns = np.nonzero(shares)
  order = np.argsort(shares[rows, columns], kind='stable')  # the largest shares are drawn last, above the others
  rows, columns = rows[order], columns[order]
  side = max(0.9 * 4.6 * 72 / len(shares), 1.5)  # points
  labels = 'wrong (share of the true class)', 'right (share of the true class)'
  for scale, chosen, label in zip(_scales(shares), (rows != columns, rows == columns), labels, strict=True):
    cells = columns[chosen], rows[chosen]
    colors = scale.to_rgba(shares[cells[::-1]])
    axes.scatter(*cells, c=colors, marker='s', s=side**2, linewidths=0)
    bar = axes.figure.colorbar(scale, ax=axes, shrink=0.9, aspect=30)
    bar.set_label(label, fontsize=NORMAL)
    bar.ax.tick_params(labelsize=SMALL)
  axes.set(xlim=(-0.5, len(shares) - 0.5), ylim=(len(shares) - 0.5, -0.5), aspect='equal')
  drawing.label_axes(axes, 'number of the predicted class', 'number of the true class')


def _draw_pairs(axes: Axes, pairs: Sequence[tuple[int, int]], counts: np.ndarray, class_names: Sequence[str]) -> None:
  """Draws a bar for each pair of classes."""
  if not pairs:
    axes.set_axis_off()
    axes.text(0.5, 0.5, 'No mistakes.', ha='center', va='center', fontsize=TITLE, transform=axes.transAxes)
    return
  sizes = [int(counts[pair]) for pair in pairs]
  axes.barh(range(len(pairs)), sizes, color=drawing.WRONG)
  names = [' taken for '.join(fit(class_names[label], 125, SMALL) for label in pair) for pair in pairs]
  drawing.label_axes(axes, 'images', '')
  axes.set_yticks(range(len(pairs)), names, **user_text())
  axes.set(xlim=(0, 1.6 * sizes[0]), ylim=(len(pairs) - 0.4, -0.6))
  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  for place, ((true, _), size) in enumerate(zip(pairs, sizes, strict=True)):
    text = f'{size} of {counts[true].sum()} ({percent(size / counts[true].sum())})'
    axes.annotate(text, (size, place), (4, 0), textcoords='offset points', va='center', fontsize=SMALL)


# Two classes ----------------------------------------------------------------------------------------------------------


def two_classes(evaluation: Evaluation, class_names: Sequence[str], path: pathlib.Path, title: str) -> None:
  """Draws the ROC curve and the precision-recall curve of each of two classes.

  Args:
    evaluation: the answers.
    class_names: both names.
    path: the PNG to write.
    title: recipe, split and step.
  """
  drawing.save(path, _two_classes_figure, evaluation, class_names, title)


def _two_classes_figure(evaluation: Evaluation, class_names: Sequence[str], title: str) -> Figure:
  figure = drawing.new_figure(4.4, title)
  left, right = figure.subplots(1, 2)
  scores = report.two_classes(evaluation)
  styles = {'color': drawing.ENSEMBLE, 'ls': '-'}, {'color': drawing.ONE_MODEL, 'ls': '--'}
  for label, sign in ((0, -1), (1, 1)):
    positive, name = evaluation.labels == label, fit(class_names[label], 110, SMALL)
    # The area below the ROC curve is the same for both classes.
    for axes, curve in (
      (left, report.roc(positive, sign * scores)),
      (right, report.precision_recall(positive, sign * scores)),
    ):
      axes.plot(curve.x, curve.y, label=f'{name}: area {curve.area:.4f}', lw=1.8, clip_on=False, **styles[label])
  drawing.label_axes(left, 'false positive rate (share of the others)', 'true positive rate (share found)')
  drawing.label_axes(right, 'recall (share found)', 'precision (share of the found that are right)')
  left.plot([0, 1], [0, 1], color=drawing.LEARNING_RATE, lw=0.8, ls=':')
  left.set_title('ROC', fontsize=NORMAL)
  right.set_title('precision and recall', fontsize=NORMAL)
  for axes, place in ((left, 'lower right'), (right, 'lower left')):
    axes.set(xlim=(0, 1), ylim=(0, 1.02), aspect='equal')
    axes.grid(alpha=0.3)
    axes.legend(loc=place, prop={'size': SMALL, 'family': user_text()['family']})
  return figure


# Table ----------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]], path: pathlib.Path, title: str) -> None:
  """Draws top-1 and top-5 errors against the cost, the number of crops times the number of models.

  Args:
    rows: dicts with `models`, `crops`, `cost`, `top1_error`, `top5_error`, and `top1_errors`, one per model.
    path: the PNG to write.
    title: recipe, split and step.
  """
  drawing.save(path, _table_figure, rows, title)


def _table_figure(rows: Sequence[dict[str, Any]], title: str) -> Figure:
  tops = (1, 5) if any(r['top5_error'] > 0 for r in rows) else (1,)
  views = ''.join(f'; {count}: views' for count in crops.NOTES if any(r['crops'] == count for r in rows))
  figure = drawing.new_figure(4.2, title)
  for axes, top in zip(figure.subplots(1, len(tops), squeeze=False)[0], tops, strict=True):
    drawing.label_axes(axes, f'cost: models x crops (beside a point: crops{views})', f'top-{top} error (%)')
    for models in sorted({r['models'] for r in rows}):
      _draw_errors(axes, sorted((r for r in rows if r['models'] == models), key=lambda r: r['crops']), top)
    low, high = axes.dataLim.intervaly
    room = max(0.15 * (high - low), 0.05 * high, 0.05)
    axes.set_ylim(max(0.0, low - room), high + room)
    _limit_costs(axes, sorted({r['cost'] for r in rows}))
    axes.grid(alpha=0.3)
  handles = figure.axes[0].get_legend_handles_labels()
  figure.legend(*handles, loc='outside lower center', ncols=4, fontsize=NORMAL, frameon=False)
  return figure


def _draw_errors(axes: Axes, rows: Sequence[dict[str, Any]], top: int) -> None:
  """Draws a line for one model or an ensemble. If it is a mean over models, bars show lowest and highest error."""
  models = rows[0]['models']
  style = {'color': drawing.ONE_MODEL, 'fmt': 'o-'} if models == 1 else {'color': drawing.ENSEMBLE, 'fmt': 's--'}
  label = '1 model' if models == 1 else f'{models} models together'
  errors = 100 * np.array([r[f'top{top}_error'] for r in rows])
  bars = None
  if models == 1 and top == 1 and len(rows[0]['top1_errors']) > 1:
    single = 100 * np.array([r['top1_errors'] for r in rows])
    bars = np.maximum([errors - single.min(axis=1), single.max(axis=1) - errors], 0)
    label += f': mean of {single.shape[1]}, bars from lowest to highest'
  axes.errorbar([r['cost'] for r in rows], errors, bars, label=label, capsize=3, **style)
  for r, error, following in zip(rows, errors, [*errors[1:], errors[-1]], strict=True):
    offset = (5, -11) if following > error else (5, 4)  # beside the line, not on it
    axes.annotate(str(r['crops']), (r['cost'], error), offset, textcoords='offset points', fontsize=SMALL)


def _limit_costs(axes: Axes, costs: Sequence[int]) -> None:
  """Sets a logarithmic axis with ticks at the costs themselves, except where they would touch."""
  low, high = costs[0] / 1.6, 1.6 * costs[-1] * (costs[-1] / costs[0]) ** 0.1  # room for the text at the last point
  shown = list(costs[:1])
  for cost in costs[1:]:
    if math.log(cost / shown[-1]) > 0.08 * math.log(high / low):
      shown.append(cost)
  axes.set(xscale='log', xlim=(low, high))
  axes.set_xticks(shown, [str(cost) for cost in shown])
  axes.set_xticks([], minor=True)
