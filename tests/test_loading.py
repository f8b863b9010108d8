import jax
import numpy as np
import pytest
from flax import nnx
from helpers import random_state, small_config, small_table

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
  make = lambda: googlenet.GoogLeNet(5, 3, TORCHVISION, image_size=224, rngs=nnx.Rngs(0))
  _, *shapes = googlenet.split(nnx.eval_shape(make))
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
