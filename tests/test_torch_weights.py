import dataclasses
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from googlenet_jax.exporting import torch_network
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet, torch_weights, weight_files
from googlenet_jax.model.options import Options


def abstract(**options):
  """Shapes of the parameters and batch statistics of a network."""
  model = googlenet.with_shapes(lambda rngs: googlenet.GoogLeNet(options=Options(**options), rngs=rngs))
  _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def numpy_state(module):
  return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope='module')
def twin():
  torch.manual_seed(0)
  return numpy_state(torch_network.GoogLeNet())


@pytest.fixture
def small(small_network):
  """Shapes of three narrow blocks with batch normalisation, and tensors that fit."""
  params, batch_stats = abstract(norm='batch')
  rng = np.random.default_rng(0)
  filled = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), (params, batch_stats))
  return params, batch_stats, torch_weights.to_torch(*filled, counters=7)


def assert_same(tensors, others):
  assert list(tensors) == list(others)
  for name, other in others.items():
    assert (tensors[name].dtype, tensors[name].shape) == (other.dtype, other.shape), name
    np.testing.assert_array_equal(tensors[name], other, err_msg=name)


def test_the_twins_weights_keep_every_bit_and_their_order_both_ways(twin):
  weights = torch_weights.from_torch(twin, *abstract())
  assert weights.batch_stats == {}
  assert weights.counters == {}
  assert_same(torch_weights.to_torch(*weights), twin)


def test_kernels_are_transposed_by_rank(twin):
  params = torch_weights.from_torch(twin, *abstract()).params
  kernel = params['inception_4a']['ch5x5']['kernel']
  assert kernel.shape == (5, 5, 16, 48)
  assert kernel[1, 2, 3, 4] == twin['inception_4a.ch5x5.weight'][4, 3, 1, 2]
  assert params['logits']['kernel'][5, 6] == twin['logits.weight'][6, 5]


def test_batch_statistics_and_counters_go_both_ways(small):
  params, batch_stats, tensors = small
  assert tensors['conv1.norm.num_batches_tracked'] == 7
  assert list(tensors)[:7] == [
    'conv1.weight',
    'conv1.norm.weight',
    'conv1.norm.bias',
    'conv1.norm.running_mean',
    'conv1.norm.running_var',
    'conv1.norm.num_batches_tracked',
    'conv2_reduce.weight',
  ]
  tensors['conv2.norm.num_batches_tracked'] = np.array(3)  # smaller for layers that were frozen
  weights = torch_weights.from_torch(tensors, params, batch_stats)
  assert_same(torch_weights.to_torch(*weights), tensors)


def test_counters_may_be_missing_as_in_old_files(small):
  params, batch_stats, tensors = small
  old = {name: array for name, array in tensors.items() if torch_weights.COUNTER not in name}
  weights = torch_weights.from_torch(old, params, batch_stats)
  assert torch_weights.to_torch(*weights)['conv2.norm.num_batches_tracked'] == 0


def test_the_first_tensor_that_does_not_fit_is_named(small):
  params, batch_stats, tensors = small

  def message(**changes):
    changed = {name: a for name, a in (tensors | changes).items() if a is not None}
    with pytest.raises(UserError) as caught:
      torch_weights.from_torch(changed, params, batch_stats)
    return str(caught.value)

  conv2, logits = {'conv2.weight': None}, {'logits.weight': np.zeros((7, 28), np.float32)}
  assert message(**conv2, **logits) == (
    'conv2.weight is missing from the weights: the network expects it with shape (192, 64, 3, 3)'
  )
  assert message(**logits) == 'logits.weight has shape (7, 28), but the network expects (10, 28)'
  assert (
    message(**{'conv1.bias': np.zeros(64, np.float32)}) == 'conv1.bias has no place in the network; its shape is (64,)'
  )
  assert message(**{'conv2.norm.num_batches_tracked': np.zeros(2, np.int64)}) == (
    'conv2.norm.num_batches_tracked has shape (2,), but the network expects ()'
  )
  assert message(**{'logits.bias': np.zeros(10)}) == 'logits.bias is float64, but the network expects float32'


def test_half_precision_widens_exactly(small):
  params, batch_stats, tensors = small
  tensors['logits.bias'] = np.arange(10).astype(jnp.bfloat16)
  tensors['conv1.norm.bias'] = np.full(64, 0.1, np.float16)
  found = torch_weights.from_torch(tensors, params, batch_stats).params
  assert found['logits']['bias'].dtype == found['conv1']['norm']['bias'].dtype == jnp.float32
  np.testing.assert_array_equal(found['logits']['bias'], np.arange(10))
  np.testing.assert_array_equal(found['conv1']['norm']['bias'], np.float32(np.float16(0.1)))


@pytest.mark.parametrize(
  ('options', 'channels'),
  [
    ({}, 1),
    ({'norm': 'batch', 'stem': 'small', 'inception': 'naive'}, 3),
    ({'ch5x5_kernel': 3, 'auxiliary': 'adaptive_pool'}, 1),
    ({'head': 'fully_connected'}, 3),
  ],
)
def test_weights_tell_what_network_they_belong_to(options, channels, small_network):
  options = Options(**options)
  make = lambda rngs: googlenet.GoogLeNet(7, channels, options, image_size=32, rngs=rngs)
  params, batch_stats = nnx.state(googlenet.with_shapes(make), nnx.Param, nnx.BatchStat)
  zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), (params, batch_stats))
  tensors = torch_weights.to_torch(*map(nnx.to_pure_dict, zeros))
  assert torch_weights.describe(tensors) == (options, 'own', 7, channels)


