import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import small_config
from jax import lax

from googlenet_jax.data import augment, datasets, random_keys
from googlenet_jax.host import sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import layers
from googlenet_jax.training import loop, optimizers
from googlenet_jax.training.state import create_state, for_prediction

pytestmark = pytest.mark.usefixtures('small_network')
FULL = {'model.norm': 'batch', 'model.dropout': 0.3, 'augment.shift': 2, 'augment.flip': True}


@functools.cache
def batches(count, size=16):
  data = datasets.load('digits').train
  return [{'image': data.images[i * size :][:size], 'label': data.labels[i * size :][:size]} for i in range(count)]


def run(config, mesh, steps=3):
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 10))
  graphdef, state = create_state(config, 10, 1, tx, mesh)
  if config.dtype == 'float64':
    state = jax.tree.map(lambda a: a.astype(config.dtype) if a.dtype == jnp.float32 else a, state)
  step = loop.make_train_step(graphdef, tx, config, mesh)
  losses = []
  for batch in batches(steps):
    state, loss = step(state, sharding.shard_batch(batch, mesh))
    losses.append(float(loss))
  return jax.device_get(state), losses


def assert_close(state, other, tolerance):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.fixture
def float64():
  """Sums in another order differ by so little that no choice (ReLU, max-pool) near a tie should turn."""
  with jax.enable_x64(True):
    yield {'dtype': 'float64'}


def test_n_devices_train_as_one(mesh_of, float64):
  """Micro-batches included: they hold the same examples, which batch statistics would tell, on any number."""
  config = small_config(micro_batches=2, **FULL, **float64)
  one, losses = run(config, mesh_of(1))
  many, other = run(config, mesh_of(4))
  np.testing.assert_allclose(losses, other, rtol=1e-6)
  assert_close(one.params, many.params, 1e-6)
  assert_close(one.batch_stats, many.batch_stats, 1e-6)
  np.testing.assert_array_equal(one.metrics['count'], many.metrics['count'])


@pytest.mark.parametrize('devices', [1, 2])
def test_micro_batches_give_the_gradient_of_the_whole_batch(devices, mesh_of):
  changes = {'model.auxiliary': 'adaptive_pool'}
  whole, losses = run(small_config(**changes), mesh_of(1))
  parts, other = run(small_config(micro_batches=4, **changes), mesh_of(devices))
  np.testing.assert_allclose(losses, other, rtol=1e-5)
  assert_close(whole.params, parts.params, 1e-6)
  assert_close(whole.metrics, parts.metrics, 1e-4)


def test_the_formulation_for_accelerators_trains_the_same(mesh_of, monkeypatch):
  fast, losses = run(small_config(), mesh_of(2))
  monkeypatch.setattr(layers, '_cpu', lambda: False)
  plain, other = run(small_config(), mesh_of(2))
  np.testing.assert_allclose(losses, other, rtol=1e-5)
  assert_close(fast.params, plain.params, 1e-6)


def test_step_equals_pmap(mesh_of):
  """The same step in pmap's idiom, written apart: local gradients, then their mean."""
  config = small_config()
  mesh = mesh_of(4)
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 10))
  graphdef, state = create_state(config, 10, 1, tx, mesh)
  params, opt_state = jax.device_get((state.params, state.opt_state))

  @functools.partial(jax.pmap, axis_name='data', devices=jax.devices()[:4], in_axes=(None, None, 0), out_axes=None)
  def pmap_step(params, opt_state, batch):
    def loss(params):
      logits = nnx.merge(graphdef, params, {})(augment.prepare(batch['image'], config.image_size), train=True)
      return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

    grads = lax.pmean(jax.grad(loss)(params), 'data')
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  for batch in batches(3):
    shards = {name: a.reshape(4, 4, *a.shape[1:]) for name, a in batch.items()}
    params, opt_state = pmap_step(params, opt_state, shards)
  ours, _ = run(config, mesh)
  assert_close(ours.params, params, 1e-6)


def test_metrics_are_sums_over_the_global_batch(mesh_of):
  state, losses = run(small_config(), mesh_of(4))
  assert int(state.step) == 3
  assert int(state.metrics['count']) == 48
  assert float(state.metrics['loss']) == pytest.approx(16 * sum(losses), rel=1e-5)
  assert 0 <= int(state.metrics['correct']) <= 48
  assert int(state.metrics['bad_step']) == -1


def test_label_smoothing_enters_the_loss(mesh_of):
  _, plain = run(small_config(learning_rate=0.0), mesh_of(1), steps=1)
  _, smooth = run(small_config(learning_rate=0.0, label_smoothing=0.5), mesh_of(1), steps=1)
  tx = optax.identity()
  graphdef, state = create_state(small_config(), 10, 1, tx, mesh_of(1))
  batch = batches(1)[0]
  logits = nnx.merge(graphdef, state.params, {})(augment.prepare(jnp.asarray(batch['image']), 17))
  log_p = np.asarray(jax.nn.log_softmax(logits))
  right = log_p[np.arange(16), batch['label']]
  assert plain[0] == pytest.approx(-right.mean(), rel=1e-4)
  assert smooth[0] == pytest.approx(-(0.5 * right + 0.5 * log_p.mean(-1)).mean(), rel=1e-4)


def test_the_first_step_that_is_not_finite_is_kept(mesh_of):
  state, losses = run(small_config(learning_rate=1e30, schedule='constant'), mesh_of(2))
  bad = [i for i, loss in enumerate(losses) if not np.isfinite(loss)]
  assert bad
  assert int(state.metrics['bad_step']) == bad[0]


