"""Which values a recipe may have, alone and together."""

import math

import ml_collections
import pytest
from helpers import changed, small_config

from googlenet_jax import recipe
from googlenet_jax.host.errors import UserError
from googlenet_jax.recipe import KEYS
from googlenet_jax.recipe_checks import validate

NUMBERS = [name for name, key in KEYS.items() if type(key.default) in (int, float) and not key.choices]


def test_numbers_and_nothing_else_have_a_range():
  bounded = [n for n, k in KEYS.items() if (k.least, k.above, k.most, k.below) != (None,) * 4]
  assert sorted(bounded) == sorted(NUMBERS)


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('epochs', 0, 'config.epochs=0 is out of range: it must be at least 1'),
    ('max_steps', -1, 'config.max_steps'),
    ('batch_size', 0, 'config.batch_size'),
    ('learning_rate', -0.1, 'config.learning_rate'),
    ('learning_rate', float('nan'), 'config.learning_rate'),
    ('learning_rate', float('inf'), 'config.learning_rate'),
    ('momentum', 1.0, 'config.momentum=1.0 is out of range: it must be at least 0 and below 1'),
    ('seed', -1, 'config.seed'),
    ('dtype', 'float16', "config.dtype='float16' is unknown: choose from float32, bfloat16"),
    ('schedule', 'triangle', 'config.schedule'),
    ('warmup_epochs', -0.5, 'config.warmup_epochs=-0.5 is out of range: it must be at least 0'),
    ('image_size', 16, 'too small for the network: with model.stem=article it needs at least 17'),
    ('augment.padding', 10, 'leaves no image'),
    ('augment.shift', 17, 'out of sight'),
    ('model.dropout', 1.0, 'below 1'),
    ('model.norm', 'lrn2', 'config.model.norm'),
    ('model.auxiliary', 'average_pool', 'needs maps of 5 pixels in stage 4, image_size=17 gives 2: auxiliary='),
    ('average_decay', 1.0, 'config.average_decay=1.0 is out of range: it must be at least 0 and below 1'),
    ('augment.min_area', 0.0, 'config.augment.min_area=0.0 is out of range: it must be above 0 and at most 1'),
    ('augment.max_aspect', 0.9, 'config.augment.max_aspect=0.9 is out of range: it must be at least 1'),
    ('augment.resize', 0.9, 'config.augment.resize'),
    ('augment.resize', 256, 'config.augment.resize=256.0 is out of range: it must be at least 1 and at most 2'),
    ('augment.random_interpolation', True, 'set config.augment.min_area below 1'),
    ('augment.photometric', 1.5, 'config.augment.photometric'),
    ('augment.erasing', -0.1, 'config.augment.erasing'),
    ('augment.cutmix', 1.1, 'config.augment.cutmix'),
    ('augment.mixup', -0.1, 'config.augment.mixup'),
    ('ensemble.members', 0, 'config.ensemble.members'),
    ('ensemble.initial_weights', 'equal', 'choose from same, different'),
    ('data.canvas', 0, 'config.data.canvas'),
    ('data.validation_examples', -5, 'config.data.validation_examples'),
  ],
)
def test_values_out_of_range_are_named(key, value, message):
  with pytest.raises(UserError, match=message):
    validate(small_config(**{key: value}))


def refused(name, value):
  """Whether a value is out of the range of its key."""
  try:
    validate(changed(**{name: value}))
  except UserError as error:
    return str(error).startswith(f'config.{name}={value!r} is out of range: it must be ')
  return False


@pytest.mark.parametrize('name', NUMBERS)
def test_bounds_are_enforced_to_the_last_digit(name):
  key = KEYS[name]

  def beside(bound, way):
    return bound + way if isinstance(key.default, int) else math.nextafter(bound, way * math.inf)

  for inside, outside in (
    (key.least, key.least is not None and beside(key.least, -1)),
    (key.most, key.most is not None and beside(key.most, 1)),
    (key.above is not None and beside(key.above, 1), key.above),
    (key.below is not None and beside(key.below, -1), key.below),
  ):
    if None not in (inside, outside):
      assert refused(name, outside)
      assert not refused(name, inside)


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('name', NUMBERS)
def test_numbers_are_finite(name, value):
  with pytest.raises(UserError, match=rf'^config.{name}={value!r} must be (finite|a whole number)$'):
    validate(changed(**{name: value}))


@pytest.mark.parametrize('name', [name for name, key in KEYS.items() if key.choices])
def test_choices_are_enforced(name):
  other = 'other' if isinstance(KEYS[name].default, str) else 99
  with pytest.raises(UserError) as error:
    validate(changed(**{name: other}))
  choices = ', '.join(str(choice) for choice in KEYS[name].choices if choice != '')
  assert str(error.value) == f'config.{name}={other!r} is unknown: choose from {choices}'


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('epochs', 2.5, 'must be a whole number'),
    ('epochs', True, 'must be a whole number'),
    ('epochs', '3', 'must be a whole number'),
    ('learning_rate', '0.1', 'must be a number'),
    ('learning_rate', None, 'must be a number'),
    ('learning_rate', True, 'must be a number'),
    ('nesterov', 1, 'must be True or False'),
    ('data.name', 5, 'must be text'),
  ],
)
def test_values_of_another_type_are_refused(name, value, message):
  with pytest.raises(UserError) as error:
    validate(changed(**{name: value}))
  assert str(error.value) == f'config.{name}={value!r} {message}'


