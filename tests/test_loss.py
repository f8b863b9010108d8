"""The loss over one label or two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import least_table, small_config

from googlenet_jax.data import datasets, mixing, random_keys
from googlenet_jax.host import sharding
from googlenet_jax.model import googlenet
from googlenet_jax.model.googlenet import make_network, split
from googlenet_jax.training import optimizers
from googlenet_jax.training.loss import loss_fn, soft_targets, weights_of_classes
from googlenet_jax.training.state import create_state
from googlenet_jax.training.step import make_train_step

MIXED = [{'augment.cutmix': 0.8}, {'augment.mixup': 0.4}]


@pytest.fixture(autouse=True, scope='module')
def small_network():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(googlenet, 'TABLE', least_table())
    yield


@functools.cache
def batch():
  data = datasets.load('digits').train
  return {'image': data.images[:16], 'label': data.labels[:16], 'mirrored': np.arange(16) % 2 == 0}


def keys():
  return random_keys.example_keys(0, jnp.int32(7), jnp.arange(16))


def program(config):
  """The network of a recipe, and its loss with gradients."""
  graphdef, params, batch_stats = split(make_network(config, 10, 1, nnx.Rngs(0)))
  loss = functools.partial(loss_fn, graphdef=graphdef, config=config)
  return graphdef, params, batch_stats, jax.value_and_grad(loss, has_aux=True)


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_targets_have_two_labels_and_are_smoothed(smoothing):
  label, weight = np.array([2, 0, 0, 1]), np.array([0.75, 1.0, 0.25, 0.5], np.float32)
  expected = np.array([[0.25, 0, 0.75], [1, 0, 0], [0.25, 0.75, 0], [0, 0.5, 0.5]])
  expected = (1 - smoothing) * expected + smoothing / 3
  np.testing.assert_allclose(soft_targets(label, weight, 3, smoothing), expected, atol=1e-6)
  plain = (1 - smoothing) * np.eye(3)[label] + smoothing / 3
  np.testing.assert_allclose(soft_targets(label, None, 3, smoothing), plain, atol=1e-6)


@pytest.mark.parametrize('mixed', MIXED)
def test_the_loss_is_that_of_both_labels_and_the_accuracy_that_of_the_first(mixed):
  config = small_config(label_smoothing=0.1, **mixed)
  graphdef, params, batch_stats, grad_fn = program(config)
  (loss, (_, losses, correct)), _ = jax.jit(grad_fn)(params, batch_stats, batch(), keys())

  @jax.jit
  def answers():
    image, weight = mixing.training_input(batch(), keys(), config)
    return jax.nn.log_softmax(nnx.merge(graphdef, params, batch_stats)(image)), weight

  log_p, weight = map(np.asarray, answers())
  label, rows = batch()['label'], np.arange(16)
  first, second = -log_p[rows, label], -log_p[rows, np.roll(label, -1)]
  expected = 0.9 * (weight * first + (1 - weight) * second) - 0.1 * log_p.mean(-1)
  assert float(loss) == pytest.approx(expected.mean(), rel=1e-5)
  assert float(losses['loss']) == pytest.approx(expected.mean(), rel=1e-5)
  assert int(correct) == (log_p.argmax(-1) == label).sum()
  assert (weight < 1).any()


@pytest.mark.parametrize('mixed', MIXED)
def test_the_loss_and_its_gradient_do_not_depend_on_the_devices(mixed, mesh_of):
  """In float64, where sums in another order change no choice near a tie. Nothing is resized: that is in float32."""
  images = np.random.default_rng(0).integers(0, 256, (16, 17, 17, 1), np.uint8)
  config = small_config(dtype='float64', **{'model.norm': 'batch', 'augment.alternating_flip': True, **mixed})
  with jax.enable_x64(True):
    _, params, batch_stats, grad_fn = program(config)
    params, batch_stats = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, batch_stats))
    found = []
    for devices in (1, 4):
      mesh = mesh_of(devices)
      whole, cut = sharding.whole(mesh), sharding.cut(mesh)
      step = jax.jit(grad_fn, in_shardings=(whole, whole, cut, cut), out_shardings=whole)
      there = jax.device_put((params, batch_stats), whole)
      found.append(
        jax.device_get(
          step(*there, sharding.shard_batch({**batch(), 'image': images}, mesh), jax.device_put(keys(), cut))
        )
      )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *found)


@pytest.mark.parametrize('mixed', MIXED)
def test_a_micro_batch_is_mixed_within_itself(mixed):
  """Positions 0, 4, 8, 12 of 16 in four parts: position 4 is the one after position 0."""
  config = small_config(**mixed)
  taken = slice(0, None, 4)
  part = {name: values[taken] for name, values in batch().items()}
  see = jax.jit(lambda batch, keys: mixing.training_input(batch, keys, config))
  image, weight = see(part, keys()[taken])
  plain, _ = jax.jit(lambda batch, keys: mixing.training_input(batch, keys, small_config()))(batch(), keys())
  alone = plain[taken]
  other = np.roll(alone, -1, axis=0)
  _, whole_weight = see(batch(), keys())
  np.testing.assert_allclose(weight, whole_weight[taken], atol=1e-6)  # the same random choices
  if config.augment.mixup:
    own = np.asarray(weight)[:, None, None, None]
    np.testing.assert_allclose(image, own * alone + (1 - own) * other, atol=1e-5)
  else:
    assert (np.isclose(image, alone, atol=1e-5) | np.isclose(image, other, atol=1e-5)).all()


@pytest.mark.parametrize('devices', [1, 2, 4])
def test_the_training_step_mixes_within_micro_batches(devices, mesh_of):
  config = small_config(micro_batches=4, **{'augment.flip': True, 'augment.cutmix': 0.8})
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 10))
  graphdef, state = create_state(config, 10, 1, tx, mesh_of(devices))
  loss = jax.jit(lambda batch, keys: loss_fn(state.params, {}, batch, keys, graphdef, config)[0])
  images = {name: batch()[name] for name in ('image', 'label')}
  step_keys = random_keys.example_keys(0, jnp.int32(0), jnp.arange(16))
  parts = [loss({name: a[i::4] for name, a in images.items()}, step_keys[i::4]) for i in range(4)]
  expected = np.mean([float(part) for part in parts])
  _, metrics = make_train_step(graphdef, tx, config, mesh_of(devices), 10)(
    state, sharding.shard_batch(images, mesh_of(devices))
  )
  assert float(metrics.losses['loss'] / metrics.count) == pytest.approx(expected, rel=1e-5)


def test_balanced_weights_make_every_class_count_the_same():
  labels = np.array([2, 0, 0, 2, 2, 2, 0, 4])
  weights = weights_of_classes(labels, 5, 'balanced')
  np.testing.assert_allclose(weights, [8 / 15, 0, 8 / 20, 0, 8 / 5], rtol=1e-6)  # no image of classes 1 and 3
  assert weights.dtype == np.float32
  sums = np.bincount(labels, weights[labels], 5)
  np.testing.assert_allclose(sums, [8 / 5, 0, 8 / 5, 0, 8 / 5], rtol=1e-6)
  assert weights_of_classes(labels, 5, 'none') is None


@pytest.mark.parametrize('mixed', [{}, MIXED[0]])
def test_the_loss_with_class_weights_is_pytorchs(mixed):
  """With two labels or smoothing PyTorch divides by the images; with one label by the sum of their weights."""
  torch = pytest.importorskip('torch')
  config = small_config(label_smoothing=0.1 if mixed else 0.0, **mixed)
  graphdef, params, batch_stats = split(make_network(config, 10, 1, nnx.Rngs(0)))
  label, weights = batch()['label'], np.linspace(0.2, 3, 10, dtype=np.float32)

  @jax.jit
  def both():
    loss, _ = loss_fn(params, batch_stats, batch(), keys(), graphdef, config, weights)
    image, weight = mixing.training_input(batch(), keys(), config)
    logits = nnx.merge(graphdef, params, batch_stats)(image)
    return loss, logits, soft_targets(label, weight, 10, config.label_smoothing)

  loss, logits, targets = (torch.tensor(np.asarray(value)) for value in both())
  criterion = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights))
  assert loss.item() == pytest.approx(criterion(logits, targets).item(), rel=1e-5)
  if not mixed:
    divided = criterion(logits, torch.tensor(label.astype(np.int64))).item()
    assert loss.item() == pytest.approx(divided * weights[label].sum() / 16, rel=1e-5)
