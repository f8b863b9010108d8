"""The same function as PyTorch's: values, gradients and training, from the same weights on the same images.

Logits are compared in float32. Gradients and training are compared parameter by parameter in float64: a float32 sum in
another order turns a ReLU that stood at zero, and moves single gradients by a percent (one bias of 114 tensors, when it
was measured). Both networks then differ by 4e-8 only, which is what rounding the logits to float32 makes.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from conftest import small_config
from flax import nnx

from experiments import pytorch_twin
from googlenet_jax import augment, datasets, models, optimizers, parallel, torch_weights, train
from googlenet_jax.state import create_state

STEPS, BATCH = 10, 32


@pytest.fixture(scope='module')
def real():
  """Real images and labels: Fashion-MNIST where its files are at hand, else the digits."""
  folder = os.environ.get('FASHION_MNIST_DIR')
  if not folder:
    data = datasets.load('digits').train
    return data.images, data.labels
  images, labels = (datasets.read_idx(pathlib.Path(folder, name)) for name in datasets.IDX_FILES['train'])
  return images[..., None], labels.astype(np.int32)


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
  return pytorch_twin.GoogLeNet()


# 17 is the least; at 32 the last map is one pixel and most taps of a 5x5 kernel meet padding.
@pytest.mark.parametrize('shape', [(4, 32, 32), (1, 32, 32), (2, 17, 17), (2, 33, 33), (1, 35, 47), (1, 96, 65)])
def test_logits_of_the_twin(shape, twin, real):
  graphdef, params, batch_stats = split(nnx.eval_shape(lambda: models.GoogLeNet(rngs=nnx.Rngs(0))))
  weights = torch_weights.from_torch(numpy_state(twin), params, batch_stats)
  # Copies side by side, cut to size: real borders and flat regions, with their ties.
  images = np.tile(real[0][: shape[0]], (1, 13, 13, 1))[:, : shape[1], : shape[2]]
  image = jnp.asarray(images, jnp.float32) / 255
  ours = forward(graphdef)(weights.params, {}, image)['logits']
  assert ours.dtype == jnp.float32
  assert relative_error(ours, twin(to_torch(image))) < 1e-5


def torch_tree(tree):
  return torch_weights.to_torch(tree, {})


def train_both(twin, real, dtype, mesh):
  """Ten steps of each; yields after every one: our state, our loss, their optimizer, their loss."""
  config = small_config(schedule='constant', image_size=32, dtype=dtype)
  config.augment.padding = (32 - real[0].shape[1]) // 2  # padded, not resized: frameworks resize differently
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, STEPS))
  graphdef, state = create_state(config, 10, 1, tx, mesh)
  state = jax.tree.map(lambda a: a.astype(dtype) if a.dtype == jnp.float32 else a, state)
  state = state.replace(params=torch_weights.from_torch(numpy_state(twin), state.params, {}).params)
  state = parallel.replicate(state, mesh)
  optimizer = torch.optim.SGD(twin.parameters(), lr=config.learning_rate, momentum=config.momentum)
  step = train.make_train_step(graphdef, tx, config, mesh)
  for i in range(STEPS):
    batch = {'image': real[0][i * BATCH :][:BATCH], 'label': real[1][i * BATCH :][:BATCH]}
    image = augment.prepare(jnp.asarray(batch['image']), 32, config.augment.padding)
    state, loss = step(state, parallel.shard_batch(batch, mesh))
    theirs = pytorch_twin.train_step(
      twin, optimizer, to_torch(image).to(next(twin.parameters()).dtype), torch.tensor(batch['label'], dtype=torch.long)
    )
    yield state, float(loss), optimizer, float(theirs)


def momentum_of(state):
  """The velocities of Optax's SGD: after one step, the gradient."""
  return torch_tree(optax.tree.get(state.opt_state, 'trace'))


def test_gradients_and_ten_steps_of_momentum_sgd(twin, real, mesh_of):
  module = pytorch_twin.GoogLeNet().double()
  module.load_state_dict(twin.state_dict())
  parameters = dict(module.named_parameters())
  before = numpy_state(module)
  with jax.enable_x64(True):
    for i, (state, loss, optimizer, theirs) in enumerate(train_both(module, real, 'float64', mesh_of(1))):
      assert loss == pytest.approx(theirs, rel=1e-6)
      if i not in (0, STEPS - 1):
        continue
      momentum, params = momentum_of(state), torch_tree(state.params)
      assert list(momentum) == list(params) == list(parameters)
      for name, parameter in parameters.items():
        assert params[name].dtype == np.float64
        assert relative_error(momentum[name], optimizer.state[parameter]['momentum_buffer']) < 1e-6, name
        moved = np.abs(params[name] - before[name]).max()
        assert moved > 0, name
        assert np.abs(params[name] - parameter.detach().numpy()).max() < 1e-6 * moved, name


def test_ten_steps_in_float32_have_the_same_losses(twin, real, mesh_of):
  module = pytorch_twin.GoogLeNet()
  module.load_state_dict(twin.state_dict())
  both = [(loss, theirs) for _, loss, _, theirs in train_both(module, real, 'float32', mesh_of(1))]
  ours, theirs = np.transpose(both)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  assert np.ptp(theirs) > 1e-4  # they move by more than they may differ
