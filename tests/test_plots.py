"""Pictures: what they say, limits of their axes, and that no text is cut off or written over another."""

import dataclasses
import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

from googlenet_jax.data.splits import Split
from googlenet_jax.evaluation import drawing, galleries, heat_maps, plots
from googlenet_jax.evaluation.evaluate import Evaluation

TITLE = 'configs/digits.py on digits, test split, step 132'
FASHION = ['T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot']
LONG = [f'a very long class name with spaces {i}' for i in range(1000)]


def record(epoch, split='train', loss=1.0, accuracy=0.5):
  return {
    'step': int(10 * epoch), 'epoch': epoch, 'split': split, 'loss': loss, 'accuracy': accuracy,
    'learning_rate': 0.01, 'examples_per_second': 100.0,
  }  # fmt: skip


def run(epochs, splits=('train', 'test')):
  return [record(e, split, 2 / e, 1 - 0.5 / e) for e in range(1, epochs + 1) for split in splits]


def from_counts(counts, confidence=0.84):
  """An evaluation with a confusion matrix of `counts`; every prediction has the same probability."""
  counts = np.asarray(counts)
  classes = len(counts)
  labels, predictions = (np.repeat(axis, counts.ravel()) for axis in np.indices(counts.shape).reshape(2, -1))
  probabilities = np.full((len(labels), classes), (1 - confidence) / (classes - 1))
  probabilities[np.arange(len(labels)), predictions] = confidence
  return Evaluation(labels.astype(np.int32), np.log(probabilities).astype(np.float32))


def some_counts(classes, mistakes=3):
  rng = np.random.default_rng(classes)
  counts = np.diag(rng.integers(20, 999, classes))
  for row in range(classes):
    counts[row, rng.integers(0, classes, mistakes)] += rng.integers(1, 60, mistakes)
  return counts


def pictures(count, height=8, width=8, channels=1):
  images = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), np.uint8)
  return Split(images, np.zeros(count, np.int32))


def texts_of(figure):
  """The texts that are drawn."""
  found = [*([figure._suptitle] if figure._suptitle else []), *figure.texts]
  found += itertools.chain.from_iterable(legend.get_texts() for legend in figure.legends)
  for axes in [*figure.axes, *itertools.chain.from_iterable(axes.child_axes for axes in figure.axes)]:
    found += [*axes.texts, axes.title]
    for axis in (axes.xaxis, axes.yaxis):
      low, high = sorted(axis.get_view_interval())
      ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and axes.axison]
      found += [axis.label, *(label for tick in ticks for label in (tick.label1, tick.label2))]
  return list({id(t): t for t in found if t.get_text() and t.get_visible()}.values())


def checked(figure):
  """Lays the figure out and returns all its texts, after a check that they are whole, apart and large enough."""
  FigureCanvasAgg(figure)
  with drawing.no_glyph_warnings():
    figure.draw_without_rendering()
    texts = texts_of(figure)
    boxes = [text.get_window_extent() for text in texts]
  for text, box in zip(texts, boxes, strict=True):
    assert box.x0 >= -1, text
    assert box.y0 >= -1, text
    assert box.x1 <= figure.bbox.x1 + 1, text
    assert box.y1 <= figure.bbox.y1 + 1, text
    assert text.get_fontsize() >= drawing.SMALL, text
  level = [pair for pair in zip(texts, boxes, strict=True) if pair[0].get_rotation() in (0, 90)]
  for (one, box), (other, beside) in itertools.combinations(level, 2):
    overlap = min(box.x1, beside.x1) - max(box.x0, beside.x0), min(box.y1, beside.y1) - max(box.y0, beside.y0)
    assert min(overlap) < 2, (one, other)
  return [text.get_text().replace('\u00a0', ' ') for text in texts]


def lines_by_label(axes):
  return {line.get_label(): line for line in axes.lines}


# Curves ---------------------------------------------------------------------------------------------------------------


def test_curves_have_a_title_units_and_every_split():
  splits = ('train', 'validation', 'validation_raw', 'test', 'test_raw')
  figure = plots._curves_figure(run(6, splits), f'{TITLE}\ntest accuracy 0.978')
  texts = checked(figure)
  assert {f'{TITLE}\ntest accuracy 0.978', 'loss (nats)', 'accuracy (share right)', 'learning rate', 'epoch'} <= {
    *texts
  }
  labels = {'train', 'validation', 'validation, raw weights', 'test', 'test, raw weights'}
  assert labels <= {*texts}
  loss, accuracy, rate = figure.axes
  for axes, values in ((loss, [2 / e for e in range(1, 7)]), (accuracy, [1 - 0.5 / e for e in range(1, 7)])):
    assert set(lines_by_label(axes)) == labels
    np.testing.assert_allclose(lines_by_label(axes)['test'].get_ydata(), values)
    assert axes.get_legend() is None  # it stands below the panels
  np.testing.assert_allclose(rate.lines[0].get_ydata(), 0.01)
  assert rate.get_ylim()[0] == 0


