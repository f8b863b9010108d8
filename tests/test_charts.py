import re

import numpy as np
import pytest
from report_helpers import Page

from googlenet_jax.page import charts


def test_ticks_are_round_and_cover_the_values():
  rng = np.random.default_rng(0)
  for low, span in zip(rng.uniform(0, 10, 200), 10 ** rng.uniform(-6, 6, 200), strict=True):
    ticks = charts.ticks(low, low + span)
    assert 1 <= len(ticks) <= 6
    assert low - 1e-6 * span <= ticks[0] <= ticks[-1] <= low + span * (1 + 1e-6)
    around = charts._around(low, low + span, np.inf)
    assert around[0] <= low * (1 + 1e-9)
    assert around[-1] >= (low + span) * (1 - 1e-9)
    assert 2 <= len(around) <= 9
    assert len(set(around)) == len(around)


def test_a_chart_shows_each_value_at_its_place():
  svg = charts.chart('loss', [charts.Line('test', [(0.0, 0.0), (1.0, 2.0), (2.0, 4.0)])])
  places = re.findall(r'<circle class=test cx=([\d.]+) cy=([\d.]+)', svg)
  x, y = np.array(places, float).T
  np.testing.assert_allclose(
    x, [charts.LEFT, (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2, charts.WIDTH - charts.RIGHT]
  )
  np.testing.assert_allclose(y[1], (y[0] + y[2]) / 2, atol=0.11)
  assert y[0] == charts.HEIGHT - charts.BOTTOM
  assert 'test ends at 4' in svg


@pytest.mark.parametrize(
  'values', [[], [np.nan], [1.0], [0.0], [0.0, 0.0], [1e-9, 1e9, 1.0, 1.0], [np.inf, 3.0], [7.0] * 5000]
)
def test_odd_values_make_a_chart_or_none(values):
  svg = charts.chart('loss', [charts.Line('train', [*enumerate(values)])], log=True)
  if not any(map(np.isfinite, values)):
    assert svg == ''
    return
  Page(svg)
  assert 'nan' not in svg
  assert len(svg) < 20_000
  assert ('log scale' in svg) == (max(values) == 1e9)


def test_accuracies_end_at_one():
  svg = charts.chart('accuracy', [charts.Line('test', [(1, 0.93), (2, 0.999)])], most=1.0)
  marks = [float(mark) for mark in re.findall(r'<text class=y[^>]*>([\d.]+)<', svg)]
  assert marks[-1] == 1
  assert marks[0] > 0.5


@pytest.mark.parametrize('values', [[5.0, 6.0], [-1.0, -3.0], [-2.0, 1e300], [1e-300, 2e-300]])
def test_impossible_values_make_a_chart(values):
  svg = charts.chart('accuracy', [charts.Line('test', [(-3.0, values[0]), (-1.0, values[1])])], most=1.0)
  Page(svg)
  assert 'nan' not in svg
