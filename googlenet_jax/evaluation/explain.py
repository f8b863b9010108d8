"""`--mode=explain`: shows where in a picture the network finds what speaks for a class."""

import collections
import contextlib
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from googlenet_jax import loading
from googlenet_jax.classifier import Explanation
from googlenet_jax.evaluation import drawing, heat_maps, predict, sources
from googlenet_jax.evaluation.drawing import NORMAL, SMALL, WIDTH, fit, percent, user_text
from googlenet_jax.evaluation.own_matplotlib import Axes, Figure, Rectangle
from googlenet_jax.evaluation.sources import Found
from googlenet_jax.host import backend, console, processes
from googlenet_jax.host.errors import UserError, expanded_text, one_line

LONGEST_NAME = 200  # bytes of the name of a file; file systems take 255
WIDE = 1.8  # width divided by height: pictures at least so wide stand below each other
PANEL_ROWS = (0.5, 6.0)  # inches: least and greatest height of a row of panels
BAR_ROW = 1.1  # inches: height of the colour bar with its texts


def explain_paths(
  workdir: pathlib.Path,
  paths: Sequence[str],
  step: int | str | None = None,
  top: int = 3,
  output: pathlib.Path | None = None,
) -> int:
  """Draws class activation maps over pictures, `NAME_explained.png` for each, and prints a line for each.

  Of several processes only the first one works.

  Args:
    workdir: folder of a run or an ensemble, or a file of weights.
    paths: files, folders, patterns, `-`; see `sources.find`.
    step: step of the checkpoint, 'best', or None for the newest.
    top: classes for each picture.
    output: folder to write to; by default `explain` in the workdir. If that cannot be written, only lines are printed.

  Returns:
    The exit status: 0, or 1 if pictures could not be read.

  Raises:
    UserError: there is no such run, its network has no class activation maps, no picture could be read, or `output`
      cannot be written.
  """
  backend.start()  # in all processes: they meet there
  return processes.of_first(_explain_paths(workdir, paths, step, top, output) if processes.is_first() else None)


def _explain_paths(
  workdir: pathlib.Path, paths: Sequence[str], step: int | str | None, top: int, output: pathlib.Path | None
) -> int:
  classifier = loading.load(workdir, step)
  classifier.check_explains()
  found = sources.find(paths, classifier.classes)
  place = predict.output_of(workdir, output, 'explain')
  names, unread = FileNames(paths), 0
  count = f'mean over {len(classifier.networks)} networks in ' if classifier.networks[1:] else ''
  whose = f'class activation maps, {count}{workdir}'

  def compute(batch):
    return classifier.explanations(batch, top)

  with predict.progress(len(found)) as bar:
    for part in predict.batches(classifier, found, compute, grow=False):
      for picture, explanation in part:
        bar.update()
        if explanation is None:
          predict.say_unread(picture, len(found))
          unread += 1
          continue
        name, figure = names.new(picture.found), (explanation_figure, explanation, picture.found, whose)
        drawn = place.write(name, lambda path, figure=figure: drawing.save(path, *figure))
        answers = zip(explanation.names, explanation.probabilities, strict=True)
        answers = '  '.join(f'{one_line(name)} {probability:.2f}' for name, probability in answers)
        where = f'  -> {one_line(place.path(name))}' if drawn else ''
        console.say(f'{one_line(picture.found.name)}  {answers}{where}')
  predict.check_read(len(found) - unread, len(found), picture)
  return predict.status(unread, len(found))


