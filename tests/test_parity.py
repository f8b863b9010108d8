"""Compares values, gradients and training with PyTorch, from the same weights on the same images.

Logits are compared in float32. Gradients and training are compared for every parameter in float64. In float32, a sum in
another order can turn a ReLU at zero on or off, and then moves single gradients by a percent: in one measurement, one
bias of 114 tensors. In float64 the networks differ by 4e-8 only, because logits are rounded to float32.
"""

import copy
import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from helpers import small_config

from experiments import pytorch_twin, worker
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import augment, datasets
from googlenet_jax.exporting import torch_network
from googlenet_jax.host import sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet, torch_weights
from googlenet_jax.training import finetune, optimizers, step
from googlenet_jax.training.state import create_state

STEPS, BATCH = 10, 4


@pytest.fixture(scope='module', autouse=True)
def one_thread():
  """PyTorch's threads would wait for the threads of XLA: these arrays are small."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def real():
  """Real images and labels: Fashion-MNIST if its files are there, otherwise the digits."""
  if os.environ.get(worker.SOURCE_VARIABLE):
    return worker.training_images()
  data = datasets.load('digits').train
  return data.images, data.labels


def numpy_state(module):
  return {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}


def split(model):
  graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def forward(graphdef, train=False):
  """A jitted `(params, batch_stats, image) -> end points`."""
  return jax.jit(lambda params, batch_stats, image: nnx.merge(graphdef, params, batch_stats).end_points(image, train))


def to_torch(image):
  """`[B, H, W, C]` as PyTorch takes it."""
  return torch.tensor(np.asarray(image).transpose(0, 3, 1, 2))


def relative_error(ours, theirs):
  """Greatest difference over greatest value."""
  ours, theirs = np.asarray(ours), theirs.detach().numpy()
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


# Our twin ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def twin():
  torch.manual_seed(0)
  return torch_network.GoogLeNet()


def twin_of(twin, dtype):
  """A copy of the twin, in another dtype."""
  return copy.deepcopy(twin).to(dtype)


def ours_from_twin(module, dtype=jnp.float32):
  """Our network with the twin's weights: graphdef and parameters."""
  graphdef, params, _ = split(googlenet.with_shapes(lambda rngs: googlenet.GoogLeNet(dtype=dtype, rngs=rngs)))
  params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), params)
  return graphdef, torch_weights.from_torch(numpy_state(module), params, {}).params


def tiled(images, shape):
  """Copies side by side, cut to `[B, H, W]`: real borders and flat regions, with their ties; in [0, 1]."""
  return np.tile(images[: shape[0]], (1, 13, 13, 1))[:, : shape[1], : shape[2]] / np.float32(255)


# 17 is the smallest size; at 32 the last map is one pixel and most taps of a 5x5 kernel read padding.
@pytest.mark.parametrize('shape', [(4, 32, 32), (2, 17, 17), (1, 35, 47)])
def test_logits_equal_the_twins(shape, twin, real):
  graphdef, params = ours_from_twin(twin)
  image = tiled(real[0], shape)
  ours = forward(graphdef)(params, {}, image)['logits']
  assert ours.dtype == jnp.float32
  assert relative_error(ours, twin(to_torch(image))) < 1e-5


def first_state(config, twin, dtype, tx, mesh):
  """Our network and its first state, with the twin's weights."""
  kept = {}

  @jax.jit  # one program compiles faster than its operations, and it draws no weights because it returns none
  def make():
    kept['graphdef'], state = create_state(config, 10, 1, tx, mesh)
    kept['params'] = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), state.params)
    return state.replace(params=None)

  state = jax.tree.map(lambda a: np.asarray(a, dtype if a.dtype == jnp.float32 else a.dtype), make())
  params = torch_weights.from_torch(numpy_state(twin), kept['params'], {}).params
  return kept['graphdef'], sharding.replicate(state.replace(params=params), mesh)


def train_both(twin, real, dtype, mesh):
  """Ten steps of each; yields after every one: our state, our loss, their optimizer, their loss."""
  config = small_config(schedule='constant', image_size=32, dtype=dtype)
  config.augment.padding = (32 - real[0].shape[1]) // 2  # padded, not resized: frameworks resize differently
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, STEPS))
  graphdef, state = first_state(config, twin, dtype, tx, mesh)
  optimizer = torch.optim.SGD(twin.parameters(), lr=config.learning_rate, momentum=config.momentum)
  train_step = step.make_train_step(graphdef, tx, config, mesh, 1)
  prepare = jax.jit(lambda image: augment.prepare(image, 32, config.augment.padding))
  for i in range(STEPS):
    batch = {'image': real[0][i * BATCH :][:BATCH], 'label': real[1][i * BATCH :][:BATCH]}
    batch = sharding.shard_batch(batch, mesh)
    image = to_torch(prepare(batch['image'])).to(next(twin.parameters()).dtype)
    state, metrics = train_step(state, batch)
    labels = torch.tensor(np.asarray(batch['label']), dtype=torch.long)
    theirs = pytorch_twin.train_step(twin, optimizer, image, labels)
    yield state, float(metrics.losses['loss']) / BATCH, optimizer, float(theirs)


