"""Curves as SVG inside a page: sharp at every size, in the colours of the page, light or dark."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 340, 210  # units of the drawing; about pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 34  # room for what stands beside the axes
POINTS = 300  # most points of a line; more cannot be told apart
MARKED = 60  # most points of a line with a mark of its own
LOG_RATIO = 20  # a scale is logarithmic if the highest value is more than this many times the median


class Line(NamedTuple):
  """A line of a chart."""

  kind: str  # train, validation, test or rate: decides its colour and marks
  points: Sequence[tuple[float, float]]  # epoch and value
  label: str = ''  # for what a mark says when the mouse is on it


def chart(title: str, lines: Sequence[Line], most: float = math.inf, log: bool = False) -> str:
  """Returns a chart of values against epochs.

  Args:
    title: what the values are.
    lines: what is drawn, the last one on top.
    most: the largest value that is possible.
    log: whether the scale may be logarithmic.
  """
  lines = [line._replace(points=_thinned(_possible(line.points))) for line in lines]
  lines = [line for line in lines if line.points]
  if not lines:
    return ''
  values = np.array([y for line in lines for _, y in line.points])
  log = log and values.min() > 0 and values.max() > LOG_RATIO * np.median(values)
  of = math.log10 if log else float
  marks = _powers(values.min(), values.max()) if log else _around(values.min(), values.max(), most)
  low, high = of(min(marks[0], values.min())), of(max(marks[-1], values.max()))
  last = max(0.0, *(x for line in lines for x, _ in line.points)) or 1.0
  place_x = lambda x: LEFT + (WIDTH - LEFT - RIGHT) * x / last
  place_y = lambda y: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (of(y) - low) / (high - low)
  parts = [f'<text class=title x=0 y=12>{title}{" (log scale)" if log else ""}</text>']
  for mark in marks:
    y = f'{place_y(mark):.1f}'
    parts.append(f'<path class=grid d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class=y x={LEFT - 7} y={y}>{mark:g}</text>')
  for mark in ticks(0, last):
    parts.append(f'<text class=x x={place_x(mark):.1f} y={HEIGHT - BOTTOM + 16}>{mark:g}</text>')
  parts.append(f'<text class=x x={(LEFT + WIDTH - RIGHT) / 2} y={HEIGHT - 3}>epoch</text>')
  parts += [_drawn(line, place_x, place_y) for line in lines]
  said = '; '.join(f'{line.label or line.kind} ends at {line.points[-1][1]:.4g}' for line in lines)
  return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{title}: {said}">{"".join(parts)}</svg>'


def _possible(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  return [point for point in points if all(map(math.isfinite, point))]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
  """Takes every n-th point, and the last one."""
  every = -(-len(points) // POINTS) or 1
  return points[(len(points) - 1) % every :: every]


def _drawn(line: Line, place_x, place_y) -> str:
  places = [(f'{place_x(x):.1f}', f'{place_y(y):.1f}') for x, y in line.points]
  path = f'<path class="line {line.kind}" d="M{"L".join(" ".join(place) for place in places)}"/>'
  if len(places) > 2 and (line.kind in ('train', 'rate') or len(places) > MARKED):
    return path
  marks = (
    f'<circle class={line.kind} cx={x} cy={y} r=2.8><title>{line.label or line.kind}, epoch {epoch:.4g}: {value:.4g}'
    '</title></circle>'
    for (x, y), (epoch, value) in zip(places, line.points, strict=True)
  )
  return path + ''.join(marks)


def _step(low: float, high: float, most: int = 5) -> float:
  """Returns 1, 2 or 5 times a power of ten, at most `most` of which go from `low` to `high`."""
  power = 10.0 ** math.floor(math.log10((high - low) / most))
  return next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= most)


def ticks(low: float, high: float) -> list[float]:
  """Returns a few round numbers from `low` to `high`."""
  step = _step(low, high)
  return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _around(low: float, high: float, most: float) -> list[float]:
  """Returns round numbers around all values; they begin at 0 unless that would hide what changes."""
  low = 0.0 if 0 <= low < 0.6 * high else low
  least = 0.02 * abs(high) or 1.0
  if high - low < least:  # so equal values have a scale, too
    low, high = low - least / 2, high + least / 2
  step = _step(low, high)
  marks = [number * step for number in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
  possible = [mark for mark in marks if mark <= most + step / 1000]
  return possible if len(possible) > 1 else marks


def _powers(low: float, high: float) -> list[float]:
  """Returns powers of ten around all values, or 1, 2 and 5 times them if these are few."""
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  if len(powers) > 3:
    return [10.0**power for power in powers[:: -(-len(powers) // 6)]]
  found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
  inner = [mark for mark in found if low <= mark <= high]
  below, above = [mark for mark in found if mark < low], [mark for mark in found if mark > high]
  return [*below[-1:], *inner, *above[:1]]


def legend(kinds: Sequence[str]) -> str:
  """Returns which line is which."""
  swatch = '<svg viewBox="0 0 28 8" aria-hidden=true><path class="line {0}" d="M0 4H28"/>{1}</svg>{0}'
  dots = {kind: '' if kind == 'train' else f'<circle class={kind} cx=14 cy=4 r=2.8 />' for kind in kinds}
  return '<p class=legend>' + ' '.join(f'<span>{swatch.format(kind, dots[kind])}</span>' for kind in kinds) + '</p>'