class FileNames:
  """Chooses names of files that do not collide."""

  def __init__(self, arguments: Sequence[str]):
    """Takes what the user named: files, folders, patterns."""
    self._given, self._used, self._numbers = set(), set(), collections.Counter()
    for argument in arguments:
      with contextlib.suppress(UserError):  # `sources.find` says what is wrong with it
        self._given.add(expanded_text(argument).rstrip('/'))

  def new(self, found: Found) -> str:
    """Returns `NAME_explained.png`. For a picture in a folder that was given, NAME begins with its folders in there."""
    parts = found.name.split('/')
    depths = range(len(parts) - 1, 0, -1)  # the folders that hold the picture, innermost first
    depth = next((depth for depth in depths if '/'.join(parts[:depth]) in self._given), len(parts) - 1)
    inside = '/'.join(parts[depth:])
    stem = re.sub(r'[/\\]|\s', '_', one_line(pathlib.PurePath(inside).with_suffix('')))
    stem = stem.encode()[:LONGEST_NAME].decode(errors='ignore')
    while True:
      self._numbers[stem.lower()] += 1
      number = self._numbers[stem.lower()]
      chosen = f'{stem}{f"_{number}" if number > 1 else ""}_explained.png'
      if chosen.lower() not in self._used:  # the name of another picture may end with a number
        self._used.add(chosen.lower())
        return chosen


def explanation_figure(explanation: Explanation, found: Found, whose: str) -> Figure:
  """Draws a picture, and beside it the map of each class, all on the same scale."""
  picture, count = explanation.picture, len(explanation.names)
  height, width = picture.shape[:2]
  wide = width >= WIDE * height
  rows, columns = (count + 1, 1) if wide else (-(-(count + 1) // 4), min(count + 1, 4))
  panel = (WIDTH - 0.4) / columns * height / width + 0.35
  panel = min(max(panel, PANEL_ROWS[0]), PANEL_ROWS[1])
  title = f'{one_line(found.name)}{f" (true class: {one_line(found.true_class)})" if found.true_class else ""}'
  figure = drawing.new_figure(rows * panel + BAR_ROW + 0.6, f'{title}\n{whose}')
  above, below = figure.subfigures(2, 1, height_ratios=(rows * panel, BAR_ROW))
  places = above.subplots(rows, columns, squeeze=False).ravel()
  for axes in places:
    axes.set_axis_off()
  axes, *others = places
  _show(axes, picture / 255 if picture.dtype == np.uint8 else picture, 'the picture', columns)
  top, left, tall, broad = explanation.box
  if tall < height or broad < width:
    for colour, linewidth in (('black', 3), ('white', 1.5)):  # seen on every picture
      axes.add_patch(Rectangle((left - 0.5, top - 0.5), broad, tall, fill=False, color=colour, linewidth=linewidth))
  scale = float(np.abs(explanation.maps).max())
  shown = zip(explanation.names, explanation.probabilities, explanation.maps, strict=True)
  for axes, (name, probability, heat) in zip(others, shown, strict=False):
    caption = f'{name} ({percent(probability)})'.replace(' %', '\u00a0%')
    _show(axes, heat_maps.overlay(picture, heat, explanation.box, scale), caption, columns)
  _draw_bar(below.add_subplot(), scale, explanation.maps.shape[1:])
  return figure


def _show(axes: Axes, image: np.ndarray, caption: str, columns: int) -> None:
  """Shows an image `[h, w, C]` in [0, 1] below its caption."""
  axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap='gray', vmin=0, vmax=1)
  axes.set_title(fit(caption, (WIDTH - 0.4) / columns * 72 - 10, NORMAL, 2), fontsize=NORMAL, **user_text())


def _draw_bar(axes: Axes, scale: float, shape: tuple[int, int]) -> None:
  """Draws the colour bar, and says what it means."""
  values = np.linspace(-1, 1, 256)[None]
  axes.imshow(heat_maps.blended(np.full_like(values, 0.6), values), aspect='auto', extent=(-scale, scale, 0, 1))
  axes.set_yticks([])
  axes.set_box_aspect(0.04)
  axes.tick_params(labelsize=SMALL)
  meaning = 'purple: speaks against the class; orange: speaks for it; grey: says little. All maps have this scale.'
  axes.set_title(meaning, fontsize=SMALL)
  cells = 'one cell and cannot tell places apart' if shape == (1, 1) else f'{shape[0]}x{shape[1]} cells'
  axes.set_xlabel(
    'The mean over a map, plus a constant of the class, is the logit of the class.\n'
    f'A map has {cells}. What lies outside the frame, pale in the maps, the network did not see.',
    fontsize=SMALL,
  )
