"""Pictures that show images: predictions, mistakes, augmentations."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from googlenet_jax.data.splits import Split
from googlenet_jax.evaluation import drawing
from googlenet_jax.evaluation.drawing import SMALL, TITLE, WIDTH, fit, percent, plural, user_text
from googlenet_jax.evaluation.evaluate import Evaluation

MISTAKES = 30  # images shown at most
ANSWERS = 18  # images in predictions.png


def mistakes(
  evaluation: Evaluation, split: Split, class_names: Sequence[str], path: pathlib.Path, title: str, name: str = 'test'
) -> None:
  """Shows the most confident mistakes: the index of the image, what the network said, and the true class.

  Args:
    evaluation: predictions for `split`.
    split: images and labels.
    class_names: one per class.
    path: the PNG to write.
    title: recipe, split and step.
    name: name of the split.
  """
  drawing.save(_mistakes_figure(evaluation, split, class_names, title, name), path)


def _mistakes_figure(evaluation: Evaluation, split: Split, class_names: Sequence[str], title: str, name: str) -> Figure:
  wrong = np.flatnonzero(evaluation.predictions != evaluation.labels)
  worst = wrong[np.argsort(-evaluation.confidences[wrong], kind='stable')][:MISTAKES]
  images = plural(len(evaluation.labels), f'{name} image')
  if not len(wrong):
    figure = drawing.new_figure(1.3, title)
    figure.text(0.5, 0.35, f'No mistakes in {images}.', ha='center', va='center', fontsize=TITLE)
    return figure
  captions = []
  for index in worst:
    said = f'said {class_names[evaluation.predictions[index]]} ({percent(evaluation.confidences[index])}),'
    captions.append((f'#{index}', said, f'true {class_names[evaluation.labels[index]]}'))
  shown = f'; the {len(worst)} most confident' if len(worst) < len(wrong) else ''
  title += f'\n{plural(len(wrong), "mistake")} in {images}{shown}'
  return _images_figure(split, worst, captions, title)


def predictions(
  evaluation: Evaluation, split: Split, class_names: Sequence[str], path: pathlib.Path, title: str, name: str = 'test'
) -> None:
  """Shows images spread evenly over a split, each with the answer of the network and whether it is right.

  Args:
    evaluation: the answers to `split`.
    split: images and labels.
    class_names: one per class.
    path: the PNG to write.
    title: recipe, split and step.
    name: name of the split.
  """
  drawing.save(_predictions_figure(evaluation, split, class_names, title, name), path)


def _predictions_figure(
  evaluation: Evaluation, split: Split, class_names: Sequence[str], title: str, name: str
) -> Figure:
  chosen = np.unique(np.linspace(0, len(split) - 1, ANSWERS).astype(int))
  captions, frames = [], []
  for index in chosen:
    said, label = evaluation.predictions[index], evaluation.labels[index]
    verdict = 'right' if said == label else f'wrong: {class_names[label]}'
    captions.append((f'{class_names[said]} ({percent(evaluation.confidences[index])})', verdict))
    frames.append(drawing.RIGHT if said == label else drawing.WRONG)
  title += f'\n{len(chosen)} of {plural(len(split), f"{name} image")}, evenly spread; {percent(evaluation.accuracy)}'
  title += ' of all answers are right'
  return _images_figure(split, chosen, captions, title, frames)


def _images_figure(
  split: Split, indices: np.ndarray, captions: Sequence[tuple[str, ...]], title: str, frames: Sequence[str] = ()
) -> Figure:
  """Shows images of a split, each below its caption; each part of a caption takes up to two lines.

  `frames` are the colours of frames around the images.
  """
  columns = 6
  rows = -(-len(indices) // columns)
  texts = []
  for parts in captions:
    parts = (fit(text.replace(' %', '\u00a0%'), WIDTH / columns * 72 - 10, SMALL, 2) for text in parts)
    texts.append('\n'.join(parts))
  lines = max(text.count('\n') + 1 for text in texts)
  figure = drawing.new_figure(0.6 + rows * (1.2 + 0.14 * lines), title)
  for place, (index, text) in enumerate(zip(indices, texts, strict=True), start=1):
    axes = figure.add_subplot(rows, columns, place)
    _show_image(axes, split.picture(int(index)) / 255)
    axes.set_title(text, fontsize=SMALL, **user_text())
    if frames:
      axes.spines[:].set(visible=True, color=frames[place - 1], linewidth=3)
  return figure


def _show_image(axes: Axes, image: np.ndarray) -> None:
  """Shows an image `[h, w, C]` in [0, 1] without axes."""
  axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=1)
  axes.set(xticks=[], yticks=[])
  axes.spines[:].set_visible(False)


def augmentations(
  stored: Sequence[np.ndarray],
  seen: np.ndarray,
  labels: Sequence[str],
  path: pathlib.Path,
  title: str,
  used: Sequence[str],
) -> None:
  """Shows images of a training batch, and below each one what the network sees of it.

  Args:
    stored: uint8 `[h, w, C]` each.
    seen: float `[N, S, S, C]` in [0, 1].
    labels: names of their classes.
    path: the PNG to write.
    title: recipe and data.
    used: texts for the augmentations that are on, such as 'shifts up to 2 px'.
  """
  drawing.save(_augmentations_figure(stored, seen, labels, title, used), path)


def _augmentations_figure(
  stored: Sequence[np.ndarray], seen: np.ndarray, labels: Sequence[str], title: str, used: Sequence[str]
) -> Figure:
  columns = 8
  rows = -(-len(stored) // columns)
  title += f'\naugmentation: {", ".join(used)}' if used else '\nno augmentation'
  figure = drawing.new_figure(0.6 + 2.25 * rows, title)
  for place, (image, view, label) in enumerate(zip(stored, seen, labels, strict=True)):
    row, column = divmod(place, columns)
    for below, picture in ((0, image / 255), (1, np.clip(view, 0, 1))):
      axes = figure.add_subplot(2 * rows, columns, (2 * row + below) * columns + column + 1)
      _show_image(axes, picture)
      if column == 0:
        axes.set_ylabel('seen' if below else 'stored', fontsize=SMALL)
      if not below:
        axes.set_title(fit(label, WIDTH / columns * 72 - 10, SMALL, 2), fontsize=SMALL, **user_text())
  return figure