def test_loss_falls_on_real_digits(mesh_of):
  config = small_config(**{'model.norm': 'batch', 'learning_rate': 0.05})
  _, losses = run(config, mesh_of(1), steps=60)
  assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_a_batch_that_does_not_divide_is_refused_with_both_numbers(mesh_of):
  with pytest.raises(UserError, match='batch_size=10 does not divide by 8 devices: take 8'):
    sharding.check_divides(10, mesh_of(8))
  with pytest.raises(UserError, match='batch_size=24 does not divide by 8 devices times 2 micro-batches: take 16'):
    sharding.check_divides(24, mesh_of(8), 2)


def test_batch_statistics_run_as_pytorchs_but_with_the_biased_variance(mesh_of):
  """One step: running = 0.9 * initial + 0.1 * that of the whole batch.

  PyTorch takes the unbiased variance, N / (N - 1) times this one over N values; the difference falls with N.
  """
  config = small_config(**{'model.norm': 'batch'})
  tx = optax.identity()
  graphdef, state = create_state(config, 10, 1, tx, mesh_of(1))
  image = augment.prepare(jnp.asarray(batches(1)[0]['image']), 17)
  kernel = state.params['conv1']['kernel']
  maps = lax.conv_general_dilated(image, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  after, _ = run(config, mesh_of(4), steps=1)
  found = after.batch_stats['conv1']['norm']
  np.testing.assert_allclose(found['mean'], 0.1 * maps.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found['var'], 0.9 + 0.1 * maps.var((0, 1, 2)), rtol=1e-4)


def test_auxiliary_classifiers_enter_the_loss_with_three_tenths(mesh_of):
  config = small_config(**{'learning_rate': 0.0, 'model.auxiliary': 'adaptive_pool'})
  state, losses = run(config, mesh_of(2), steps=1)
  graphdef, _ = create_state(config, 10, 1, optax.identity(), mesh_of(1))
  batch = batches(1)[0]
  keys = random_keys.example_keys(0, jnp.int32(0), jnp.arange(16))
  keys = random_keys.stream(keys, random_keys.DROPOUT)
  image = augment.prepare(jnp.asarray(batch['image']), 17)
  out = nnx.merge(graphdef, state.params, {}).end_points(image, train=True, keys=keys)
  parts = {}
  for name in ('logits', 'aux_4a', 'aux_4d'):
    log_p = np.asarray(jax.nn.log_softmax(out[name]))
    parts[name] = -log_p[np.arange(16), batch['label']].mean()
  parts['total'] = parts['logits'] + 0.3 * (parts['aux_4a'] + parts['aux_4d'])
  assert losses[0] == pytest.approx(parts['logits'], rel=1e-5)
  for name, metric in (('logits', 'loss'), ('total', 'total'), ('aux_4a', 'aux_4a'), ('aux_4d', 'aux_4d')):
    assert float(state.metrics[metric]) / 16 == pytest.approx(parts[name], rel=1e-5)


def test_averaged_weights_and_statistics(mesh_of):
  """The average after three steps, from the weights after each of them."""
  config = small_config(**{'average_decay': 0.15, 'model.norm': 'batch', 'learning_rate': 0.1})
  _, first = create_state(config, 10, 1, optax.identity(), mesh_of(1))
  first = jax.device_get(first)
  expected = {'params': first.params, 'batch_stats': first.batch_stats}
  for steps in (1, 2, 3):
    state, _ = run(config, mesh_of(2), steps=steps)
    decay = min(0.15, steps / (9 + steps))  # 0.1, then 0.15
    now = {'params': state.params, 'batch_stats': state.batch_stats}
    expected = jax.tree.map(lambda old, new, decay=decay: decay * old + (1 - decay) * new, expected, now)
  assert_close(state.averaged, expected, 1e-6)
  assert for_prediction(state) == (state.averaged['params'], state.averaged['batch_stats'])
  assert np.abs(state.averaged['params']['logits']['kernel'] - state.params['logits']['kernel']).max() > 1e-5


def test_the_seed_is_an_argument_of_the_step(mesh_of):
  """Members of an ensemble run one program, with other random choices."""
  config = small_config(**{'augment.shift': 3})
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 10))
  graphdef, state = create_state(config, 10, 1, tx, mesh_of(1))
  batch = sharding.shard_batch(batches(1)[0], mesh_of(1))
  step = loop.make_train_step(graphdef, tx, config, mesh_of(1))
  losses = []
  for seed in (0, 1):
    own = sharding.replicate(jax.tree.map(jnp.copy, state.replace(seed=jnp.int32(seed))), mesh_of(1))
    losses.append(float(step(own, batch)[1]))
  assert losses[0] != losses[1]
  assert step._cache_size() == 1


def test_images_of_many_sizes_train_as_images_of_their_size(mesh_of):
  """Digits in the upper left of a canvas whose rest must not be seen, beside the digits by themselves."""
  config = small_config(**{'augment.min_area': 0.5})
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 10))
  plain = batches(1)[0]
  canvas = np.full((16, 12, 12, 1), 255, np.uint8)
  canvas[:, :8, :8] = plain['image']
  laid = {'image': canvas, 'label': plain['label'], 'size': np.full((16, 2), 8, np.int32)}
  mesh, losses = mesh_of(2), []
  for batch in (plain, laid):
    graphdef, state = create_state(config, 10, 1, tx, mesh)
    _, loss = loop.make_train_step(graphdef, tx, config, mesh)(state, sharding.shard_batch(batch, mesh))
    losses.append(float(loss))
  assert losses[0] == pytest.approx(losses[1], rel=1e-5)
