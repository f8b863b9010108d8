"""What all pictures share: colours, fonts, text that fits, files.

Pictures are eight inches wide and have no text below 8 points, so they can be read at 800 pixels.
"""

import contextlib
import functools
import pathlib
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from googlenet_jax.evaluation import fonts
from googlenet_jax.evaluation.own_matplotlib import (
  Axes,
  Figure,
  FigureCanvasAgg,
  font_manager,
  own_settings,
  text_to_path,
)
from googlenet_jax.host.errors import JOINERS, one_line
from googlenet_jax.host.files import replacing

# The palette of Okabe and Ito (2008): colour-blind people can tell its colours apart. One colour has one meaning.
TRAIN, VALIDATION, TEST = '#0072B2', '#009E73', '#D55E00'
RIGHT, WRONG = '#56B4E9', '#E69F00'
ONE_MODEL, ENSEMBLE = '#CC79A7', '#000000'
LEARNING_RATE = '#666666'

WIDTH = 8.0  # inches
DPI = 150
TITLE, NORMAL, SMALL = 11, 9, 8  # font sizes in points


def user_text() -> dict[str, Any]:
  """Returns matplotlib options for texts of `fit`: `$` is a dollar sign, and other alphabets are possible."""
  return {'parse_math': False, 'family': fonts.families()}


def new_figure(height: float, title: str) -> Figure:
  """Makes a figure of `height` inches; a long title is broken into lines."""
  figure = Figure(figsize=(WIDTH, height), layout='constrained')
  lines = (fit(line, WIDTH * 72 - 24, TITLE, 3) for line in title.split('\n'))
  figure.suptitle('\n'.join(lines), fontsize=TITLE, **user_text())
  return figure


def label_axes(axes: Axes, x: str, y: str) -> None:
  """Writes the names of both axes."""
  axes.set_xlabel(x, fontsize=NORMAL)
  axes.set_ylabel(y, fontsize=NORMAL)
  axes.tick_params(labelsize=SMALL)


def save(path: pathlib.Path, make: Callable[..., Figure], *arguments: Any) -> None:
  """Writes the figure that `make(*arguments)` returns as a PNG. Both happen without the user's matplotlib settings."""
  with fonts.warning_of_lacking(), own_settings():
    figure = make(*arguments)
    FigureCanvasAgg(figure)  # draws without a screen and without pyplot's global state
    with replacing(path) as temporary, no_glyph_warnings():
      figure.savefig(temporary, dpi=DPI, format='png')


@contextlib.contextmanager
def no_glyph_warnings() -> Iterator[None]:
  """Silences warnings about characters that no font has. They are drawn as boxes."""
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='.*Glyph')
    yield


def percent(share: float) -> str:
  """Writes whole percent. Only 0 itself gives `0 %`, and only 1 itself gives `100 %`."""
  if 0 < share < 0.005:
    return '<1 %'
  return '>99 %' if 0.995 <= share < 1 else f'{100 * share:.0f} %'


def plural(count: int, noun: str) -> str:
  """`1 crop`, `10 crops`."""
  return f'{count} {noun}{"s" * (count != 1)}'


def fit(text: str, points: float, size: float, lines: int = 1) -> str:
  """Breaks a text into lines, and takes out its middle if it is too long.

  Args:
    text: what to write. Its start and its end are kept, because class names often differ at the end.
    points: width of a line.
    size: font size in points.
    lines: greatest number of lines.

  Returns:
    The text with line breaks; control characters and bytes that are no text become escapes.
  """
  letters = _letters(text)
  kept = min(len(letters), int(4 * lines * points / size))  # few letters are narrower than a quarter of the font size
  while True:
    shortened = letters
    if kept < len(letters):
      start, end = ''.join(letters[: (kept + 1) // 2]), ''.join(letters[len(letters) - kept // 2 :])
      shortened = _letters(f'{start.rstrip()}…{end.lstrip()}')
    broken = _break(shortened, points / size)
    if len(broken) <= lines or kept <= 2:
      return '\n'.join(broken)
    kept -= 1


def _letters(text: str) -> list[str]:
  """Divides a text into letters with the marks that belong to them, which are drawn as one."""
  letters = []
  for character in ''.join(c if c == '\u00a0' else one_line(c) for c in text):
    fonts.look_up(character)
    joined = letters and (character in JOINERS or letters[-1][-1] == '\u200d')
    if joined or (letters and unicodedata.category(character).startswith('M')):
      letters[-1] += character
    else:
      letters.append(character)
  return letters


def _break(letters: list[str], ems: float) -> list[str]:
  """Breaks a text into lines no wider than `ems`, after a space or `_-/` if there is one."""
  lines, line = [], []
  for letter in letters:
    if line and sum(map(_em, [*line, letter])) > ems:
      end = max((i + 1 for i, other in enumerate(line) if other in ' _-/'), default=len(line))
      lines.append(''.join(line[:end]).rstrip(' '))
      line = line[end:]
    line.append(letter)
  return [*lines, ''.join(line)]


@functools.cache
def _em(letter: str) -> float:
  """Width of a letter as a multiple of the font size."""
  properties = font_manager.FontProperties(family=fonts.families(), size=100)
  with no_glyph_warnings():
    return text_to_path.get_text_width_height_descent(letter, properties, ismath=False)[0] / 100
