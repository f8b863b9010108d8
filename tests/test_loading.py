import jax
import numpy as np
import pytest
from helpers import random_state, small_config, small_table, write_run

import googlenet_jax
from googlenet_jax import runs
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet, torch_weights, weight_files
from googlenet_jax.model.torch_weights import TORCHVISION


@pytest.fixture(autouse=True, scope='module')
def small_network():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(googlenet, 'TABLE', small_table())
    yield


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def states():
  config = small_config(average_decay=0.9)
  return [random_state(config, seed) for seed in range(4)]


@pytest.fixture(scope='module')
def several(states, tmp_path_factory):
  """A run with averaged weights and four checkpoints, of which the first is gone and the second is the best."""
  saves = [(step, states[step - 1], accuracy, True) for step, accuracy in enumerate([0.1, 0.9, 0.3, 0.2], start=1)]
  return write_run(tmp_path_factory.mktemp('several'), small_config(average_decay=0.9), *saves)


def kernels(tree):
  return np.asarray(tree['logits']['kernel'])


@pytest.mark.parametrize(('step', 'number'), [(None, 4), ('best', 2), (3, 3), (2, 2)])
def test_the_step_asked_for_is_read_with_its_averaged_weights(step, number, several, states):
  found = googlenet_jax.load(several, step)
  assert found.steps == [number]
  ((params, batch_stats),) = found.networks
  np.testing.assert_array_equal(kernels(params), kernels(states[number - 1].averaged['params']))
  assert (kernels(params) != kernels(states[number - 1].params)).all()
  assert batch_stats == {}


def test_a_step_that_is_not_there_is_answered_with_those_that_are(several, states, tmp_path):
  with pytest.raises(UserError, match=r'there is no checkpoint of step 1 in .*: there are \[4, 3, 2\]$'):
    googlenet_jax.load(several, 1)
  write_run(tmp_path, small_config(average_decay=0.9), (7, states[0], None, True))
  with pytest.raises(UserError, match='no checkpoint in .* has a validation accuracy'):
    googlenet_jax.load(tmp_path, 'best')


def test_a_checkpoint_without_fitting_statistics_is_read_only_if_there_is_no_other(states, tmp_path, capsys):
  config = small_config(average_decay=0.9)
  write_run(tmp_path / 'a', config, (1, states[0], None, False))
  assert googlenet_jax.load(tmp_path / 'a').steps == [1]
  assert capsys.readouterr().out == (
    f'note: step 1 in {tmp_path}/a was saved before the batch statistics of its weights were computed: its predictions '
    'are poor until the first evaluation of the run\n'
  )
  write_run(tmp_path / 'b', config, (1, states[0], None, True), (2, states[1], None, False))
  assert googlenet_jax.load(tmp_path / 'b').steps == [1]
  assert capsys.readouterr().out == ''


def test_a_folder_without_a_run_or_without_a_checkpoint_is_refused(tmp_path):
  with pytest.raises(UserError, match=r'holds no run \(it is empty\): train first'):
    googlenet_jax.load(tmp_path)
  write_run(tmp_path, small_config())
  with pytest.raises(UserError, match='holds no checkpoint yet: train first'):
    googlenet_jax.load(tmp_path)


# Files of weights -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """A file of weights under our names, and the state that is in it."""
  state = random_state(small_config(**{'model.norm': 'batch'}))
  path = tmp_path_factory.mktemp('weights') / 'mine.safetensors'
  weight_files.write(path, torch_weights.to_torch(state.params, state.batch_stats))
  return path, state


def test_a_file_of_weights_under_our_names(weights):
  path, state = weights
  net = googlenet_jax.load(path)
  assert net.classes == tuple('0123456789')
  assert (net.channels, net.recipe.name, net.recipe.model.norm) == (1, 'mine', 'batch')
  assert net.recipe.image_size == 224
  assert net.recipe.augment.resize == 256 / 224
  assert '256 pixels' in runs.preparation(net.recipe, 1)
  jax.tree.map(np.testing.assert_array_equal, net.networks[0], (state.params, state.batch_stats))
  assert googlenet_jax.load(str(path), classes=list('abcdefghij')).classes == tuple('abcdefghij')


def test_torchvisions_names_bring_its_preparation(tmp_path):
  make = lambda rngs: googlenet.GoogLeNet(5, 3, TORCHVISION, image_size=224, rngs=rngs)
  _, *shapes = googlenet.split(googlenet.with_shapes(make))
  rng = np.random.default_rng(0)
  params, batch_stats = jax.tree.map(lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(np.float32), shapes)
  weight_files.write(tmp_path / 'tv.safetensors', torch_weights.to_torch(params, batch_stats, naming='torchvision'))
  net = googlenet_jax.load(tmp_path / 'tv.safetensors')
  options = net.recipe.model
  assert (options.pool, options.ch5x5_kernel, options.auxiliary) == ('torchvision', 3, 'adaptive_pool')
  assert (options.input_mean, options.input_std) == ('0.5', '0.5')  # the range [-1, 1] of its published weights
  assert (len(net.classes), net.channels) == (5, 3)
  jax.tree.map(np.testing.assert_array_equal, net.networks[0], (params, batch_stats))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'classes': ['a']}, 'mine.safetensors has 10 classes, and 1 names are given'),
    ({'step': 3}, 'mine.safetensors is a file of weights and has no steps'),
  ],
)
def test_what_does_not_fit_a_file_of_weights(options, message, weights):
  with pytest.raises(UserError, match=message):
    googlenet_jax.load(weights[0], **options)


def test_other_files_are_refused(tmp_path):
  with pytest.raises(UserError, match='nowhere.pth cannot be read: No such file'):
    googlenet_jax.load(tmp_path / 'nowhere.pth')
  weight_files.write(tmp_path / 'other.safetensors', {'layer.weight': np.zeros((3, 4), np.float32)})
  with pytest.raises(UserError, match='other.safetensors holds no weights of a GoogLeNet'):
    googlenet_jax.load(tmp_path / 'other.safetensors')
  with pytest.raises(UserError, match='knows its classes: classes= is for a file of weights'):
    googlenet_jax.load(tmp_path, classes=['a'])
