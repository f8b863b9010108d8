"""Pictures that show images: predictions, mistakes, augmentations."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from googlenet_jax.classifier import Classifier
from googlenet_jax.data import splits
from googlenet_jax.data.splits import Split
from googlenet_jax.evaluation import drawing, heat_maps
from googlenet_jax.evaluation.drawing import SMALL, TITLE, WIDTH, fit, percent, plural, user_text
from googlenet_jax.evaluation.own_matplotlib import Axes, Figure
from googlenet_jax.evaluation.sources import Found

if TYPE_CHECKING:
  from googlenet_jax.evaluation.evaluate import Evaluation  # it imports what only training and evaluation need

MISTAKES = 30  # images shown at most
ANSWERS = 18  # images in predictions.png


def mistakes(
  evaluation: 'Evaluation',
  split: Split,
  class_names: Sequence[str],
  path: pathlib.Path,
  title: str,
  name: str = 'test',
  classifier: Classifier | None = None,
) -> None:
  """Shows the most confident mistakes: the file of the image, what the network said, and the true class.

  Args:
    evaluation: predictions for `split`.
    split: images and labels.
    class_names: one per class.
    path: the PNG to write.
    title: recipe, split and step.
    name: name of the split.
    classifier: if it is given, and its class activation maps tell places apart, the map for what was said is below
      each image.
  """
  drawing.save(path, _mistakes_figure, evaluation, split, class_names, title, name, classifier)


def _mistakes_figure(
  evaluation: 'Evaluation',
  split: Split,
  class_names: Sequence[str],
  title: str,
  name: str,
  classifier: Classifier | None = None,
) -> Figure:
  wrong = evaluation.mistakes
  shown = wrong[:MISTAKES]
  images = plural(len(evaluation.labels), f'{name} image')
  if not len(wrong):
    figure = drawing.new_figure(1.3, title)
    figure.text(0.5, 0.35, f'No mistakes in {images}.', ha='center', va='center', fontsize=TITLE)
    return figure
  captions = []
  for index in shown:
    said = f'said {class_names[evaluation.predictions[index]]} ({percent(evaluation.confidences[index])}),'
    captions.append(
      (pathlib.PurePath(split.name_of(index)).name, said, f'true {class_names[evaluation.labels[index]]}')
    )
  confident = f'; the {len(shown)} most confident' if len(shown) < len(wrong) else ''
  title += f'\n{plural(len(wrong), "mistake")} in {images}{confident}'
  batch, below = split.batch(shown), ()
  if classifier is not None and classifier.tells_places:
    below = heat_maps.of_said(classifier, batch, evaluation.predictions[shown])
    title += '\nBelow each image: ' + heat_maps.meaning('the answer')
  return _images_figure(splits.pictures(batch), captions, title, below=below)


def answers(shown: Sequence[tuple[np.ndarray, Found, str, float]], path: pathlib.Path, title: str) -> None:
  """Shows pictures with the answers of the network.

  Args:
    shown: for each picture uint8 `[h, w, C]`, its name and true class, the answer, and its probability.
    path: the PNG to write.
    title: above the pictures.
  """
  drawing.save(path, _answers_figure, shown, title)


def _answers_figure(shown: Sequence[tuple[np.ndarray, Found, str, float]], title: str) -> Figure:
  captions, frames = [], []
  for _, found, said, probability in shown:
    verdict = ()
    if found.true_class:
      verdict = ('right' if said == found.true_class else f'wrong, is {found.true_class}',)
    captions.append((pathlib.PurePath(found.name).name, f'{said} ({percent(probability)})', *verdict))
    frame = drawing.RIGHT if said == found.true_class else drawing.WRONG
    frames.append(frame if found.true_class else 'none')
  return _images_figure([pixels for pixels, *_ in shown], captions, title, frames)


def predictions(
  evaluation: 'Evaluation', split: Split, class_names: Sequence[str], path: pathlib.Path, title: str, name: str = 'test'
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
  drawing.save(path, _predictions_figure, evaluation, split, class_names, title, name)


def _predictions_figure(
  evaluation: 'Evaluation', split: Split, class_names: Sequence[str], title: str, name: str
) -> Figure:
  chosen = np.unique(np.linspace(0, len(split) - 1, ANSWERS).astype(int))
  captions, frames = [], []
  for index in chosen:
    said, label = evaluation.predictions[index], evaluation.labels[index]
    verdict = 'right' if said == label else f'wrong, is {class_names[label]}'
    captions.append((f'{class_names[said]} ({percent(evaluation.confidences[index])})', verdict))
    frames.append(drawing.RIGHT if said == label else drawing.WRONG)
  title += f'\n{len(chosen)} of {plural(len(split), f"{name} image")}, evenly spread; {percent(evaluation.accuracy)}'
  title += ' of all answers are right'
  return _images_figure(splits.pictures(split.batch(chosen)), captions, title, frames)


def _images_figure(
  images: Sequence[np.ndarray],
  captions: Sequence[tuple[str, ...]],
  title: str,
  frames: Sequence[str] = (),
  below: Sequence[np.ndarray] = (),
) -> Figure:
  """Shows images, each below its caption; each part of a caption takes up to two lines.

  Args:
    images: uint8 `[h, w, C]` each.
    captions: one for each image.
    title: above the images.
    frames: colours of frames around the images; 'none' for no frame.
    below: float `[h, w, 3]` each; pictures below the images.
  """
  columns, height = 6, 1.2 * (2 if len(below) else 1)
  rows = -(-len(images) // columns)
  texts = []
  for parts in captions:
    parts = (fit(text.replace(' %', '\u00a0%'), WIDTH / columns * 72 - 10, SMALL, 2) for text in parts)
    texts.append('\n'.join(parts))
  lines = max(text.count('\n') + 1 for text in texts)
  figure = drawing.new_figure(0.6 + 0.2 * title.count('\n') + rows * (height + 0.14 * lines), title)
  for place, (image, text) in enumerate(zip(images, texts, strict=True)):
    row, column = divmod(place, columns)
    upper = figure.add_subplot(rows * 2, columns, 2 * row * columns + column + 1) if len(below) else None
    axes = upper or figure.add_subplot(rows, columns, place + 1)
    _show_image(axes, image / 255)
    axes.set_title(text, fontsize=SMALL, **user_text())
    if frames and frames[place] != 'none':
      axes.spines[:].set(visible=True, color=frames[place], linewidth=3)
    if len(below):
      axes = figure.add_subplot(rows * 2, columns, (2 * row + 1) * columns + column + 1)
      _show_image(axes, below[place])
      axes.set_anchor('N')  # near the image above
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
  drawing.save(path, _augmentations_figure, stored, seen, labels, title, used)


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


def filters(kernel: np.ndarray, path: pathlib.Path, title: str) -> None:
  """Shows the filters of the first layer, all on one scale that is symmetric around 0.

  Args:
    kernel: float `[k, k, in, out]` with 1 or 3 input channels.
    path: the PNG to write.
    title: run and step.
  """
  drawing.save(path, _filters_figure, kernel, title)


def _filters_figure(kernel: np.ndarray, title: str) -> Figure:
  side, _, channels, count = kernel.shape
  most = float(np.abs(kernel).max()) or 1.0
  shown = (0.5 + kernel / (2 * most)).transpose(3, 0, 1, 2)  # [out, k, k, in] in [0, 1]
  columns = 8
  rows = -(-count // columns)
  colours = 'grey is 0, white is' if channels == 1 else 'grey is 0, bright in a colour is'
  title += f'\n{count} filters of {side}x{side}x{channels}; {colours} {most:.3g}, black is -{most:.3g}'
  figure = drawing.new_figure(0.6 + rows * WIDTH / columns, title)
  for axes, image in zip(figure.subplots(rows, columns, squeeze=False).ravel(), shown, strict=False):
    _show_image(axes, image)
  return figure