def test_validation_is_visible_where_test_is_the_same():
  figure = plots._curves_figure(run(6, ('validation', 'test')), TITLE)
  lines = lines_by_label(figure.axes[1])
  validation, test = lines['validation'], lines['test']
  assert validation.get_linewidth() >= 2 * test.get_linewidth()
  assert validation.get_markersize() >= 1.5 * test.get_markersize()
  assert validation.get_markerfacecolor() == 'none'
  assert figure.axes[1].lines.index(validation) < figure.axes[1].lines.index(test)  # drawn first
  assert len({(to_hex(line.get_color()), line.get_linestyle(), line.get_marker()) for line in lines.values()}) == 2


def test_high_early_losses_leave_room_for_the_others():
  losses = [2.6, 1.4, 257.8, 0.9, 86.9, 0.3, 0.28, 0.1, 0.04]
  records = [record(e, 'test', loss) for e, loss in enumerate(losses, start=1)]
  loss = plots._curves_figure(records, TITLE).axes[0]
  assert loss.get_yscale() == 'log'
  assert loss.get_ylabel() == 'loss (nats, log scale)'
  below = loss.transAxes.inverted().transform(loss.transData.transform([(1, 1.4), (1, 0.04)]))[:, 1]
  assert below[0] - below[1] > 0.25  # of the height of the panel
  assert 0 < loss.get_ylim()[0] < 0.04
  assert loss.get_ylim()[1] > 257.8
  ordinary = plots._curves_figure(run(8), TITLE).axes[0]
  assert ordinary.get_yscale() == 'linear'
  assert ordinary.get_ylim() == (0, pytest.approx(2.1))


@pytest.mark.parametrize(
  'records', [[], [record(0.45)], [record(0.5), record(1.0)], [record(1.0), record(1.0, 'test', 0.0, 1.0)]]
)
def test_curves_of_runs_that_have_just_begun(records):
  figure = plots._curves_figure(records, TITLE)
  checked(figure)
  for axes in figure.axes:
    low, high = axes.get_ylim()
    assert 0 <= low < high
    assert axes.get_xlim()[0] == 0
    for line in axes.lines:
      assert line.get_marker() not in ('', 'None')  # points are seen where there is no line yet
      assert low <= min(line.get_ydata()) <= max(line.get_ydata()) <= high


def test_the_last_point_of_a_long_run_has_a_marker():
  figure = plots._curves_figure(run(87), TITLE)
  start, every = lines_by_label(figure.axes[0])['test'].get_markevery()
  marked = range(87)[start::every]
  assert marked[-1] == 86
  assert 10 <= len(marked) <= 12


# Confusion matrix -----------------------------------------------------------------------------------------------------


def test_cells_hold_counts_and_shares():
  counts = np.array([[90, 9, 1], [0, 300, 1], [0, 0, 0]])
  figure = plots._confusion_figure(from_counts(counts), ['rose', 'tulip', 'Mädesüß'], TITLE)
  texts = checked(figure)
  assert f'{TITLE}\naccuracy 0.9726 (390 of 401 images)' in texts
  assert {'90\n90 %', '9\n9 %', '1\n1 %', '300\n>99 %', '1\n<1 %'} <= {*texts}
  assert len(figure.axes[0].texts) == 5  # cells without images are empty
  assert {'true class', 'prediction', 'Mädesüß'} <= {*texts}
  assert {'90.0 %', '99.7 %', 'no images'} <= {*texts}  # accuracy of each class
  row_of_nine = next(text for text in figure.axes[0].texts if text.get_text() == '9\n9 %')
  assert row_of_nine.get_position() == (1, 0)  # column 1, row 0: said tulip, true class rose


def test_single_mistakes_are_visible_and_have_another_colour():
  counts = np.diag([1000] * 10)
  counts[3, 6] = 1
  figure = plots._confusion_figure(from_counts(counts), FASHION, TITLE)
  wrong, right = figure.axes[0].images
  assert wrong.get_array().count() == 1
  color = np.array(wrong.to_rgba(wrong.get_array())[3, 6][:3])
  assert np.linalg.norm(color - 1) > 0.25  # not white
  assert color[0] > color[2]  # orange
  color = right.to_rgba(right.get_array())[0, 0]
  assert to_hex(color).upper() == drawing.RIGHT


