import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import least_table, random_state, small_config, small_digits, write_run

import googlenet_jax
from googlenet_jax.data import datasets
from googlenet_jax.data.splits import Split
from googlenet_jax.evaluation import heat_maps, report
from googlenet_jax.host import files
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet
from googlenet_jax.page import results

SIZE = 17  # pixels: the last map has 2x2 cells
CLASSES = tuple('abcdefghij')


@pytest.fixture(autouse=True, scope='module')
def small_runs():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(googlenet, 'TABLE', least_table())
    digits = dataclasses.replace(small_digits(), class_names=CLASSES)
    patch.setattr(datasets, 'load', lambda **_: digits)
    devices = jax.devices()[:1]
    patch.setattr(jax, 'devices', lambda: devices)
    patch.setattr(jax, 'local_devices', lambda: devices)
    yield


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  config = small_config(image_size=SIZE)
  return write_run(tmp_path_factory.mktemp('runs') / 'run', config, (7, random_state(config), None, True))


@pytest.fixture(scope='module')
def found(workdir):
  return results.load_results(workdir, googlenet_jax.load(workdir))


def test_answers_are_those_of_the_classifier(found):
  probabilities = found.classifier.probabilities(found.split.images)
  assert (found.dataset, found.split_name, found.counts) == ('digits', 'test', {'train': 360, 'test': 104})
  for index in (0, 50, 103):
    answer, own = found.answer(index), probabilities[index]
    assert (answer.name, found.name(index)) == (f'#{index}',) * 2
    assert (answer.true, answer.said) == (CLASSES[found.split.labels[index]], CLASSES[own.argmax()])
    assert answer.probability == pytest.approx(own.max(), rel=1e-4)
    assert answer.probability_of_true == pytest.approx(own[found.split.labels[index]], rel=1e-3)
    assert answer.is_right == (own.argmax() == found.split.labels[index])


def test_the_cells_hold_each_image_once_the_surest_first(found):
  evaluation, seen = found.evaluation, []
  for true, said in np.ndindex(10, 10):
    cell = found.cell(true, said)
    assert len(cell) == found.confusion[true, said] == evaluation.confusion[true, said]
    assert (evaluation.labels[cell] == true).all()
    assert (evaluation.predictions[cell] == said).all()
    assert (np.diff(evaluation.confidences[cell]) <= 0).all()
    seen += cell.tolist()
  assert sorted(seen) == [*range(104)]
  np.testing.assert_array_equal(found.mistakes, evaluation.mistakes)


def test_samples_of_all_answers_cover_all_classes(found):
  assert len(found.samples(12, only_right=False)) == 12
  assert set(found.evaluation.labels[found.samples(20, only_right=False)]) == set(found.evaluation.labels)


def test_samples_are_right_answers_of_all_classes_that_have_any(found):
  labels = found.evaluation.labels
  right = np.flatnonzero(found.evaluation.predictions == labels)
  for count in (1, 10, 1000):
    samples = found.samples(count)
    assert len(samples) == len(set(samples)) == min(count, len(right))
    assert set(samples) <= set(right)
  assert len(right) > 10
  assert set(labels[found.samples(1000)]) == set(labels[right])


def test_thumbnails(found):
  own = found.split.images[3, ..., 0]
  np.testing.assert_array_equal(np.asarray(found.thumbnail(3, enlarge=False)), own)
  large = np.asarray(found.thumbnail(3, side=50))
  np.testing.assert_array_equal(large, own.repeat(6, 0).repeat(6, 1))  # 6 times 8 is 48
  photograph = np.random.default_rng(0).integers(0, 256, (300, 100, 3), np.uint8)
  assert results.thumbnail(photograph, side=160).size == (53, 160)
  assert results.thumbnail(np.full((1, 900, 3), 7, np.uint8), side=9).size == (9, 1)
  assert results.thumbnail(photograph, side=10**4, enlarge=False).size == (100, 300)


def test_heat_maps_are_those_of_the_answers(found):
  indices = [4, 9]
  expected = heat_maps.of_said(
    found.classifier, found.split.batch(np.array(indices)), found.evaluation.predictions[indices]
  )
  for own, other in zip(found.heat_maps(indices), expected, strict=True):
    np.testing.assert_array_equal(np.asarray(own), np.round(255 * other))
  other = found.heat_maps([4], labels=[(found.evaluation.predictions[4] + 1) % 10])[0]
  assert (np.asarray(other) != np.asarray(found.heat_maps([4])[0])).any()
  assert found.heat_maps([]) == []


