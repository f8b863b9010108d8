import csv
import io

import numpy as np
import pytest
from sklearn import metrics

from googlenet_jax.data.splits import Split
from googlenet_jax.evaluation import plots, report, table
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.evaluation.output import Output


def evaluation_of(classes, count=200, seed=0, levels=7):
  """Answers with many equal probabilities."""
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, levels, (count, classes)) / 2
  return Evaluation(
    rng.integers(0, classes, count).astype(np.int32),
    (scores - np.log(np.exp(scores).sum(-1, keepdims=True))).astype(np.float32),
  )


def rows_of(text):
  return [*csv.DictReader(io.StringIO(text, newline=''))]


@pytest.mark.parametrize('levels', [2, 7, 10**6])
@pytest.mark.parametrize('count', [2, 9, 500])
def test_areas_are_those_of_scikit_learn_also_where_scores_are_equal(levels, count):
  rng = np.random.default_rng(count)
  positive = np.append([True, False], rng.integers(0, 2, count - 2).astype(bool))
  scores = rng.integers(0, levels, count) / levels + 0.2 * positive
  roc, found = report.roc(positive, scores), report.precision_recall(positive, scores)
  assert roc.area == pytest.approx(metrics.roc_auc_score(positive, scores), abs=1e-12)
  assert found.area == pytest.approx(metrics.average_precision_score(positive, scores), abs=1e-12)
  x, y, _ = metrics.roc_curve(positive, scores, drop_intermediate=False)
  np.testing.assert_allclose(roc.x, x)
  np.testing.assert_allclose(roc.y, y)
  assert report.roc(~positive, -scores).area == pytest.approx(roc.area)


def test_scores_of_classes_are_those_of_scikit_learn():
  found = evaluation_of(5)
  expected = metrics.precision_recall_fscore_support(found.labels, found.predictions)
  for own, other in zip(report.class_scores(found), expected, strict=True):
    np.testing.assert_allclose(own, other)
  rows = rows_of(report.per_class_csv(found, ['a', 'b,"c', 'd\ne', 'żółty', '日本']))
  assert [row['class'] for row in rows] == ['a', 'b,"c', 'd\ne', 'żółty', '日本']
  assert list(rows[0]) == ['class', 'precision', 'recall', 'f1', 'support']
  assert float(rows[3]['f1']) == pytest.approx(expected[2][3], rel=1e-5)


def test_a_class_that_is_never_said_or_never_there_has_empty_cells():
  log_p = np.log(np.array([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1]], np.float32))
  rows = rows_of(report.per_class_csv(Evaluation(np.array([0, 1]), log_p), 'abc'))
  assert [[*row.values()][1:] for row in rows] == [
    ['0.5', '1', '0.666667', '1'],
    ['', '0', '0', '1'],
    ['', '', '', '0'],
  ]


def test_mistakes_have_files_or_indices_and_both_probabilities():
  p = np.array([[0.9, 0.1], [0.4, 0.6], [0.05, 0.95], [0.2, 0.8]], np.float32)
  found = Evaluation(np.array([1, 1, 0, 0], np.int32), np.log(p))
  images = np.zeros((4, 2, 2, 1), np.uint8)
  rows = rows_of(report.mistakes_csv(found, Split(images, found.labels), ['no', 'yes']))
  assert [[*row.values()] for row in rows] == [
    ['2', 'yes', '0.95', 'no', '0.05'],
    ['0', 'no', '0.9', 'yes', '0.1'],
    ['3', 'yes', '0.8', 'no', '0.2'],
  ]
  split = Split(images, found.labels, files=np.array(['a,b.png', 'b', 'c"d\n.png', 'e']))
  rows = rows_of(report.mistakes_csv(found, split, ['no', 'yes']))
  assert [row['file'] for row in rows] == ['c"d\n.png', 'a,b.png', 'e']


def test_the_files_of_a_report(tmp_path):
  found = evaluation_of(2, 30)
  split = Split(np.zeros((30, 8, 8, 1), np.uint8), found.labels)
  output = Output(tmp_path, suffix='_train')
  report.write(found, split, ['shut', 'open'], output, 'recipe mine')
  assert output.written == ['per_class_train.csv', 'mistakes_train.csv', 'mistakes_train.png', 'roc_train.png']
  assert {path.name for path in tmp_path.iterdir()} == set(output.written)
  found = evaluation_of(3, 30)
  split = Split(np.zeros((30, 8, 8, 1), np.uint8), found.labels)
  output = Output(tmp_path)
  report.write(found, split, 'abc', output, 'recipe mine')
  assert output.written == ['per_class.csv', 'mistakes.csv', 'mistakes.png']


def test_the_curves_of_two_classes_name_their_areas():
  found = evaluation_of(2, 100)
  figure = plots._two_classes_figure(found, ['shut', 'a $ open'], 'recipe mine')
  scores = found.log_probabilities[:, 1] - found.log_probabilities[:, 0]
  left, right = figure.axes
  roc = metrics.roc_auc_score(found.labels, scores)
  assert [line.get_label() for line in left.lines][:2] == [f'{n}: area {roc:.4f}' for n in ('shut', 'a $ open')]
  areas = [metrics.average_precision_score(found.labels == c, s) for c, s in ((0, -scores), (1, scores))]
  labels = [line.get_label() for line in right.lines]
  assert labels == [f'{n}: area {a:.4f}' for n, a in zip(('shut', 'a $ open'), areas, strict=True)]


def test_many_classes_are_printed_in_a_few_lines():
  found = evaluation_of(150, 3000)
  names = [f'class {i}' for i in range(150)]
  lines = table.answers(found, names, 1, 1).splitlines()
  assert lines[0] == 'accuracy of the 10 worst of 150 classes; per_class.csv has all'
  assert len(lines) == 13
  worst = np.nanmin(found.per_class_accuracy)
  assert f'{worst:6.4f}' in lines[1]
  true, said = found.confused_pairs(1)[0]
  times = found.confusion[true, said]
  assert lines[-2].startswith(f'most confused: class {true} taken for class {said} ({times} of ')


def test_two_classes_are_printed_with_the_area():
  found = evaluation_of(2)
  lines = table.answers(found, ['no', 'yes'], 1, 1).splitlines()
  area = metrics.roc_auc_score(found.labels, found.log_probabilities[:, 1] - found.log_probabilities[:, 0])
  assert lines[-2] == f'area under the ROC curve {area:.4f}'
  assert len(lines) == 6