@pytest.mark.parametrize(('classes', 'names'), [(2, ['open', 'closed eye']), (12, LONG), (20, LONG), (7, ['石英'] * 7)])
def test_the_matrix_of_few_classes_has_room_for_its_texts(classes, names):
  counts = some_counts(classes)
  counts[0, 0] = 9999 if classes > 2 else 12345
  figure = plots._confusion_figure(from_counts(counts), names[:classes], TITLE)
  texts = checked(figure)
  assert any(text.startswith(str(counts[0, 0])) for text in texts)
  assert len(figure.axes[0].texts) == np.count_nonzero(counts)
  assert len(figure.axes[0].get_xticklabels()) == classes


def test_counts_are_short_where_cells_are_small():
  counts = np.diag([12345] * 13)
  texts = checked(plots._confusion_figure(from_counts(counts), LONG[:13], TITLE))
  assert texts.count('12k') == 13


@pytest.mark.parametrize('classes', [21, 1000])
def test_many_classes_have_a_list_of_the_most_confused_pairs(classes):
  counts = np.diag([10] * classes)
  counts[5, 17], counts[17, 5], counts[2, 3] = 30, 12, 1
  names = [*LONG[:5], 'rose', *LONG[6:17], 'tulip', *LONG[18:classes]]
  figure = plots._confusion_figure(from_counts(counts), names, TITLE)
  texts = checked(figure)
  assert {'rose taken for tulip', 'tulip taken for rose', '30 of 40 (75 %)', '12 of 22 (55 %)', '1 of 11 (9 %)'} <= {
    *texts
  }
  matrix, bars = (axes for axes in figure.axes if axes.get_label() != '<colorbar>')
  assert [patch.get_width() for patch in bars.patches] == [30, 12, 1]
  wrong, right = matrix.collections
  assert sorted(map(tuple, wrong.get_offsets())) == [(3, 2), (5, 17), (17, 5)]  # columns and rows
  assert len(right.get_offsets()) == classes
  assert wrong.get_sizes()[0] >= 2  # square points


def test_many_classes_without_a_mistake():
  texts = checked(plots._confusion_figure(from_counts(np.diag([5] * 30)), LONG[:30], TITLE))
  assert 'No mistakes.' in texts
  assert f'{TITLE}\naccuracy 1.0000 (150 of 150 images)' in texts


# Images ---------------------------------------------------------------------------------------------------------------


def test_mistakes_say_what_was_said_what_is_true_and_which_image_it_is():
  counts = np.array([[4, 0, 0], [0, 3, 0], [0, 1, 2]])
  figure = galleries._mistakes_figure(from_counts(counts), pictures(10), ['0', '1', '2'], TITLE, 'test')
  texts = checked(figure)
  assert f'{TITLE}\n1 mistake in 10 test images' in texts
  assert '#7\nsaid 1 (84 %),\ntrue 2' in texts
  np.testing.assert_allclose(figure.axes[0].images[0].get_array(), pictures(10).picture(7)[..., 0] / 255)


def test_mistakes_name_their_files_and_show_the_maps_of_what_was_said(monkeypatch):
  class Maps:
    tells_places = True

    def class_maps(self, batch):
      assert batch.keys() == {'image'}
      return np.broadcast_to(np.array([-1.0, 1.0, 0.5]), (len(batch['image']), 2, 2, 3)), None

    def box(self, height, width):
      return 0.0, 0.0, float(height), float(width)

  counts = np.array([[4, 0, 0], [0, 3, 0], [0, 1, 2]])
  split = dataclasses.replace(pictures(10), files=np.array([f'test/c/{i} $.png' for i in range(10)]))
  arguments = from_counts(counts), split, ['0', '1', '2'], TITLE, 'test'
  figure = galleries._mistakes_figure(*arguments, Maps())
  texts = checked(figure)
  assert '7 $.png\nsaid 1 (84 %),\ntrue 2' in texts
  assert any('orange speaks for the answer' in text for text in texts)
  image, map_of_1 = (axes.images[0].get_array() for axes in figure.axes)
  np.testing.assert_allclose(image, split.picture(7)[..., 0] / 255)
  share = heat_maps.STRONGEST  # the map of class 1 is at its strongest everywhere
  orange = share * np.array(heat_maps.COLOURS(1.0)[:3])
  np.testing.assert_allclose(map_of_1[0, 0], orange + (1 - share) * split.picture(7)[0, 0, 0] / 255, atol=1e-2)
  Maps.tells_places = False
  assert len(galleries._mistakes_figure(*arguments, Maps()).axes) == 1


