import pathlib
import runpy

import pytest
from helpers import small_config

from googlenet_jax import recipe
from googlenet_jax.host import checkpoints
from googlenet_jax.host.errors import UserError

RECIPES = sorted((pathlib.Path(__file__).parent.parent / 'configs').glob('[a-z]*.py'))


@pytest.mark.parametrize('path', RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid(path):
  recipe.validate(runpy.run_path(str(path))['get_config']())


def test_the_articles_recipe():
  recipe = runpy.run_path(str(RECIPES[0].parent / 'fashion.py'))['get_config']()
  assert (recipe.image_size, recipe.batch_size, recipe.epochs) == (224, 256, 10)
  assert (recipe.learning_rate, recipe.momentum, recipe.schedule) == (0.01, 0.9, 'step')
  assert (recipe.decay_factor, recipe.decay_epochs) == (0.96, 8)
  assert (recipe.data.name, recipe.data.validation_examples, recipe.model.norm) == ('fashion_mnist', 0, 'none')


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('epochs', 0, 'config.epochs=0 is out of range: it must be at least 1'),
    ('max_steps', -1, 'config.max_steps'),
    ('batch_size', 0, 'config.batch_size'),
    ('learning_rate', -0.1, 'config.learning_rate'),
    ('learning_rate', float('nan'), 'config.learning_rate'),
    ('learning_rate', float('inf'), 'config.learning_rate'),
    ('momentum', 1.0, 'config.momentum=1.0 is out of range: it must be below 1'),
    ('seed', -1, 'config.seed'),
    ('dtype', 'float16', "config.dtype='float16' is unknown: choose from float32, bfloat16"),
    ('schedule', 'linear', 'config.schedule'),
    ('image_size', 16, 'too small for the network: with model.stem=article it needs at least 17'),
    ('augment.padding', 10, 'leaves no image'),
    ('augment.shift', 17, 'out of sight'),
    ('model.dropout', 1.0, 'below 1'),
    ('model.norm', 'lrn2', 'config.model.norm'),
    ('model.auxiliary', 'average_pool', 'leaves maps of 2 pixels to the auxiliary classifiers, whose pool is of 5'),
    ('average_decay', 1.0, 'config.average_decay=1.0 is out of range: it must be below 1'),
    ('augment.min_area', 0.0, 'config.augment.min_area=0 is out of range: it must be above 0'),
    ('augment.max_aspect', 0.9, 'config.augment.max_aspect=0.9 is out of range: it must be at least 1'),
    ('augment.resize', 0.9, 'config.augment.resize'),
    ('augment.resize', 256, 'config.augment.resize=256.0 is out of range: it must be from 1 to 2'),
    ('augment.random_interpolation', True, 'config.augment.min_area must be below 1'),
    ('augment.photometric', 1.5, 'config.augment.photometric'),
    ('augment.erasing', -0.1, 'config.augment.erasing'),
    ('ensemble.members', 0, 'config.ensemble.members'),
    ('ensemble.initial_weights', 'equal', 'choose from same, different'),
    ('data.canvas', 0, 'config.data.canvas'),
    ('data.validation_examples', -5, 'config.data.validation_examples'),
  ],
)
def test_values_out_of_range_are_named(key, value, message):
  with pytest.raises(UserError, match=message):
    recipe.validate(small_config(**{key: value}))


def test_every_number_has_a_range():
  values = recipe.flatten(small_config().to_dict())
  numbers = {k for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
  assert numbers == set(recipe.RANGES)


def test_a_workdir_of_another_recipe_is_refused_with_the_keys(tmp_path):
  checkpoints.write_json(tmp_path / 'config.json', small_config().to_dict())
  recipe.check_same(small_config(learning_rate=0.5), tmp_path)  # no checkpoint yet: nothing to lose
  (tmp_path / 'checkpoints' / '5.orbax-checkpoint-tmp').mkdir(parents=True)
  recipe.check_same(small_config(learning_rate=0.5), tmp_path)  # the first save was killed
  (tmp_path / 'checkpoints' / '5').mkdir()
  recipe.check_same(small_config(epochs=99, max_steps=3, log_every_steps=1), tmp_path)
  with pytest.raises(UserError, match='learning_rate: 0.01 there, 0.5 now; model.norm: .none. there, .batch. now'):
    recipe.check_same(small_config(**{'learning_rate': 0.5, 'model.norm': 'batch'}), tmp_path)
  recipe.check_same(small_config(learning_rate=0.5), tmp_path, recipe.FOR_EVALUATION)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, 'config.json is missing, so that the recipe of the checkpoints is not known'),
    (b'\xff\xfe\x00', r"config.json is damaged \('utf-8' codec can't decode"),
    (b'{"seed": 0', 'config.json is damaged'),
    (b'5', 'config.json is damaged'),
  ],
)
def test_a_recipe_that_cannot_be_read_is_refused(content, message, tmp_path):
  (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
  if content is not None:
    (tmp_path / 'config.json').write_bytes(content)
  with pytest.raises(UserError, match=message):
    recipe.check_same(small_config(seed=1), tmp_path)


def test_a_member_is_trained_alone_or_with_the_others():
  recipe.validate(small_config(**{'ensemble.member': 3}))
  with pytest.raises(UserError, match=r'--config.ensemble.members=1 --config.ensemble.member=3 --workdir=.../member_3'):
    recipe.validate(small_config(**{'ensemble.member': 3, 'ensemble.members': 7}))


@pytest.mark.parametrize(
  ('key', 'value'),
  [('augment.resize', 1.1), ('average_decay', 0.9), ('model.auxiliary', 'adaptive_pool'), ('data.canvas', 64)],
)
def test_evaluation_refuses_what_changes_the_network_or_its_inputs(key, value, tmp_path):
  (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
  checkpoints.write_json(tmp_path / 'config.json', small_config().to_dict())
  with pytest.raises(UserError, match=f'{key}: .* there, .* now'):
    recipe.check_same(small_config(**{key: value}), tmp_path, recipe.FOR_EVALUATION)


def test_members_of_one_ensemble_were_trained_alike(tmp_path):
  folders = [tmp_path / str(member) for member in range(3)]
  for member, folder in enumerate(folders):
    folder.mkdir()
    recipe = small_config(**{'ensemble.member': member, 'log_every_steps': member + 1})
    checkpoints.write_json(folder / 'config.json', recipe.to_dict())
  recipe.check_alike(folders)
  recipe.check_length(small_config(), folders[0])
  with pytest.raises(UserError, match='has ended as a run of another length .epochs: 10 there, 9 now'):
    recipe.check_length(small_config(epochs=9), folders[0])
  for changes, what in (
    ({'max_steps': 5}, 'max_steps: 0 there, 5 here'),
    ({'batch_size': 8}, 'batch_size: 16 there, 8'),
  ):
    checkpoints.write_json(folders[2] / 'config.json', small_config(**changes).to_dict())
    with pytest.raises(UserError, match=f'0 and .*2 were trained by different recipes .{what}'):
      recipe.check_alike(folders)
