"""`--mode=explain`: shows where in a picture the network finds what speaks for a class."""

import pathlib
import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from googlenet_jax import loading
from googlenet_jax.classifier import Explanation
from googlenet_jax.evaluation import drawing, heat_maps, predict, sources
from googlenet_jax.evaluation.drawing import NORMAL, SMALL, WIDTH, fit, percent, user_text
from googlenet_jax.evaluation.sources import Found
from googlenet_jax.host import console
from googlenet_jax.host.errors import UserError, one_line

LONGEST_NAME = 200  # bytes of the name of a file; file systems take 255
WIDE = 1.8  # width divided by height: pictures at least so wide stand below each other
PANEL_ROWS = (0.5, 6.0)  # inches: least and greatest height of a row of panels


def explain_paths(
  workdir: pathlib.Path,
  paths: Sequence[str],
  step: int | str | None = None,
  top: int = 3,
  output: pathlib.Path | None = None,
) -> int:
  """Draws class activation maps over pictures, `NAME_explained.png` for each, and prints a line for each.

  Args:
    workdir: folder of a run or an ensemble, or a file of weights.
    paths: files, folders, patterns, `-`; see `sources.find`.
    step: step of the checkpoint, 'best', or None for the newest.
    top: classes for each picture.
    output: folder to write to; by default `explain` in the workdir.

  Returns:
    The exit status: 0, or 1 if pictures could not be read.

  Raises:
    UserError: there is no such run, its network has no class activation maps, no picture could be read, or the folder
      cannot be written.
  """
  classifier = loading.load(workdir, step)
  classifier.check_explains()
  found = sources.find(paths, classifier.classes)
  folder = predict.output_folder(workdir, output, 'explain')
  if folder is None:
    raise UserError('the pictures of --mode=explain have no place: give --output=DIR')
  names, unread = FileNames(), 0
  whose = f'the mean of {len(classifier.networks)} networks in {workdir}' if classifier.networks[1:] else f'{workdir}'

  def compute(batch):
    return classifier.explanations(batch, top)

  with predict.progress(len(found)) as bar:
    for part in predict.batches(classifier, found, compute, grow=False):
      for picture, explanation in part:
        bar.update()
        if explanation is None:
          predict.say_unread(picture)
          unread += 1
          continue
        path = folder / names.new(picture.found, paths)
        drawing.save(explanation_figure(explanation, picture.found, whose), path)
        answers = zip(explanation.names, explanation.probabilities, strict=True)
        answers = '  '.join(f'{one_line(name)} {probability:.2f}' for name, probability in answers)
        console.say(f'{one_line(picture.found.name)}  {answers}  -> {one_line(path)}')
  if unread == len(found):
    raise UserError(f'none of {len(found)} pictures can be read' if unread > 1 else picture.error)
  return predict.status(unread, len(found))


class FileNames:
  """Chooses names of files that do not collide."""

  def __init__(self):
    self._used = set()

  def new(self, found: Found, arguments: Sequence[str]) -> str:
    """Returns `NAME_explained.png`. For a picture in a folder that was given, NAME begins with its folders in there."""
    name = found.name
    folders = [argument for argument in arguments if name.startswith(argument.rstrip('/') + '/')]
    inside = name[len(max(folders, key=len).rstrip('/')) + 1 :] if folders else pathlib.PurePath(name).name
    stem = re.sub(r'[/\\]|\s', '_', one_line(pathlib.PurePath(inside).with_suffix('')))
    stem = stem.encode()[:LONGEST_NAME].decode(errors='ignore')
    number = 1
    while (chosen := f'{stem}{f"_{number}" if number > 1 else ""}_explained.png').lower() in self._used:
      number += 1
    self._used.add(chosen.lower())
    return chosen


def explanation_figure(explanation: Explanation, found: Found, whose: str) -> Figure:
  """Draws a picture, and beside it the map of each class, all on the same scale."""
  picture, count = explanation.picture, len(explanation.names)
  height, width = picture.shape[:2]
  wide = width >= WIDE * height
  rows, columns = (count + 1, 1) if wide else (-(-(count + 1) // 4), min(count + 1, 4))
  panel = (WIDTH - 0.4) / columns * height / width + 0.55
  panel = min(max(panel, PANEL_ROWS[0]), PANEL_ROWS[1])
  title = f'{found.name}' + (f' (true class: {found.true_class})' if found.true_class else '')
  figure = drawing.new_figure(1.75 + rows * panel, f'{one_line(title)}\n{whose}')
  axes = figure.subplots(rows, columns, squeeze=False).flat
  scale = float(np.abs(explanation.maps).max())
  for own in axes:
    own.set_axis_off()
  show(axes[0], picture / 255 if picture.dtype == np.uint8 else picture, 'the picture', columns)
  for own, name, probability, heat in zip(
    axes[1:], explanation.names, explanation.probabilities, explanation.maps, strict=False
  ):
    caption = f'{name} ({percent(probability)})'.replace(' %', '\u00a0%')
    show(own, heat_maps.overlay(picture, heat, explanation.box, scale), caption, columns)
  _colour_bar(figure, scale, explanation.maps.shape[1:])
  return figure


def show(axes: Axes, image: np.ndarray, caption: str, columns: int) -> None:
  """Shows an image `[h, w, C]` below its caption."""
  axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=1)
  axes.set_title(fit(caption, (WIDTH - 0.4) / columns * 72 - 10, NORMAL, 2), fontsize=NORMAL, **user_text())


def _colour_bar(figure: Figure, scale: float, shape: tuple[int, int]) -> None:
  values = np.linspace(-1, 1, 256)[None]
  bar = figure.add_axes((0.25, 0.0, 0.5, 0.05))
  bar.imshow(heat_maps.blended(np.full_like(values, 0.6), values), aspect='auto', extent=(-scale, scale, 0, 1))
  bar.set_yticks([])
  bar.tick_params(labelsize=SMALL)
  cells = 'one cell: it says nothing about places' if shape == (1, 1) else f'{shape[0]}x{shape[1]} cells'
  bar.set_xlabel(
    f'against the class | for the class: what each place adds to its score (the mean, plus a constant, is the logit)\n'
    f'a map has {cells}; pale parts of a picture were not seen by the network',
    fontsize=SMALL,
  )
