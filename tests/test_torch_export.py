import json
import sys

import jax
import numpy as np
import pytest
import torch
from helpers import small_config

from googlenet_jax.classifier import Classifier
from googlenet_jax.data import augment
from googlenet_jax.exporting import torch_files, torch_network
from googlenet_jax.model import googlenet, layers, torch_weights

# Each of these has other values than the default, and both together have all values.
VARIANTS = {
  'naive': {
    'inception': 'naive',
    'head': 'fully_connected',
    'stem': 'small',
    'norm': 'lrn',
    'auxiliary': 'average_pool',
    'input_mean': '0.4,0.5,0.6',
    'input_std': '0.3',
  },
  'torchvision': {
    'norm': 'batch',
    'pool': 'torchvision',
    'ch5x5_kernel': 3,
    'auxiliary': 'adaptive_pool',
    'dropout': 0.2,
    'input_std': '0.2,0.25,0.3',
  },
}


@pytest.fixture(autouse=True)
def plain(monkeypatch):
  """XLA's own forms, which compile fastest."""
  monkeypatch.setattr(layers, 'by_platform', lambda own, *arrays, **_: own(*arrays))


@pytest.fixture
def make(mesh_of):
  """`make(channels=3, members=1, **changes)`: an ensemble of networks that nobody trained."""

  def make(channels=3, members=1, **changes):
    config = small_config(**changes)
    shape = Classifier(config, tuple('abcd'), channels, [], mesh_of(1))

    def network(seed):
      rng = np.random.default_rng(seed)
      drawn = lambda a: rng.standard_normal(a.shape, np.float32) / max(1, a.size / a.shape[-1]) ** 0.5
      params, batch_stats = jax.tree.map(drawn, (shape.params_shape, shape.batch_stats_shape))
      return params, jax.tree.map(lambda a: abs(a) + 0.5, batch_stats)

    networks = [network(seed) for seed in range(members)]
    return Classifier(config, shape.classes, channels, networks, shape.mesh, range(5, 5 + members))

  return make


@pytest.fixture
def narrow(small_network, monkeypatch):
  """Narrow blocks, with both pools between stages."""
  monkeypatch.setitem(googlenet.TABLE, 'inception_4e', googlenet.TABLE['inception_4d'])


def images(*shape):
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize('name', VARIANTS)
def test_the_network_in_pytorch_computes_the_same_with_every_option(name, make, narrow):
  size = 20
  classifier = make(image_size=size, **{f'model.{key}': value for key, value in VARIANTS[name].items()})
  module = torch_network.GoogLeNet(**json.loads(json.dumps(torch_files.network_arguments(classifier))))
  tensors = torch_weights.to_torch(*classifier.networks[0], counters=7)
  module.load_state_dict({key: torch.tensor(array) for key, array in tensors.items()})
  x = images(3, size, size, 3).astype(np.float32) / 255
  expected = jax.device_get(jax.jit(lambda x: classifier.network.end_points(x))(x))
  maps, module = {}, module.eval()
  for block, auxiliary in module.auxiliary_after.items():
    getattr(module, block).register_forward_hook(lambda _, __, out, key=auxiliary: maps.update({key: out}))
  with torch.no_grad():
    found = {'logits': module(torch.tensor(x.transpose(0, 3, 1, 2)))}
    found |= {key: getattr(module, key)(value) for key, value in maps.items()}
  assert list(found) == ['logits', 'aux_4a', 'aux_4d']
  for key, logits in found.items():
    scale = abs(expected[key]).max()
    np.testing.assert_allclose(logits.numpy() / scale, expected[key] / scale, atol=1e-5, err_msg=key)
  with torch.no_grad():
    assert [tuple(logits.shape) for logits in module.train()(torch.rand(2, 3, size, size))] == [(2, 4)] * 3


@pytest.mark.parametrize(
  ('size', 'padding', 'resize'), [((32, 32), 0, 1.0), ((26, 26), 3, 1.0), ((8, 11), 0, 1.15), ((301, 57), 3, 1.15)]
)
def test_images_are_prepared_as_ours(size, padding, resize):
  x = images(2, *size, 3)
  ours = jax.jit(lambda x: augment.prepare(x, 32, padding, resize=resize))(x)
  found = torch_network.prepare(torch.tensor(x), 32, padding, resize)
  np.testing.assert_allclose(found.permute(0, 2, 3, 1), ours, atol=1e-5)


@pytest.mark.parametrize('wrong', [torch.rand(2, 4, 4, 1), torch.zeros(4, 4, 1, dtype=torch.uint8)])
def test_images_of_another_type_or_shape_are_refused(wrong):
  with pytest.raises(ValueError, match=r'images must be torch.uint8 \[N, H, W, C\], and are torch'):
    torch_network.Classifier([], 32)(wrong)


def test_torchvisions_own_network_reads_its_files(make, torchvision_googlenet, tmp_path):
  recipe = {f'model.{key}': value for key, value in VARIANTS['torchvision'].items()}
  # tests/test_parity.py has the names of the auxiliary classifiers: without them the test is twice as fast
  classifier = make(image_size=32, **recipe | {'model.auxiliary': 'none'})
  artefact = torch_files.write(classifier, tmp_path)
  assert tuple(artefact.files) == (
    'googlenet.py', 'googlenet.pth', 'googlenet.safetensors', 'torchvision.pth', 'torchvision.safetensors'
  )  # fmt: skip
  theirs = eval(artefact.facts['torchvision']['network'], {'torchvision': sys.modules['torchvision']})
  theirs.load_state_dict(torch.load(tmp_path / 'torchvision.pth', weights_only=True))
  x = images(2, 40, 50, 3)
  prepared = torch_network.prepare(torch.tensor(x), 32) / torch.tensor([0.2, 0.25, 0.3]).reshape(3, 1, 1)
  with torch.no_grad():
    found = theirs.eval()(prepared).softmax(-1)
  np.testing.assert_allclose(found, artefact.run(x), atol=1e-6)


def test_a_grey_network_is_not_torchvisions(make, small_network):
  recipe = {f'model.{key}': value for key, value in VARIANTS['torchvision'].items()}
  assert torch_files.is_torchvisions(make(**recipe))
  assert not torch_files.is_torchvisions(make(1, **recipe))
  assert not torch_files.is_torchvisions(make(**recipe | {'model.ch5x5_kernel': 5}))
  assert torch_files.network_arguments(make(1, **recipe))['input_std'] == [0.25]


def test_members_of_an_ensemble_have_a_file_each_and_one_answer(make, small_network, tmp_path):
  classifier = make(1, members=2, **{'model.norm': 'batch'})
  artefact = torch_files.write(classifier, tmp_path)
  assert tuple(artefact.files) == (
    'googlenet.py', 'googlenet_0.pth', 'googlenet_0.safetensors', 'googlenet_1.pth', 'googlenet_1.safetensors'
  )  # fmt: skip
  x = images(3, 9, 8, 1)
  np.testing.assert_allclose(artefact.run(x), classifier.probabilities(x), atol=1e-6)
  weights = torch.load(tmp_path / 'googlenet_1.pth', weights_only=True)
  assert weights['conv1.norm.num_batches_tracked'] == 6
  source = (tmp_path / 'googlenet.py').read_text()
  assert 'import googlenet_jax' not in source
  assert 'from googlenet_jax' not in source
