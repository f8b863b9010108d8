import math
import pathlib
import runpy

import ml_collections
import pytest
from helpers import small_config

from googlenet_jax import recipe
from googlenet_jax.host.errors import UserError
from googlenet_jax.recipe import FREE, KEYS, NETWORK, TRAINING
from googlenet_jax.recipe_checks import validate

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = sorted((ROOT / 'configs').glob('[a-z]*.py'))
NUMBERS = [name for name, key in KEYS.items() if type(key.default) in (int, float) and not key.choices]


def changed(**changes):
  """The values of the default recipe with others, whatever their types."""
  return recipe.from_flat({**recipe.flatten(recipe.default()), **changes})


# Keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', KEYS)
def test_every_key_has_a_meaning_a_type_and_a_scope(name):
  key = KEYS[name]
  assert key.meaning
  assert key.meaning == key.meaning.strip().removesuffix('.')
  assert type(key.default) in (bool, int, float, str)
  assert key.scope in (NETWORK, TRAINING, FREE)
  if key.choices:
    assert key.default in key.choices
    assert all(type(choice) is type(key.default) for choice in key.choices)


def test_numbers_and_nothing_else_have_a_range():
  bounded = [n for n, k in KEYS.items() if (k.least, k.above, k.most, k.below) != (None,) * 4]
  assert sorted(bounded) == sorted(NUMBERS)


def test_who_may_change_a_key():
  """Listed here a second time, because a wrong scope spoils a run without a word."""
  by_scope = {scope: {name for name, key in KEYS.items() if key.scope == scope} for scope in (NETWORK, FREE)}
  model = {f'model.{name}' for name in ('inception', 'head', 'stem', 'norm', 'auxiliary', 'pool', 'ch5x5_kernel')}
  model |= {f'model.{name}' for name in ('input_mean', 'input_std')}
  data = {f'data.{name}' for name in ('name', 'validation_examples', 'canvas', 'channels')}
  data |= {f'data.{name}' for name in ('validation_share', 'test_share', 'split_seed')}
  assert by_scope[NETWORK] == model | data | {
    'image_size',
    'dtype',
    'average_decay',
    'augment.padding',
    'augment.resize',
  }
  assert by_scope[FREE] == {
    'name',
    'epochs',
    'max_steps',
    'steps_per_call',
    'early_stopping',
    'skip_nonfinite',
    'data.source_dir',
    'data.data_dir',
    'data.max_unreadable',
    'data.memory_mb',
    'ensemble.members',
    'ensemble.side_by_side',
    'evaluate_every_epochs',
    'log_every_steps',
    'checkpoint_every_steps',
  }


def test_the_default_recipe_has_every_key_with_its_type():
  values = recipe.flatten(recipe.default())
  assert values == {name: key.default for name, key in KEYS.items()}
  assert {name: type(value) for name, value in values.items()} == {n: type(k.default) for n, k in KEYS.items()}
  assert recipe.flatten(recipe.to_json(recipe.default())) == values
  validate(recipe.default())


def test_the_docs_list_every_key(tmp_path):
  page, copy = ROOT / 'docs' / 'recipes.md', tmp_path / 'recipes.md'
  copy.write_text(page.read_text())
  recipe.write_table(copy)
  assert copy.read_text() == page.read_text(), 'run `make docs`'
  rows = copy.read_text().split('<!-- keys -->')[1].splitlines()
  assert '| `learning_rate` | 0.01 | base learning rate | evaluation only |' in rows
  assert '| `model.norm` | none | ' in '\n'.join(rows)
  assert '| `data.data_dir` | (empty) | folder of prepared TFDS sets; empty: ~/tensorflow_datasets | yes |' in rows
  assert sum(row.startswith('| `') for row in rows) == len(KEYS)


