import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_config

import googlenet_jax
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import augment, datasets, mixing, pipeline, random_keys
from googlenet_jax.data.splits import Dataset, Split
from googlenet_jax.evaluation import galleries, plots
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.host import processes, sharding
from googlenet_jax.training import summary
from googlenet_jax.training.metrics import Metrics

CLASSES = tuple('abcdefghij')


def split_of(count, size=8, sizes=None):
  rng = np.random.default_rng(count)
  images = rng.integers(0, 256, (count, size, size, 1), np.uint8)
  return Split(images, rng.integers(0, 10, count).astype(np.int32), sizes)


def dataset_of(validation=None, sizes=None):
  shape = (8, 8, 1)
  return Dataset('animals', split_of(100), validation, split_of(20, sizes=sizes), CLASSES, shape)


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(jax.devices()[:2])


@pytest.fixture(scope='module')
def config():
  return small_config(image_size=96, name='mine')


@pytest.fixture(scope='module')
def classifier(config, mesh):
  """d2l's whole network; shapes are enough."""
  return Classifier(config, CLASSES, 1, [], mesh)


def test_the_introduction_says_what_is_trained_on_what(config, classifier, mesh, tmp_path):
  assert summary.introduction(config, tmp_path, dataset_of(), classifier, mesh) == (
    f'googlenet_jax {googlenet_jax.__version__}, jax {jax.__version__}, 2 x cpu; output goes to {tmp_path}\n'
    'animals: 100 train, 0 validation, 20 test images of 8x8x1\n'
    'GoogLeNet: 5,977,530 parameters, 276 M multiply-adds per image of 96x96x1'
  )
  sizes = np.full((20, 2), 5, np.int32)
  found = summary.introduction(config, tmp_path, dataset_of(split_of(7), sizes), classifier, mesh)
  assert 'animals: 100 train, 7 validation, 20 test images of many sizes, kept within 8x8x1\n' in found
  few = dataclasses.replace(split_of(100), labels=np.append(np.full(91, 3), np.arange(9)).astype(np.int32))
  unequal = dataclasses.replace(dataset_of(), train=few)
  balanced = small_config(image_size=96, class_weights='balanced')
  found = summary.introduction(balanced, tmp_path, unequal, classifier, mesh)
  assert f'20 test images of 8x8x1; class weights from 0 ({CLASSES[9]}) to 10 ({CLASSES[0]})\n' in found


# Where it stands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hours(monkeypatch):
  """`hours(n)`: training takes n hours by the estimate; returns what it was asked."""

  def set_hours(number):
    asked = []
    monkeypatch.setattr(summary, 'estimate', lambda *arguments: asked.append(arguments) or number)
    return asked

  return set_hours


def test_nothing_is_said_of_a_new_run_that_is_short(config, classifier, hours):
  asked = hours(0.9)
  assert summary.where_it_stands(config, classifier, 0, 60, 10, ended=False) == []
  ((multiply_adds, examples, frozen),) = asked
  assert frozen == 0
  assert examples == 60 * 16
  assert round(multiply_adds / 1e6) == 276


def test_a_long_run_on_a_cpu_is_told_before_it_begins(config, classifier, hours, monkeypatch):
  hours(14.6)
  assert summary.where_it_stands(config, classifier, 0, 60, 10, ended=False) == [
    'No accelerator here: about 15 hours for 60 steps on this CPU. For minutes: --config=configs/fashion_fast.py, or '
    '--config=configs/digits.py'
  ]
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert summary.where_it_stands(config, classifier, 0, 60, 10, ended=False) == []