def test_predictions_say_what_was_said_and_whether_it_is_right():
  counts = np.array([[4, 0, 0], [0, 3, 0], [0, 1, 2]])
  figure = galleries._predictions_figure(from_counts(counts), pictures(10), ['wrong', '1', '2'], TITLE, 'test')
  texts = checked(figure)
  assert f'{TITLE}\n10 of 10 test images, evenly spread; 90 % of all answers are right' in texts
  assert texts.count('wrong (84 %)\nright') == 4
  assert texts.count('1 (84 %)\nwrong, is 2') == 1
  frames = [to_hex(axes.spines['left'].get_edgecolor()).upper() for axes in figure.axes]
  assert frames == [drawing.RIGHT] * 7 + [drawing.WRONG] + [drawing.RIGHT] * 2
  many = galleries._predictions_figure(from_counts(10 * counts), pictures(100), ['0', '1', '2'], TITLE, 'test')
  assert len(many.axes) == 18
  np.testing.assert_allclose(many.axes[-1].images[0].get_array(), pictures(100).picture(99)[..., 0] / 255)


def test_the_most_confident_mistakes_come_first():
  labels = np.zeros(50, np.int32)
  probabilities = np.linspace(0.51, 0.99, 50)
  evaluation = Evaluation(labels, np.log(np.stack([1 - probabilities, probabilities], 1)).astype(np.float32))
  figure = galleries._mistakes_figure(evaluation, pictures(50, channels=3), ['shut', 'open'], TITLE, 'validation')
  assert f'{TITLE}\n50 mistakes in 50 validation images; the 30 most confident' in checked(figure)
  assert [int(axes.get_title().split('\n')[0][1:]) for axes in figure.axes] == list(range(49, 19, -1))


def test_no_mistakes_is_a_sentence():
  evaluation = from_counts(np.diag([36] * 10))
  texts = checked(galleries._mistakes_figure(evaluation, pictures(360), FASHION, TITLE, 'test'))
  assert texts == [TITLE, 'No mistakes in 360 test images.']


def test_long_names_do_not_run_into_each_other():
  names = ['screw_defect_scratch_left', 'screw_defect_scratch_right', 'Kreuzschlüsselgrößenangabe', 'W' * 200, LONG[0]]
  counts = np.full((5, 5), 2)
  split = pictures(50, 6, 12)
  texts = checked(galleries._mistakes_figure(from_counts(counts), split, names, TITLE, 'test'))
  captions = [text for text in texts if text.startswith('#')]
  assert len(captions) == 30
  assert max(caption.count('\n') for caption in captions) <= 4
  assert any('scratch_left (84 %)' in caption for caption in captions)  # the ends of names stay


@pytest.mark.parametrize(
  ('used', 'line'),
  [(['shift up to 2 px', 'mirroring'], 'augmentation: shift up to 2 px, mirroring'), ([], 'no augmentation')],
)
def test_augmentations_are_named(used, line):
  stored = [pictures(1, height, width, 3).picture(0) for height, width in ((8, 8), (20, 9), (9, 20))] * 3
  seen = np.random.default_rng(0).uniform(-0.2, 1.2, (9, 16, 16, 3))  # one more than fit in a row
  figure = galleries._augmentations_figure(stored, seen, LONG[:9], TITLE, used)
  texts = checked(figure)
  assert f'{TITLE}\n{line}' in texts
  assert texts.count('stored') == texts.count('seen') == 2  # once a row
  assert len(figure.axes) == 18
  assert figure.axes[0].images[0].get_array().shape == (8, 8, 3)
  assert figure.axes[1].images[0].get_array().shape == (16, 16, 3)


# Table ----------------------------------------------------------------------------------------------------------------


def row(models, crops, errors, top5=0.01):
  error = sum(errors) / len(errors)
  found = {'models': models, 'crops': crops, 'cost': models * crops, 'top1_error': error, 'top5_error': top5}
  return {**found, 'top1_errors': errors, 'top1_gain': 0.0, 'top5_gain': 0.0}


ENSEMBLE = [
  row(1, 1, [0.118, 0.120, 0.122]), row(1, 10, [0.114, 0.118, 0.116]), row(1, 144, [0.117, 0.115, 0.117]),
  row(3, 1, [0.112]), row(3, 10, [0.113]), row(3, 144, [0.114]),
]  # fmt: skip


