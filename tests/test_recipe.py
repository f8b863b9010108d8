import runpy

import pytest
from helpers import ROOT, small_config

from googlenet_jax import recipe
from googlenet_jax.host.errors import UserError
from googlenet_jax.recipe import FREE, KEYS, NETWORK, TRAINING
from googlenet_jax.recipe_checks import validate

RECIPES = sorted((ROOT / 'configs').glob('[a-z]*.py'))


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
