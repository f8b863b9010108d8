"""Fonts for names in any alphabet: matplotlib's own, and installed ones for the letters that it lacks."""

import contextlib
import functools
from collections.abc import Iterator

import numpy as np

from googlenet_jax.evaluation.own_matplotlib import FT2Font, font_manager
from googlenet_jax.host import console

OWN = 'DejaVu Sans'  # comes with matplotlib
# Looked at first. Any other installed font follows.
PREFERRED = (
  'Noto Sans CJK SC', 'Noto Sans CJK JP', 'Noto Sans SC', 'Microsoft YaHei', 'PingFang SC', 'Hiragino Sans',
  'WenQuanYi Zen Hei', 'WenQuanYi Micro Hei', 'Noto Sans Arabic', 'Noto Sans Devanagari', 'Noto Sans Thai',
  'Noto Emoji', 'Segoe UI Emoji', 'Arial Unicode MS',
)  # fmt: skip
SUBSTITUTES = ('last resort', 'lastresort', 'adobe blank')  # they have every letter, as a box
IGNORED = frozenset(map(chr, range(0xFE00, 0xFE10)))  # variation selectors: they choose a form and draw nothing
SHOWN = 20  # letters in the warning

_used = [OWN]  # it only grows: a letter keeps its font
_lacking: dict[str, None] = {}  # letters of the picture being drawn that no font has
_said = False


def families() -> list[str]:
  """Returns the names of the fonts for the letters that were looked up so far."""
  return list(_used)


def look_up(letter: str) -> None:
  """Finds a font for a letter, among those in use if possible."""
  if not _find(letter):
    _lacking[letter] = None


@contextlib.contextmanager
def warning_of_lacking() -> Iterator[None]:
  """Says which letters of the picture that is drawn inside no installed font has. One line in a process is enough."""
  global _said
  _lacking.clear()
  yield
  if _lacking and not _said:
    _said = True
    letters = ' '.join(list(_lacking)[:SHOWN]) + (' and others' if len(_lacking) > SHOWN else '')
    console.warn_once(f'no installed font has {letters}: pictures show boxes; fonts such as Noto have them')


@functools.cache
def _find(letter: str) -> bool:
  """Puts a font with this letter in use, and returns whether there is one."""
  if letter in IGNORED or any(_has(face, letter) for name in _used for face in _faces(name)):
    return True
  for search in (_known_names, _new_names):
    for name in search():
      if any(_has(face, letter) for face in _faces(name)):
        _used.append(name)
        return True
  return False


def _known_names() -> list[str]:
  """Returns the fonts that matplotlib knows, those first whose letters look best beside its own."""
  names = {font.name for font in font_manager.fontManager.ttflist}
  place = {name: i for i, name in enumerate(PREFERRED)}

  def rank(name: str) -> tuple:
    return place.get(name, len(place)), 'Mono' in name or 'Serif' in name, name

  return sorted((name for name in names if not name.lower().startswith(SUBSTITUTES)), key=rank)


@functools.cache
def _new_names() -> list[str]:
  """Makes known the fonts that were installed after matplotlib listed them, and returns their names."""
  manager = font_manager.fontManager
  before, known = {font.name for font in manager.ttflist}, {font.fname for font in manager.ttflist}
  for path in sorted(set(font_manager.findSystemFonts()) - known):
    try:
      manager.addfont(path)
    except Exception:  # a damaged file or a kind that matplotlib does not draw; it leaves them out too
      continue
  return [name for name in _known_names() if name not in before]


def _faces(name: str) -> list[str]:
  """Returns the file of the face of a font that is drawn, the one nearest to the regular one; none if there is none."""
  faces = [font for font in font_manager.fontManager.ttflist if font.name == name and font.style == 'normal']
  faces.sort(key=lambda font: abs(font.weight - 400) if isinstance(font.weight, int) else 400)
  return [font.fname for font in faces[:1]]


def _has(path: str, letter: str) -> bool:
  """Whether a font draws a letter. Fonts of colour bitmaps know letters that matplotlib draws as nothing."""
  if not (_letters(path) == ord(letter)).any():
    return False
  try:
    glyph = FT2Font(path).load_char(ord(letter))
  except (OSError, RuntimeError):
    return False
  return letter.isspace() or not letter.isprintable() or bool(glyph.width)


@functools.cache
def _letters(path: str) -> np.ndarray:
  """Returns the numbers of all letters in a font."""
  try:
    return np.fromiter(FT2Font(path).get_charmap(), np.uint32)
  except (OSError, RuntimeError):  # gone, damaged, or of bitmaps only
    return np.empty(0, np.uint32)
