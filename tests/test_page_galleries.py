"""The sections of the report that show images, of many classes and of two."""

import re

import numpy as np
import pytest
from helpers import small_config
from report_helpers import SIZE, Page, small_runs

from googlenet_jax import runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.data.splits import Split
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.host import sharding
from googlenet_jax.page import comparison, galleries, markup, report, results
from googlenet_jax.page.subject import Subject


@pytest.fixture(autouse=True, scope='module')
def machine():
  with small_runs():
    yield


def made_up(classes, count, side, folder, said_wrong=0.5):
  """A run whose answers are made up, with pictures that cannot be compressed."""
  rng = np.random.default_rng(0)
  config = small_config(image_size=SIZE)
  names = [f'{"ö" * 195}{number:05d}' for number in range(classes)]
  labels = rng.integers(0, classes, count).astype(np.int32)
  said = np.where(rng.random(count) < said_wrong, (labels + rng.integers(1, 3, count)) % classes, labels)
  log_probabilities = np.full((count, classes), -20, np.float32)
  log_probabilities[np.arange(count), said] = np.log(rng.uniform(0.3, 0.9, count))
  noise = rng.integers(0, 256, (32, side, side, 3), np.uint8)

  class Images:
    def fetch(self, indices):
      return noise[indices % 32], None

    pace = type('Pace', (), {'add': lambda *_: None})()

  images = np.array([f'{"é" * 200}{number}.jpg' for number in range(count)])
  split = Split(Images(), labels, files=images)
  classifier = Classifier(config, names, 3, [], sharding.make_mesh())
  found = results.Results(
    classifier, 'made up', 'test', split, (Evaluation(labels, log_probabilities),), {'test': count}
  )
  folder.mkdir()
  return Subject(folder, runs.Run(config, tuple(names), (side, side, 3)), classifier, found, ())


@pytest.fixture
def no_maps(monkeypatch):
  monkeypatch.setattr(results.Results, 'heat_maps', lambda *_, **__: [])


def test_with_a_thousand_classes_the_report_is_bounded_and_says_so(tmp_path, monkeypatch):
  one = made_up(1000, 20_000, 176, tmp_path / 'run')
  drawn = [results.thumbnail(np.random.default_rng(1).integers(0, 256, (176, 176, 3), np.uint8))]
  monkeypatch.setattr(results.Results, 'heat_maps', lambda self, indices, **_: drawn * len(indices))
  whole, part = galleries.MATRIX_ROOM, 300_000  # the whole room takes long to fill
  monkeypatch.setattr(galleries, 'MATRIX_ROOM', part)
  text = report.page(one, None, '')
  page = Page(text)
  (table,) = page.all('table', **{'class': 'matrix'})
  assert len([name for name, _, parents in page.elements if name == 'tr' and table[0] in [p for _, p in parents]]) == 21
  assert re.search(r'The 20 of 1,000 classes that are confused most: \d+ of all \d,\d\d\d mistakes are in these', text)
  assert re.search(r'\d+ of these had no room in the file', text)
  assert re.search(r'The \d\d most confident of \d,\d\d\d mistakes', text)
  assert len(text.encode()) - part + whole + 3 * comparison.ROOM < report.MOST_BYTES


def test_every_cell_gets_a_picture_before_one_gets_two(tmp_path):
  one = made_up(20, 2000, 40, tmp_path / 'run')
  labels, counts = [*range(20)], one.results.confusion
  whole = galleries._cell_pictures(one.results, counts, labels, markup.Room(10**9))
  assert {len(pictures) for pictures in whole.values()} == {galleries.PER_CELL}
  room = markup.Room(sum(len(pictures[0].encode()) for pictures in whole.values()) + 1000)
  found = galleries._cell_pictures(one.results, counts, labels, room)
  assert {len(pictures) for pictures in found.values()} == {1}
  assert room.left_out == sum(map(len, whole.values())) - len(found)


def test_two_classes_have_the_area_under_the_curve(tmp_path, no_maps):
  one = made_up(2, 60, 8, tmp_path / 'run')
  assert 'area under ROC' in Page(report.page(one, None, '')).texts[0]


def test_no_mistakes_and_no_right_answers(tmp_path, no_maps):
  one = made_up(3, 30, 8, tmp_path / 'right', said_wrong=0)
  assert 'No mistakes in 30 test images.' in report.page(one, None, '')
  one = made_up(3, 30, 8, tmp_path / 'wrong', said_wrong=1)
  assert not Page(report.page(one, None, '')).all('section', id='right')