def test_differences_are_named_by_scope():
  before, now = (recipe.flatten(config) for config in (small_config(), small_config(learning_rate=0.5, epochs=3)))
  assert recipe.differences(before, now, (NETWORK,)) == ''
  assert recipe.differences(before, now, (TRAINING,)) == 'learning_rate: 0.01 there, 0.5 now'
  found = recipe.differences(before, now, (TRAINING, FREE), ('before', 'after'))
  assert found == 'epochs: 10 before, 3 after; learning_rate: 0.01 before, 0.5 after'
  other = {**before, 'of_another_version': 1}
  assert recipe.differences(other, before, (NETWORK,)) == 'of_another_version: 1 there, None now'
  here, there = {'data.name': 'FashionMNIST'}, {'data.name': 'fashion_mnist'}  # two spellings that TFDS takes
  assert recipe.differences(there, here, (NETWORK,)) == ''


# Shipped recipes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid(path):
  config = runpy.run_path(str(path))['get_config']()
  if path.stem == 'finetune':
    config.init_from = 'runs/other'  # the user says where weights come from
  validate(config)
  assert recipe.read(str(path)).name == path.stem


def test_the_recipe_of_d2l():
  config = recipe.read(str(ROOT / 'configs/fashion.py'))
  assert (config.image_size, config.batch_size, config.epochs) == (224, 256, 10)
  assert (config.learning_rate, config.momentum, config.schedule) == (0.01, 0.9, 'step')
  assert (config.decay_factor, config.decay_epochs) == (0.96, 8)
  assert (config.data.name, config.data.validation_examples, config.model.norm) == ('fashion_mnist', 0, 'none')


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'hint'),
  [
    ('digits', 'Did you mean configs/digits.py? '),
    ('configs/digit.py', 'Did you mean configs/digits.py? '),
    ('fashion-fast', 'Did you mean configs/fashion_fast.py? '),
    ('configs/nope.py', ''),
    ('~/nope.py', ''),
  ],
)
def test_a_recipe_that_is_not_there_lists_those_that_are(name, hint, monkeypatch):
  monkeypatch.chdir(ROOT)
  shipped = ', '.join(path.name for path in RECIPES if path.stem != 'default')
  with pytest.raises(UserError) as error:
    recipe.read(name)
  assert str(error.value) == f'--config={name}: there is no such file. {hint}Recipes in configs: {shipped}'


def test_a_recipe_that_is_not_there_in_another_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(
    UserError, match=rf'^--config=digits: .* Did you mean {ROOT}/configs/digits.py\? Recipes in {ROOT}/'
  ):
    recipe.read('digits')
  (tmp_path / 'digits.py').touch()
  with pytest.raises(
    UserError, match=r'^--config=digits: there is no such file. Did you mean digits.py\? Recipes in /'
  ):
    recipe.read('digits')
  (tmp_path / 'digits').mkdir()
  (tmp_path / 'configs').mkdir()
  with pytest.raises(
    UserError, match=r'^--config=digits: it is a folder. Did you mean digits.py\? Recipes in configs: none$'
  ):
    recipe.read('digits')


HEAD = 'from configs import default\n\ndef get_config():\n  config = default.get_config()\n'