def test_a_long_run_on_a_folder_is_told_what_makes_it_shorter(config, classifier, hours):
  asked = hours(2)
  config = config.copy_and_resolve_references()
  config.data.name = 'folder'
  said = 'No accelerator here: about 2 hours for 60 steps on this CPU. Faster: smaller images, such as '
  said += '--config.image_size=48'
  freeze = '; or frozen stages: --config.freeze=inception_4e'
  assert summary.where_it_stands(config, classifier, 0, 60, 10, ended=False) == [
    f'{said}{freeze} and --config.init_from'
  ]
  config.init_from = 'x'
  assert summary.where_it_stands(config, classifier, 0, 60, 10, ended=False) == [said + freeze]
  config.freeze = 'conv2'
  assert summary.where_it_stands(config, classifier, 0, 60, 10, ended=False) == [said]
  maps = 48**2 * 49 * 64, 24**2 * 64 * 64, 24**2 * 9 * 64 * 192  # conv1, conv2_reduce, conv2
  assert [frozen for *_, frozen in asked] == [0, 0, sum(maps)]
  assert 'Faster, in another --workdir: ' in summary.where_it_stands(config, classifier, 1, 61, 10, ended=False)[0]


def test_only_the_steps_that_are_left_count(config, classifier, hours):
  asked = hours(0.0)
  assert summary.where_it_stands(config, classifier, 50, 60, 10, ended=False) == ['continuing after step 50 of 60']
  assert asked[0][1] == 10 * 16


def test_an_ended_run_says_how_to_continue_it(config, classifier, hours):
  asked = hours(100.0)
  for step in (60, 61):
    assert summary.where_it_stands(config, classifier, step, 60, 10, ended=True) == [
      f'already ended at step {step}; more --config.epochs or --config.max_steps would continue it'
    ]
  assert summary.where_it_stands(config, classifier, 40, 60, 10, ended=True) == [
    'already ended at step 40; a larger --config.early_stopping would continue it'
  ]
  assert asked == []


@pytest.mark.parametrize(
  ('schedule', 'noted'), [('step', False), ('constant', False), ('cosine', True), ('linear', True), ('one_cycle', True)]
)
def test_another_length_of_a_schedule_that_depends_on_it_is_said(schedule, noted, classifier, hours):
  hours(0.0)
  config = small_config(schedule=schedule, epochs=12)
  lines = summary.where_it_stands(config, classifier, 50, 60, 10, ended=False)
  note = (
    f'note: the {schedule} schedule is now spread over 12 epochs instead of 10: the learning rate jumps, and the run '
    'is that of neither recipe'
  )
  assert lines == ['continuing after step 50 of 60', *([note] if noted else [])]
  assert summary.where_it_stands(config, classifier, 50, 60, 12, ended=False) == lines[:1]
  assert summary.where_it_stands(config, classifier, 0, 60, 10, ended=False) == []


def test_the_estimate_is_made_of_the_fastest_of_five_products(monkeypatch):
  """2**30 multiply-adds in 0.1 s: 0.55 of that rate for three times the multiply-adds of the forward pass, once where
  stages are frozen."""
  durations = iter([0.5, 0.2, 0.1, 0.3, 0.4])
  times = itertools.chain.from_iterable((10 * n, 10 * n + next(durations)) for n in range(5))
  monkeypatch.setattr(summary.time, 'perf_counter', lambda: next(times))
  found = summary.estimate(1_000_000, 1_000_000, 900_000)
  assert found == pytest.approx((3 * 0.1 + 0.9) * 1e12 / (2**30 / 0.1 * 0.55) / 3600, rel=1e-6)


# Pictures ------------------------------------------------------------------------------------------------------------


def test_augmentations_are_named():
  assert summary.augmentations_in_words(small_config().augment) == []
  every = {
    'min_area': 0.08,
    'random_interpolation': True,
    'photometric': 0.5,
    'padding': 2,
    'shift': 3,
    'flip': True,
    'alternating_flip': True,
    'erasing': 0.25,
    'cutmix': 0.5,
    'mixup': 0.2,
  }
  assert summary.augmentations_in_words(small_config(**{f'augment.{k}': v for k, v in every.items()}).augment) == [
    'random crops of 8 to 100 % of the area',
    'random interpolation',
    'photometric distortions of strength 0.5',
    'padding of 2 px',
    'shifts up to 3 px',
    'mirroring',
    'mirroring in every second epoch',
    'erasing with probability 0.25',
    'a rectangle of the next image with probability 0.5 (CutMix)',
    'blended with the next image (mixup, Beta(0.2, 0.2))',
  ]