def test_errors_have_bars_where_members_differ():
  figure = plots._table_figure(ENSEMBLE, TITLE)
  texts = checked(figure)
  assert {TITLE, 'top-1 error (%)', 'top-5 error (%)'} <= {*texts}
  assert {'1 model: mean of 3, bars from lowest to highest', '3 models together'} <= {*texts}
  top1, top5 = figure.axes
  assert [text.get_text() for text in top1.texts] == ['1', '10', '144'] * 2
  one, together = top1.containers
  ends = [segment[:, 1] for segment in one.lines[2][0].get_segments()]
  np.testing.assert_allclose(ends, [(11.8, 12.2), (11.4, 11.8), (11.5, 11.7)])
  assert not together.has_yerr
  assert not top5.containers[0].has_yerr
  assert [label.get_text() for label in top1.get_xticklabels()] == ['1', '3', '10', '30', '144', '432']
  low, high = top1.get_ylim()
  assert 10 < low < 11.2
  assert 12.2 < high < 13


@pytest.mark.parametrize('errors', [[0.12], [0.118, 0.12, 0.122], [0.0], [1.0]])
def test_a_table_of_one_row_has_sensible_axes(errors):
  figure = plots._table_figure([row(1, 144, errors, 0.0)], TITLE)
  texts = checked(figure)
  (axes,) = figure.axes  # no panel for top-5 errors that are all zero
  low, high = axes.get_ylim()
  assert 0 <= low <= 100 * min(errors) <= 100 * max(errors) < high
  assert high - low < max(0.4 * high, 0.2)
  left, right = axes.get_xlim()
  assert 50 < left < 144 < right < 400
  assert texts.count('144') == 2  # the cost, and the crops beside the point


def test_views_are_not_called_crops():
  figure = plots._table_figure([row(1, 1, [0.12]), row(1, 6, [0.11]), row(1, 10, [0.13]), row(1, 144, [0.12])], TITLE)
  checked(figure)
  assert [text.get_text() for text in figure.axes[0].texts] == ['1', '6', '10', '144']
  assert figure.axes[0].get_xlabel() == 'cost: models x crops (beside a point: crops; 6: views)'


def test_ticks_at_costs_do_not_touch():
  rows = [row(models, crops, [0.3 - 0.01 * models - 0.0001 * crops]) for models in (1, 7) for crops in (1, 6, 10, 144)]
  checked(plots._table_figure(rows, TITLE))


# All ------------------------------------------------------------------------------------------------------------------


def test_every_picture_is_a_png_at_its_path(tmp_path, monkeypatch):
  monkeypatch.setattr(drawing, 'DPI', 50)
  counts = some_counts(3)
  evaluation = from_counts(counts)
  split, names = pictures(len(evaluation.labels)), ['$5', '$6_x^2', '石英']
  plots.curves(run(3), tmp_path / 'curves.png', TITLE)
  plots.confusion(evaluation, names, tmp_path / 'confusion.png', TITLE)
  galleries.predictions(evaluation, split, names, tmp_path / 'predictions.png', TITLE)
  galleries.mistakes(evaluation, split, names, tmp_path / 'mistakes.png', TITLE)
  galleries.augmentations(
    list(split.images[:3]), split.images[:3] / 255, names, tmp_path / 'augmentations.png', TITLE, []
  )
  plots.table(ENSEMBLE, tmp_path / 'table.png', TITLE)
  assert len(list(tmp_path.iterdir())) == 6
  for path in tmp_path.iterdir():
    with Image.open(path) as image:
      assert image.format == 'PNG'
      assert image.width == drawing.WIDTH * 50


def test_colours_are_apart():
  colors = [drawing.TRAIN, drawing.VALIDATION, drawing.TEST, drawing.RIGHT, drawing.WRONG, drawing.ONE_MODEL]
  colors += [drawing.ENSEMBLE, drawing.LEARNING_RATE]
  assert len(set(colors)) == 8


@pytest.mark.parametrize(
  ('text', 'lines', 'fitted'),
  [
    ('short', 1, 'short'),
    ('ankle boot', 2, 'ankle\nboot'),
    ('left_scratch', 2, 'left_\nscratch'),
    ('abcdefghijklmnop', 1, 'abc…op'),
    ('abcdefghijkl', 2, 'abcdefg\nhijkl'),
    ('', 1, ''),
  ],
)
def test_texts_are_broken_or_shortened(text, lines, fitted):
  assert drawing.fit(text, 45, 10, lines) == fitted


@pytest.mark.parametrize(
  ('share', 'text'), [(0, '0 %'), (0.001, '<1 %'), (0.84, '84 %'), (0.999, '>99 %'), (1, '100 %')]
)
def test_shares_are_neither_nothing_nor_all_by_rounding(share, text):
  assert drawing.percent(share) == text