def test_a_whole_number_may_stand_for_a_number():
  validate(changed(learning_rate=1))


def test_missing_and_unknown_keys_are_named():
  config = recipe.default()
  with config.unlocked():
    config.bach_size = 5
  with pytest.raises(UserError, match=r'^the recipe has an unknown key config.bach_size. Did you mean .*batch_size\?$'):
    validate(config)
  config = recipe.default()
  with config.unlocked():
    del config.model.norm
  with pytest.raises(UserError, match=r'^the recipe lacks key config.model.norm: start from default.get_config\(\)'):
    validate(config)
  with pytest.raises(UserError, match='^the recipe lacks key config.name'):
    validate(ml_collections.ConfigDict())


def test_a_member_is_trained_alone_or_with_the_others():
  validate(small_config(**{'ensemble.member': 3}))
  with pytest.raises(UserError, match=r'--config.ensemble.members=1 --config.ensemble.member=3 --workdir=.../member_3'):
    validate(small_config(**{'ensemble.member': 3, 'ensemble.members': 7}))


def test_nesterov_needs_momentum():
  validate(small_config(nesterov=True))
  with pytest.raises(UserError, match='config.nesterov needs a config.momentum above 0'):
    validate(small_config(nesterov=True, momentum=0.0))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'schedule': 'one_cycle', 'warmup_epochs': 1.0},
      'config.schedule=one_cycle warms up by itself: set config.warmup_epochs to 0, or choose another schedule',
    ),
    ({'warmup_epochs': 10.0}, 'config.warmup_epochs=10 must be smaller than config.epochs=10'),
    (
      {'augment.flip': True, 'augment.alternating_flip': True},
      'config.augment.flip and config.augment.alternating_flip exclude each other: set one of them to False',
    ),
    (
      {'augment.cutmix': 0.5, 'augment.mixup': 0.2},
      'config.augment.cutmix and config.augment.mixup exclude each other: set one of them to 0',
    ),
    (
      {'augment.mixup': 0.2, 'batch_size': 4, 'micro_batches': 4},
      'config.augment.cutmix and config.augment.mixup need two images to mix: config.batch_size=4 in '
      'config.micro_batches=4 parts has one',
    ),
  ],
)
def test_keys_that_exclude_each_other_are_one_line(changes, message):
  with pytest.raises(UserError) as error:
    validate(small_config(**changes))
  assert str(error.value) == message
  for name in changes:  # each key alone is allowed
    if name not in ('warmup_epochs', 'micro_batches'):
      validate(small_config(**{name: changes[name]}))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'freeze': 'conv2'}, '^config.freeze=conv2 is for weights that know something already: give config.init_from'),
    ({'body_learning_rate': 0.1}, '^config.body_learning_rate=0.1 is for weights that know something already'),
    (
      {'freeze': 'inception_4a', 'init_from': 'x', 'model.auxiliary': 'adaptive_pool'},
      '^config.freeze=inception_4a freezes what the auxiliary classifier after inception_4a would teach: set config.mo',
    ),
  ],
)
def test_what_is_frozen_must_make_sense(changes, message):
  with pytest.raises(UserError, match=message):
    validate(small_config(**changes))
  validate(small_config(**{'freeze': 'inception_3b', 'init_from': 'x', 'model.auxiliary': 'adaptive_pool'}))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'name': 'digits', 'validation_share': 0.2},
      'config.data.validation_share=0.2 is for config.data.name=folder: leave it out',
    ),
    ({'name': 'digits', 'channels': 1}, 'config.data.channels=1 is for config.data.name=folder: leave it out'),
    ({'channels': 2}, 'config.data.channels=2: give 1 for grey, 3 for colour, or 0 to follow the pictures'),
    ({'data_dir': 'x'}, 'config.data.data_dir=x is for sets of TFDS: leave it out'),
    (
      {'validation_examples': 9},
      'config.data.validation_examples=9 is for other sets: a folder has config.data.validation_share',
    ),
    (
      {'validation_share': 0.5, 'test_share': 0.5},
      'config.data.validation_share=0.5 and config.data.test_share=0.5 leave nothing to train on: make them smaller',
    ),
  ],
)
def test_a_folder_has_keys_of_its_own(changes, message):
  validate(small_config(**{'data.name': 'folder', 'data.validation_share': 0.5, 'data.channels': 1}))
  with pytest.raises(UserError) as error:
    validate(small_config(**{'data.name': 'folder', **{f'data.{key}': value for key, value in changes.items()}}))
  assert str(error.value) == message