def test_gradients_and_ten_steps_of_momentum_sgd_equal_the_twins(twin, real, mesh_of):
  module = twin_of(twin, torch.float64)
  parameters = dict(module.named_parameters())
  before = numpy_state(module)
  with jax.enable_x64(True):
    for i, (state, loss, optimizer, theirs) in enumerate(train_both(module, real, 'float64', mesh_of(1))):
      assert loss == pytest.approx(theirs, rel=1e-6)
      if i not in (0, STEPS - 1):
        continue
      velocities = optax.tree.get(state.opt_state, 'trace')  # after one step they are the gradient
      momentum, params = (torch_weights.to_torch(tree, {}) for tree in (velocities, state.params))
      assert list(momentum) == list(params) == list(parameters)
      for name, parameter in parameters.items():
        assert params[name].dtype == np.float64
        assert relative_error(momentum[name], optimizer.state[parameter]['momentum_buffer']) < 1e-6, name
        moved = np.abs(params[name] - before[name]).max()
        assert moved > 0, name
        assert np.abs(params[name] - parameter.detach().numpy()).max() < 1e-6 * moved, name


def test_gradients_of_one_image_of_odd_size_equal_the_twins(twin, real):
  module = twin_of(twin, torch.float64)
  image, labels = tiled(real[0], (1, 35, 47)).astype(np.float64), real[1][:1]
  with jax.enable_x64(True):
    graphdef, params = ours_from_twin(module, jnp.float64)

    @jax.jit
    @jax.grad
    def gradient(params):
      logits = nnx.merge(graphdef, params, {})(image, train=True)
      return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean()

    gradients = torch_weights.to_torch(gradient(params), {})
  torch.nn.functional.cross_entropy(module(to_torch(image)), torch.tensor(labels, dtype=torch.long)).backward()
  for name, parameter in module.named_parameters():
    assert relative_error(gradients[name], parameter.grad) < 1e-6, name


def test_ten_steps_in_float32_have_the_twins_losses(twin, real, mesh_of):
  module = twin_of(twin, torch.float32)
  both = [(loss, theirs) for _, loss, _, theirs in train_both(module, real, 'float32', mesh_of(1))]
  ours, theirs = np.transpose(both)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  assert np.ptp(theirs) > 1e-4  # they change by more than the tolerance


# torchvision's googlenet ---------------------------------------------------------------------------------------------


CLASSES = 12


@pytest.fixture(scope='module')
def trained(torchvision_googlenet):
  """torchvision's network with weights and statistics like those of a trained one, without dropout."""
  torch.manual_seed(0)
  module = torchvision_googlenet(num_classes=CLASSES, init_weights=False)
  for layer in module.modules():
    if isinstance(layer, torch.nn.BatchNorm2d):
      torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
      torch.nn.init.normal_(layer.bias, std=0.1)
      torch.nn.init.normal_(layer.running_mean, std=0.1)
      torch.nn.init.uniform_(layer.running_var, 0.1, 0.3)
      layer.num_batches_tracked.fill_(5)
    elif isinstance(layer, torch.nn.Dropout):
      layer.p = 0.0
  return module


@pytest.fixture
def theirs(trained):
  """A copy of `trained` for one test."""
  return copy.deepcopy(trained)


def ours_from(module, dtype=jnp.float32, **options):
  """Our network with the weights of torchvision's: graphdef and weights."""
  options = dataclasses.replace(torch_weights.TORCHVISION, **options)
  model = googlenet.with_shapes(lambda rngs: googlenet.GoogLeNet(CLASSES, 3, options, dtype=dtype, rngs=rngs))
  graphdef, *trees = split(model)
  trees = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), trees)
  return graphdef, torch_weights.from_torch(numpy_state(module), *trees, 'torchvision')


def begun_with(path):
  """The first state of a run with `init_from`, and its network."""
  config = small_config(init_from=str(path), **{'model.auxiliary': 'adaptive_pool'})
  config = finetune.with_network_of_source(config, path.parent)
  classes = tuple(map(str, range(CLASSES)))
  ours = Classifier(config, classes, 3, [], sharding.make_mesh(jax.devices()[:1]))
  tx = optimizers.make_optimizer(config, lambda _: 0.1)
  graphdef, state = create_state(config, CLASSES, 3, tx, ours.mesh)
  return graphdef, finetune.initialise(state, config, ours)