def test_scores_of_classes(found):
  scores = report.class_scores(found.evaluation)
  for label, row in enumerate(found.per_class()):
    assert (row.name, row.support) == (CLASSES[label], scores.support[label])
    for own, other in zip(row[1:4], scores, strict=False):
      assert own is None if np.isnan(other[label]) else own == other[label]
  never = results.class_rows('ab', np.array([[3, 0], [0, 0]]))
  assert never == [('a', 1.0, 1.0, 1.0, 3), ('b', None, None, None, 0)]


def test_the_most_confused_classes():
  counts = np.diag([90] * 6)
  counts[4, 1], counts[1, 4], counts[5, 4], counts[0, 2] = 9, 8, 7, 3
  assert results.most_confused(counts, 6) == [0, 1, 2, 3, 4, 5]
  assert results.most_confused(counts, 2) == [1, 4]
  assert results.most_confused(counts, 3) == [1, 4, 5]
  assert results.most_confused(counts, 5) == [0, 1, 2, 4, 5]
  assert len(results.most_confused(np.diag([5] * 30), 20)) <= 20


def test_the_members_of_an_ensemble_answer_together(found, workdir):
  other = random_state(small_config(image_size=SIZE), seed=1)
  both = found.classifier.with_networks([*found.classifier.networks, (other.params, other.batch_stats)])
  together = results.load_results(workdir, both)
  assert len(together.evaluations) == 2
  mean = np.mean([np.exp(e.log_probabilities) for e in together.evaluations], axis=0)
  np.testing.assert_allclose(np.exp(together.evaluation.log_probabilities), mean, rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(mean, both.probabilities(found.split.images), rtol=1e-3, atol=1e-6)


def test_a_missing_data_set_is_said(workdir, found, monkeypatch):
  said = []
  assert results.load_results(workdir, found.classifier, 'validation', said.append) is None
  for error in (UserError('there is no such folder'), ImportError('no module of that name')):

    def load(error=error, **_):
      raise error

    monkeypatch.setattr(datasets, 'load', load)
    assert results.load_results(workdir, found.classifier, say=said.append) is None
  assert said == [
    'no pictures: the recipe holds out no validation images',
    'no pictures: the data set digits cannot be loaded here: there is no such folder',
    'no pictures: the data set digits cannot be loaded here: no module of that name',
  ]


def test_pictures_that_cannot_be_read_are_counted(found, workdir, monkeypatch):
  digits = datasets.load()
  files = np.array([f'{n}.png' for n in range(104)])
  damaged = Split(digits.test.images, digits.test.labels, files=files, damaged={'3.png', '5.png'})
  monkeypatch.setattr(datasets, 'load', lambda **_: dataclasses.replace(digits, test=damaged))
  loaded = results.load_results(workdir, found.classifier)
  assert loaded.note == '2 of 104 test pictures cannot be read: each counts as a black picture'
  assert loaded.name(3) == '3.png'


def test_curves_and_files_of_a_run(tmp_path):
  record = {'step': 1, 'epoch': 0.5, 'loss': 1.0, 'accuracy': 0.5, 'learning_rate': 0.1, 'examples_per_second': 9.0}
  splits = ('test', 'train', 'test_raw', 'train')
  lines = [json.dumps({**record, 'step': step, 'split': name}) for step, name in enumerate(splits)]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join([*lines, '{"step": 9,']))
  curves = results.curves(tmp_path)
  assert {name: [r['step'] for r in own] for name, own in curves.items()} == {'train': [1, 3], 'test': [0]}
  assert [*curves] == ['train', 'test']
  assert results.curves(tmp_path / 'none') == {}
  for content in (None, '{"a": 1', '[1]', '{"a": 1}'):
    if content is not None:
      (tmp_path / 'x.json').write_text(content)
    assert files.read_json(tmp_path / 'x.json') == ({'a': 1} if content == '{"a": 1}' else {})


def test_the_layer_table_needs_no_weights(found):
  rows = results.layer_rows(found.classifier.with_networks([]))
  assert rows[0][0] == 'layer'
  assert rows[-1][0] == 'total'
  count = sum(leaf.size for leaf in jax.tree.leaves(found.classifier.params_shape))
  assert rows[-1][-2] == f'{count:,}'