def test_torchvisions_weights_get_the_preparation_of_the_published_ones():
  tensors = {
    'conv1.conv.weight': np.zeros((64, 3, 7, 7)),
    'inception3a.branch3.1.conv.weight': np.zeros((32, 16, 3, 3)),
    'fc.weight': np.zeros((5, 1024)),
  }
  options = dataclasses.replace(torch_weights.PUBLISHED, auxiliary='none')
  assert torch_weights.describe(tensors) == (options, 'torchvision', 5, 3)
  found = torch_weights.describe(tensors | {'aux1.conv.conv.weight': np.zeros((128, 512, 1, 1))})
  assert found.options == torch_weights.PUBLISHED


@pytest.mark.parametrize(
  ('tensors', 'message'),
  [
    ({}, 'conv1.weight is missing or no kernel; the file begins with nothing'),
    ({'conv1.weight': (64, 3, 7, 7), 'bn1.weight': (64,)}, 'inception_3a.ch5x5.weight is missing .* conv1.weight, bn1'),
    ({'conv1.conv.weight': (64, 3, 7, 7)}, 'inception3a.branch3.1.conv.weight is missing'),
    ({'conv1.weight': (64,)}, 'conv1.weight is missing or no kernel'),
  ],
)
def test_other_weights_are_refused(tensors, message):
  with pytest.raises(UserError, match=f'^no weights of a GoogLeNet: {message}'):
    torch_weights.describe({name: np.zeros(shape) for name, shape in tensors.items()})


def test_an_unknown_naming_is_named(small):
  with pytest.raises(ValueError, match="naming='keras' is unknown: choose from own, torchvision"):
    torch_weights.from_torch(small[2], *small[:2], 'keras')


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.safetensors'])
def test_files_hold_every_bit(suffix, small, tmp_path):
  path = tmp_path / f'weights{suffix}'
  weight_files.write(path, small[2])
  found = weight_files.read(path)
  assert_same({name: found[name] for name in small[2]}, small[2])  # safetensors has its own order
  assert len(found) == len(small[2])


def test_pytorch_reads_what_we_write(twin, tmp_path):
  from safetensors.torch import load_file

  module = torch_network.GoogLeNet()
  for path, load in ((tmp_path / 'a.pth', torch.load), (tmp_path / 'a.safetensors', load_file)):
    weight_files.write(path, torch_weights.to_torch(*torch_weights.from_torch(twin, *abstract())))
    module.load_state_dict(load(path))
    assert_same(numpy_state(module), twin)


def test_we_read_what_pytorch_writes(tmp_path):
  from safetensors.torch import save_file

  tensors = {'half': torch.tensor([0.5, 3.0], dtype=torch.bfloat16), 'count': torch.tensor(3)}
  torch.save(tensors | {'parameter': torch.nn.Parameter(torch.ones(2))}, tmp_path / 'a.pt')
  save_file(tensors, tmp_path / 'a.safetensors')
  for name in ('a.pt', 'a.safetensors'):
    found = weight_files.read(tmp_path / name)
    np.testing.assert_array_equal(found['half'].astype(np.float32), [0.5, 3.0])
    assert (found['count'], found['count'].shape) == (3, ())


def fails(path, match, read=weight_files.read):
  with pytest.raises(UserError, match=match) as caught:
    read(path)
  assert '\n' not in str(caught.value)
  assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path, small):
  fails(tmp_path / 'none.pth', 'No such file')
  fails(tmp_path / 'weights.h5', 'its name must end with .pth, .pt, .safetensors')
  fails(tmp_path / 'no' / 'such.pth', 'cannot be written: No such file', lambda path: weight_files.write(path, {}))
  for suffix in ('.pth', '.safetensors'):
    path = tmp_path / f'weights{suffix}'
    weight_files.write(path, small[2])
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[:1000], b'', b'hello world' * 20):
      path.write_bytes(damaged)
      fails(path, 'is damaged')
  flipped = tmp_path / 'flipped.pth'
  torch.save({'a': torch.zeros(1000)}, flipped)
  whole = bytearray(flipped.read_bytes())
  whole[len(whole) // 2] ^= 1
  flipped.write_bytes(whole)
  assert torch.load(flipped)['a'].any()  # PyTorch reads it without an error
  fails(flipped, 'is damaged')


def test_files_with_more_than_tensors_are_refused(tmp_path):
  path = tmp_path / 'other.pth'
  torch.save({'state_dict': {'a': torch.zeros(2)}, 'epoch': 3}, path)
  fails(path, "'state_dict' is a dict; save model.state_dict")
  torch.save([torch.zeros(2)], path)
  fails(path, 'holds a list, not a flat dict')
  torch.save({'a': torch.eye(2).to_sparse()}, path)
  fails(path, "'a' is not a plain tensor")
  torch.save(torch.nn.Linear(2, 2), path)
  fails(path, 'is damaged or holds more than tensors')


class Trap:
  def __reduce__(self):
    return exec, ("raise SystemExit('unpickled')",)


def test_only_tensors_are_unpickled(tmp_path):
  path = tmp_path / 'trap.pth'
  torch.save({'a': Trap()}, path)
  fails(path, 'is damaged or holds more than tensors')
  path.write_bytes(pickle.dumps({'a': Trap()}, protocol=2))
  fails(path, 'is damaged or holds more than tensors')


@pytest.mark.parametrize(('package', 'name'), [('torch', 'a.pth'), ('safetensors', 'a.safetensors')])
def test_a_package_that_is_not_installed_is_named(package, name, tmp_path, monkeypatch):
  path = tmp_path / name
  path.touch()
  monkeypatch.setitem(sys.modules, package, None)
  fails(path, f'pip install {package}')
  fails(path, f'pip install {package}', lambda path: weight_files.write(path, {}))