@pytest.fixture
def drawn(monkeypatch):
  """What is drawn, by the name of the function; nothing is."""
  calls = {}
  for module, names in ((galleries, ('augmentations', 'predictions', 'mistakes')), (plots, ('curves', 'confusion'))):
    for name in names:
      monkeypatch.setattr(module, name, lambda *arguments, name=name: calls.update({name: arguments}))
  return calls


def test_the_first_batch_is_drawn_without_its_canvas(drawn, tmp_path):
  config = small_config(**{'augment.flip': True, 'name': 'mine', 'batch_size': 8})
  sizes = np.stack([np.arange(1, 9), np.full(8, 6)], 1).astype(np.int32)
  split = split_of(8, sizes=sizes)
  summary.draw_samples(config, tmp_path, dataclasses.replace(dataset_of(), train=split), seed=3)
  stored, seen, names, path, title, words = drawn['augmentations']
  order = pipeline.train_indices(0, 8, 8, 3)
  assert [image.shape for image in stored] == [(height, 6, 1) for height in order + 1]
  np.testing.assert_array_equal(stored[3], split.images[order[3], : order[3] + 1, :6])
  assert (seen.shape, seen.dtype) == ((8, 17, 17, 1), np.float32)
  assert names == [CLASSES[label] for label in split.labels[order]]
  assert path == tmp_path / 'augmentations.png'
  assert title == 'recipe mine: the first training batch of animals'
  assert words == ['mirroring']


@pytest.mark.parametrize('mixed', ['cutmix', 'mixup'])
def test_the_picture_shows_mirrored_and_mixed_images(mixed, drawn, tmp_path):
  """The last image of the picture is mixed with one that is not drawn."""
  config = small_config(**{'augment.alternating_flip': True, f'augment.{mixed}': 0.9, 'batch_size': 20, 'seed': 3})
  dataset = datasets.load('digits')
  summary.draw_samples(config, tmp_path, dataset, seed=3)
  stored, seen, *_ = drawn['augmentations']
  assert len(stored) == len(seen) == summary.SAMPLES
  indices = pipeline.train_indices(0, len(dataset.train), 20, 3)
  batch = {**dataset.train.batch(indices), 'mirrored': augment.alternating_mirror(jnp.int32(3), indices, jnp.int32(0))}
  keys = random_keys.example_keys(3, jnp.int32(0), jnp.arange(20))
  expected, weight = jax.jit(lambda: mixing.training_input(batch, keys, config))()
  np.testing.assert_allclose(seen, expected[: summary.SAMPLES], atol=1e-5)
  assert (np.asarray(weight) < 1).any()


def records():
  for split, epoch, accuracy in (('train', 1, 0.5), ('test', 1, 0.6), ('test_raw', 1, 0.1), ('test', 2.5, 0.98765)):
    yield {'split': split, 'epoch': epoch, 'accuracy': accuracy}


@pytest.mark.parametrize(('name', 'shown'), [('mine', 'mine'), ('', 'folder')])
def test_titles_name_the_recipe_and_the_final_figures(name, shown, drawn, tmp_path):
  config, workdir, dataset = small_config(name=name), tmp_path / 'folder', dataset_of()
  evaluation = Evaluation(dataset.test.labels, np.zeros((20, 10), np.float32))
  summary.draw_curves(config, [*records()], workdir, dataset)
  assert drawn['curves'] == (
    [*records()],
    workdir / 'curves.png',
    f'recipe {shown} on animals: test accuracy 0.9877 after 2.5 epochs',
  )
  summary.draw_curves(config, [*records()][:1], workdir, dataset)
  assert drawn['curves'][-1] == f'recipe {shown} on animals'
  workdir.mkdir()
  summary.draw_answers(config, evaluation, workdir, dataset, 22)
  title = f'recipe {shown}, animals test images, step 22'
  assert drawn['predictions'] == (evaluation, dataset.test, CLASSES, workdir / 'predictions.png', title)
  assert drawn['mistakes'] == (evaluation, dataset.test, CLASSES, workdir / 'mistakes.png', title, 'test', None)
  assert {path.name for path in workdir.iterdir()} == {'per_class.csv', 'mistakes.csv'}
  assert drawn['confusion'] == (evaluation, CLASSES, workdir / 'confusion.png', title)