@pytest.mark.parametrize(
  ('text', 'message', 'line'),
  [
    ('x = 1\n', 'the file has no function get_config', None),
    (HEAD, 'get_config returns NoneType, not the recipe: end with return config', None),
    (HEAD + '  return {}\n', 'get_config returns dict, not the recipe', None),
    (HEAD + '  return 1 / 0\n', 'ZeroDivisionError: division by zero', 5),
    (HEAD + '  return {}["seed"]\n', 'KeyError: seed', 5),
    (HEAD + '  config.epochs = 2.5\n  return config\n', "TypeError: .*'epochs'", 5),
    (HEAD + '  config.epochs = = 2\n  return config\n', 'SyntaxError: invalid syntax', 5),
    (HEAD + '    config.epochs = 2\n', 'IndentationError: unexpected indent', 5),
    ('import nothing_of_this_name\n' + HEAD, "No module named 'nothing_of_this_name'", 1),
    ('open("/missing")\n' + HEAD, "FileNotFoundError: .* No such file or directory: '/missing'", 1),
  ],
)
def test_a_mistake_in_a_recipe_is_one_line_with_its_place(text, message, line, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(text)
  with pytest.raises(UserError, match=message) as error:
    recipe.read(str(path))
  told = str(error.value)
  assert told.startswith(f'--config={path}')
  assert '\n' not in told
  if line:
    assert told.endswith(f'({path}, line {line})')


def test_the_name_of_a_recipe_is_that_of_its_file_unless_it_has_one(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(HEAD + '  return config\n')
  assert recipe.read(str(path)).name == 'mine'
  path.write_text(HEAD + '  config.name = "given"\n  return config\n')
  assert recipe.read(str(path)).name == 'given'


def test_text_behind_a_colon_is_the_argument_of_get_config(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(HEAD.replace('()', '(text)', 1) + '  config.data.name = text\n  return config\n')
  assert recipe.read(f'{path}:cifar10:x').data.name == 'cifar10:x'


# --config.KEY=TEXT ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'text', 'value'),
  [
    ('epochs', '3', 3),
    ('seed', ' 12 ', 12),
    ('learning_rate', '0.5', 0.5),
    ('learning_rate', '1e-3', 1e-3),
    ('learning_rate', '1', 1.0),
    ('nesterov', 'True', True),
    ('augment.flip', 'false', False),
    ('augment.flip', 'TRUE', True),
    ('data.name', 'cifar10', 'cifar10'),
    ('data.data_dir', '', ''),
    ('data.source_dir', '5', '5'),
  ],
)
def test_a_key_is_set_from_text(name, text, value):
  config = recipe.default()
  recipe.override(config, name, text)
  found = recipe.flatten(config)
  assert found.pop(name) == value
  assert type(value) is type(KEYS[name].default)
  assert found == {other: key.default for other, key in KEYS.items() if other != name}


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('batch_size', 'abc', 'it must be a whole number'),
    ('batch_size', '2.5', 'it must be a whole number'),
    ('epochs', '', 'it must be a whole number'),
    ('learning_rate', 'fast', 'it must be a number'),
    ('nesterov', 'yes', 'it must be True or False'),
    ('augment.flip', '1', 'it must be True or False'),
  ],
)
def test_text_of_another_type_is_refused(name, text, message):
  with pytest.raises(UserError) as error:
    recipe.override(recipe.default(), name, text)
  assert str(error.value) == f'--config.{name}={text}: {message}'


@pytest.mark.parametrize(
  ('name', 'meant'),
  [
    ('learning_rat', '--config.learning_rate'),
    ('lr', '--config.learning_rate'),
    ('epoch', '--config.epochs'),
    ('norm', '--config.model.norm'),
    ('model.nrom', '--config.model.norm'),
    ('flip', '--config.augment.flip'),
    ('batch-size', '--config.batch_size'),
    ('LEARNING_RATE', '--config.learning_rate'),
    ('model.batch_size', '--config.batch_size'),
  ],
)
def test_an_unknown_key_is_answered_with_the_one_that_was_meant(name, meant):
  with pytest.raises(UserError) as error:
    recipe.override(recipe.default(), name, '1')
  assert str(error.value) == f'--config.{name} is no key of a recipe. Did you mean {meant}?'


def test_a_key_like_no_other_is_answered_with_the_page_of_all():
  assert recipe.suggest('wallpaper') == 'docs/recipes.md lists all keys'
  assert recipe.suggest('name') == 'Did you mean --config.name or --config.data.name?'


# Checks --------------------------------------------------------------------------------------------------------------


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


def test_recipes_for_speed_and_accuracy_evaluate_what_they_train():
  """A warm-up shorter than the run, a rate that ends at zero, and one kind of mirroring."""
  best, speed = (recipe.read(str(ROOT / f'configs/fashion_{name}.py')) for name in ('best', 'speed'))
  for config in (best, speed):
    assert 0 < config.warmup_epochs < config.epochs / 5
    assert config.schedule in ('cosine', 'linear')
    assert config.augment.flip != config.augment.alternating_flip
    assert config.augment.min_area == 1
    assert config.data.validation_examples >= 4000
    assert config.image_size - 2 * config.augment.padding == 28


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
