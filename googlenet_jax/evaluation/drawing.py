"""What all pictures share: colours, fonts, text that fits, files.

Pictures are eight inches wide and have no text below 8 points, so they can be read at 800 pixels.
"""

import contextlib
import functools
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import text_to_path

from googlenet_jax.host.errors import one_line
from googlenet_jax.host.files import replacing

# The palette of Okabe and Ito (2008): colour-blind people can tell its colours apart. One colour has one meaning.
TRAIN, VALIDATION, TEST = '#0072B2', '#009E73', '#D55E00'
RIGHT, WRONG = '#56B4E9', '#E69F00'
ONE_MODEL, ENSEMBLE = '#CC79A7', '#000000'
LEARNING_RATE = '#666666'

WIDTH = 8.0  # inches
DPI = 150
TITLE, NORMAL, SMALL = 11, 9, 8  # font sizes in points

# Fonts for class names that DejaVu Sans, matplotlib's own font, cannot write. Those that are installed are used.
OTHER_FONTS = (
  'Noto Sans CJK SC', 'Noto Sans CJK JP', 'Noto Sans SC', 'Microsoft YaHei', 'PingFang SC', 'Hiragino Sans',
  'WenQuanYi Zen Hei', 'WenQuanYi Micro Hei', 'Arial Unicode MS', 'Noto Sans Devanagari', 'Noto Sans Thai',
)  # fmt: skip


@functools.cache
def user_text() -> dict[str, Any]:
  """Returns matplotlib options for texts from users: `$` is a dollar sign, and other alphabets are possible."""
  installed = {font.name for font in font_manager.fontManager.ttflist}
  return {'parse_math': False, 'family': ['DejaVu Sans', *(name for name in OTHER_FONTS if name in installed)]}


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


def save(figure: Figure, path: pathlib.Path) -> None:
  """Writes a PNG."""
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
  text = ''.join(letter if letter == '\u00a0' else one_line(letter) for letter in text)
  kept = min(len(text), int(4 * lines * points / size))  # no letter is narrower than a quarter of the font size
  while True:
    shortened = text
    if kept < len(text):
      shortened = f'{text[: (kept + 1) // 2].rstrip()}…{text[len(text) - kept // 2 :].lstrip()}'
    broken = _break(shortened, points / size)
    if len(broken) <= lines or kept <= 2:
      return '\n'.join(broken)
    kept -= 1


def _break(text: str, ems: float) -> list[str]:
  """Breaks a text into lines no wider than `ems`, after a space or `_-/` if there is one."""
  lines, line = [], ''
  for character in text:
    if line and sum(map(_em, line + character)) > ems:
      end = max(line.rfind(mark) for mark in ' _-/') + 1 or len(line)
      lines.append(line[:end].rstrip(' '))
      line = line[end:]
    line += character
  return [*lines, line]


@functools.cache
def _em(character: str) -> float:
  """Width of a character as a multiple of the font size."""
  properties = font_manager.FontProperties(family=user_text()['family'], size=100)
  with no_glyph_warnings():
    return text_to_path.get_text_width_height_descent(character, properties, ismath=False)[0] / 100