def test_a_picture_that_cannot_be_drawn_is_left_out(drawn, tmp_path, monkeypatch, capsys):
  def fail(*_):
    raise RuntimeError('libfreetype is missing')

  for module, name in ((galleries, 'augmentations'), (plots, 'curves'), (galleries, 'predictions')):
    monkeypatch.setattr(module, name, fail)
  config, dataset = small_config(), dataset_of()
  evaluation = Evaluation(dataset.test.labels, np.zeros((20, 10), np.float32))
  summary.draw_samples(config, tmp_path, dataset, 0)
  summary.draw_curves(config, [*records()], tmp_path, dataset)
  summary.draw_answers(config, evaluation, tmp_path, dataset, 22)
  assert set(drawn) == {'confusion', 'mistakes'}
  assert capsys.readouterr().err == ''.join(
    f'warning: {tmp_path}/{name}.png was not written: libfreetype is missing; the work goes on\n'
    for name in ('augmentations', 'curves', 'predictions')
  )


def test_only_the_first_process_draws(drawn, tmp_path, monkeypatch):
  monkeypatch.setattr(processes, '_index', 1)
  config, dataset = small_config(), dataset_of()
  summary.draw_samples(config, tmp_path, dataset, 0)
  summary.draw_curves(config, [*records()], tmp_path, dataset)
  summary.draw_answers(config, None, tmp_path, dataset, 1)
  assert drawn == {}


# The end -------------------------------------------------------------------------------------------------------------


def evaluation_of(right):
  """20 answers, `right` of them right, each with probability 0.5."""
  labels = np.zeros(20, np.int32)
  probabilities = np.full((20, 10), 0.5 / 9)
  probabilities[np.arange(20), (np.arange(20) >= right).astype(int)] = 0.5
  return Evaluation(labels, np.log(probabilities).astype(np.float32))


@pytest.fixture
def found(config, classifier, mesh):
  meta = {'train_seconds': 8.0, 'train_examples': 4000, 'compile_seconds': 3.5}
  train = Metrics({'loss': 4.0, 'total': 16.0}, 14, 16)
  evaluations = {'test': evaluation_of(15), 'validation': evaluation_of(3)}
  return lambda **more: summary.summary(config, meta, train, evaluations | more, 50, 20, classifier, mesh)


def test_the_summary(found):
  values = found()
  loss = -(15 * np.log(0.5) + 5 * np.log(0.5 / 9)) / 20
  assert values == {
    'test_accuracy': 0.75,
    'test_loss': pytest.approx(loss, rel=1e-6),
    'train_accuracy': 0.875,
    'train_loss': 0.25,
    'epochs': 2.5,
    'steps': 50,
    'parameters': 5977530,
    'train_examples_per_second': 500.0,
    'train_seconds': 8.0,
    'compile_seconds': 3.5,
    'device': 'cpu',
    'device_count': 2,
    'jax_version': jax.__version__,
    'seed': 0,
  }
  assert json.loads(json.dumps(values)) == values


def test_the_summary_of_averaged_weights_has_the_raw_ones_too(found):
  assert found(test_raw=evaluation_of(10)) == {**found(), 'test_accuracy_raw': 0.5}


def test_the_last_lines_are_those_of_d2l(found, mesh, tmp_path):
  *where, loss, speed = summary.last_lines(found(), tmp_path, mesh).split('\n')
  assert loss == 'loss 0.250, train acc 0.875, test acc 0.750'
  assert speed == '500.0 examples/sec on 2 x cpu'
  assert where == [
    f'In {tmp_path}: predictions.png, mistakes.png, mistakes.csv, per_class.csv, confusion.png, curves.png, '
    'augmentations.png, summary.json',
    f'More curves: pip install tensorboard, then tensorboard --logdir {tmp_path}/tensorboard',
  ]
  for name in ('roc.png', 'split.csv'):
    (tmp_path / name).touch()
  assert 'augmentations.png, roc.png, split.csv, summary.json\n' in summary.last_lines(found(), tmp_path, mesh)