def colour(shape):
  """Smooth images with flat regions, in the range of ImageNet's normalisation."""
  image = np.random.default_rng(0).normal(size=(shape[0], 5, 6, 3)).astype(np.float32)
  return np.maximum(jax.image.resize(image, (*shape, 3), 'linear'), -0.5)


def torch_end_points(module, image):
  """Logits of torchvision's network and of its auxiliary classifiers, which it applies in training only."""
  maps = {}
  hooks = [
    block.register_forward_hook(lambda _, __, out, name=name: maps.update({name: out}))
    for name, block in (('aux_4a', module.inception4a), ('aux_4d', module.inception4d))
  ]
  logits = module(to_torch(image))
  for hook in hooks:
    hook.remove()
  return {'logits': logits, 'aux_4a': module.aux1(maps['aux_4a']), 'aux_4d': module.aux2(maps['aux_4d'])}


def test_torchvisions_weights_keep_every_bit_both_ways(theirs):
  _, weights = ours_from(theirs)
  assert len(weights.counters) == 59
  back, tensors = torch_weights.to_torch(*weights, naming='torchvision'), numpy_state(theirs)
  assert list(back) == list(tensors)
  for name, tensor in tensors.items():
    assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
    np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_weights_without_auxiliary_classifiers_name_the_first_missing(theirs):
  theirs.aux1 = None
  with pytest.raises(UserError, match=r'aux1.conv.conv.weight is missing .* \(128, 512, 1, 1\)'):
    ours_from(theirs)


# At 47 pixels the last window of every pool reaches over the edge, at 35 that of every second one.
@pytest.mark.parametrize(('shape', 'published'), [((1, 35, 47), True), ((1, 224, 224), False)])
def test_logits_equal_torchvisions(shape, published, theirs, tmp_path):
  """`published`: like its published weights, read from a file by `init_from`; images in [0, 1] are all it needs."""
  theirs.eval()
  theirs.transform_input = published
  image = normalised = colour(shape)
  if published:
    torch.save(theirs.state_dict(), tmp_path / 'googlenet.pth')
    graphdef, weights = begun_with(tmp_path / 'googlenet.pth')
  else:
    graphdef, weights = ours_from(theirs)
  if published:
    image = normalised - normalised.min()
    image = image / image.max()
    normalised = (image - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
  ours = forward(graphdef)(weights.params, weights.batch_stats, image)
  for name, expected in torch_end_points(theirs, normalised).items():
    assert relative_error(ours[name], expected) < 1e-5, name


def test_training_equals_torchvisions(theirs):
  """Outputs normalised by the batch, running statistics after one step, and gradients, in float64.

  PyTorch's running variance uses the unbiased variance, N / (N - 1) times that of the batch. Flax uses the batch's own.
  Over the 16 values of the last maps here the difference is 7 %. Everything else is equal. (The published weights come
  from TensorFlow, which works like Flax.)
  """
  theirs.double().train()
  before, counts, labels = numpy_state(theirs), {}, [0, 3, 11, 5]
  for name, layer in theirs.named_modules():
    if isinstance(layer, torch.nn.BatchNorm2d):
      layer.register_forward_hook(lambda _, args, __, name=name: counts.update({name: args[0][:, 0].numel()}))
  image = colour((4, 64, 64)).astype(np.float64)
  with jax.enable_x64(True):
    graphdef, weights = ours_from(theirs, jnp.float64)

    def loss(params):
      model = nnx.merge(graphdef, params, weights.batch_stats)
      points = model.end_points(image, train=True)
      logits = jnp.stack([points[name] for name in ('logits', 'aux_4a', 'aux_4d')])
      total = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([labels] * 3)).sum()
      return total, (logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    gradients, (ours, batch_stats) = jax.jit(jax.grad(loss, has_aux=True))(weights.params)
    gradients = torch_weights.to_torch(gradients, weights.batch_stats, 6, naming='torchvision')
    after = torch_weights.to_torch(weights.params, batch_stats, 6, naming='torchvision')

  logits, aux2, aux1 = theirs(to_torch(image))
  for found, expected in zip(ours, (logits, aux1, aux2), strict=True):
    assert relative_error(found, expected) < 1e-6
    torch.nn.functional.cross_entropy(expected, torch.tensor(labels), reduction='sum').backward(retain_graph=True)
  for name, parameter in theirs.named_parameters():
    assert relative_error(gradients[name], parameter.grad) < 1e-6, name

  assert counts['inception5b.branch1.bn'] == 16
  for name, expected in numpy_state(theirs).items():
    layer, _, leaf = name.rpartition('.')
    if leaf == 'running_var':  # the batch's part of it, without PyTorch's factor
      n = counts[layer]
      expected = 0.9 * before[name] + (expected - 0.9 * before[name]) * (n - 1) / n
    np.testing.assert_allclose(after[name], expected, rtol=1e-6, atol=1e-7, err_msg=name)
