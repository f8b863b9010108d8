import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import least_table, small_config, small_table
from jax import lax

from googlenet_jax.data import augment, datasets, random_keys
from googlenet_jax.host import sharding
from googlenet_jax.model import auxiliary_classifiers, googlenet, layers
from googlenet_jax.training import optimizers
from googlenet_jax.training.metrics import Metrics
from googlenet_jax.training.state import TrainState, create_state, networks
from googlenet_jax.training.step import make_train_step, make_train_steps, unless_nonfinite, update

FULL = {'model.norm': 'batch', 'model.dropout': 0.3, 'augment.shift': 2, 'augment.flip': True}
AUXILIARY = {'model.auxiliary': 'adaptive_pool'}
BATCH_NORM = {'model.norm': 'batch', 'learning_rate': 0.05, 'average_decay': 0.15, 'skip_nonfinite': True}


@pytest.fixture(autouse=True, scope='module')
def small_network():
  with pytest.MonkeyPatch.context() as patch:
    table = small_table()
    del table['inception_3b']  # the least network with auxiliary classifiers
    patch.setattr(googlenet, 'TABLE', table)
    for name in ('CHANNELS', 'HIDDEN'):
      patch.setattr(auxiliary_classifiers, name, 16)
    yield
  program.cache_clear()


@functools.cache
def batch(number, size=16):
  data = datasets.load('digits').train
  rows = slice(number * size, (number + 1) * size)
  return {'image': data.images[rows], 'label': data.labels[rows]}


class Program:
  """The training step of a recipe on some devices, compiled at its first use, and its first state."""

  def __init__(self, devices, config):
    self.config, self.mesh = config, sharding.make_mesh(jax.devices()[:devices])
    self.tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 10))
    self.graphdef, state = create_state(config, 10, 1, self.tx, self.mesh)
    self.step = make_train_step(self.graphdef, self.tx, config, self.mesh, 10)
    state = jax.device_get(state)  # NumPy converts without compiling
    self.first = jax.tree.map(lambda a: a.astype(config.dtype) if a.dtype == np.float32 else a, state)

  def run(self, steps=3, first=None, batches=batch):
    """Returns the state after some steps, and the metrics of each, on the host."""
    state, metrics = sharding.replicate(self.first if first is None else first, self.mesh), []
    for number in range(steps):
      state, found = self.step(state, sharding.shard_batch(batches(number), self.mesh))
      metrics.append(jax.device_get(found))
    return jax.device_get(state), metrics


@functools.cache
def program(devices, **changes):
  return Program(devices, small_config(**changes))


def losses(metrics, name='loss'):
  return [float(one.losses[name] / one.count) for one in metrics]


def assert_close(state, other, tolerance):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def cross_entropy(logits, labels):
  """Mean log-probability of the label, and of all classes, by NumPy."""
  log_p = np.asarray(jax.nn.log_softmax(logits))
  return -log_p[np.arange(len(labels)), labels].mean(), -log_p.mean()


def test_several_devices_train_as_one(monkeypatch):
  """In float64: sums in another order then change no choice near a tie (ReLU, max-pool).

  Micro-batches hold the same examples on any number of devices; otherwise their batch statistics would differ.
  """
  monkeypatch.setattr(googlenet, 'TABLE', least_table())  # float64 compiles slowly
  config = small_config(dtype='float64', micro_batches=2, **FULL)
  with jax.enable_x64(True):
    one, metrics = Program(1, config).run()
    many, other = Program(4, config).run()
  np.testing.assert_allclose(losses(metrics), losses(other), rtol=1e-6)
  assert_close(one.params, many.params, 1e-6)
  assert_close(one.batch_stats, many.batch_stats, 1e-6)
  assert [m.count for m in metrics] == [m.count for m in other] == [16, 16, 16]
  assert [m.correct for m in metrics] == [m.correct for m in other]


def test_micro_batches_give_the_gradient_of_the_whole_batch():
  whole, metrics = program(2, **AUXILIARY).run()
  parts, other = program(2, micro_batches=4, **AUXILIARY).run()
  np.testing.assert_allclose(losses(metrics), losses(other), rtol=1e-5)
  assert_close(whole.params, parts.params, 1e-6)
  assert_close(metrics, other, 1e-4)


def test_the_layers_for_accelerators_train_the_same_network(monkeypatch):
  fast, metrics = program(4).run()
  monkeypatch.setattr(layers, 'by_platform', lambda own, *arrays, **_: own(*arrays))
  plain, other = Program(4, small_config()).run()
  np.testing.assert_allclose(losses(metrics), losses(other), rtol=1e-5)
  assert_close(fast.params, plain.params, 1e-6)


def test_the_step_equals_pmap():
  """The same step as it was written for pmap, independently: local gradients, then their mean."""
  ours = program(4)
  params, opt_state = ours.first.params, ours.first.opt_state

  @functools.partial(jax.pmap, axis_name='data', devices=jax.devices()[:4], in_axes=(None, None, 0), out_axes=None)
  def pmap_step(params, opt_state, batch):
    def loss(params):
      logits = nnx.merge(ours.graphdef, params, {})(augment.prepare(batch['image'], 17), train=True)
      return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

    grads = lax.pmean(jax.grad(loss)(params), 'data')
    updates, opt_state = ours.tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  for number in range(3):
    shards = {name: a.reshape(4, 4, *a.shape[1:]) for name, a in batch(number).items()}
    params, opt_state = pmap_step(params, opt_state, shards)
  state, _ = ours.run()
  assert_close(state.params, params, 1e-6)
  assert_close(state.opt_state, opt_state, 1e-6)


def test_metrics_are_sums_over_the_global_batch():
  """Against the logits of the network before each step, by hand."""
  ours = program(4)
  state, metrics = ours.run()
  assert int(state.step) == 3
  network = jax.jit(lambda params, image: nnx.merge(ours.graphdef, params, {})(augment.prepare(image, 17)))
  for number, found in enumerate(metrics):
    before, _ = ours.run(steps=number)
    logits = network(before.params, batch(number)['image'])
    loss, _ = cross_entropy(logits, batch(number)['label'])
    assert float(found.losses['loss']) == pytest.approx(16 * loss, rel=1e-5)
    assert int(found.correct) == (logits.argmax(-1) == batch(number)['label']).sum()
    assert int(found.count) == 16
    assert list(found.losses) == ['loss']


def test_label_smoothing_enters_the_loss():
  _, smooth = program(1, label_smoothing=0.5).run(steps=1)
  ours = program(4)
  logits = jax.jit(lambda image: nnx.merge(ours.graphdef, ours.first.params, {})(augment.prepare(image, 17)))(
    batch(0)['image']
  )
  label, every_class = cross_entropy(logits, batch(0)['label'])
  _, plain = ours.run(steps=1)
  assert losses(plain) == pytest.approx([label], rel=1e-4)
  assert losses(smooth) == pytest.approx([0.5 * label + 0.5 * every_class], rel=1e-4)


def test_a_step_whose_loss_is_not_finite_says_so():
  ours = program(4)
  huge = ours.first.replace(params=jax.tree.map(lambda a: 1e30 * a, ours.first.params))
  _, (first, *_) = ours.run()
  _, (bad,) = ours.run(steps=1, first=huge)
  assert first.is_finite()
  assert not np.isfinite(bad.losses['loss'])
  assert not bad.is_finite()


def digits_with_indices(number):
  return {**batch(number), 'index': np.arange(16 * number, 16 * number + 16, dtype=np.int32)}


def one_by_one_and_in_a_call(ours, options=None):
  """State and metrics after steps 8 to 11, over the end of an epoch, in both ways."""
  first = ours.first.replace(step=np.int32(8))
  data = sharding.replicate(datasets.load('digits').train.batch(np.s_[:]), ours.mesh)
  batches = [digits_with_indices(number) for number in (8, 9, 10, 11)]
  indices = jax.device_put(np.stack([b['index'] for b in batches]), sharding.cut_steps(ours.mesh))
  batches = [sharding.shard_batch(b, ours.mesh) for b in batches]
  state, metrics = sharding.replicate(first, ours.mesh), []
  step = ours.step.lower(state, batches[0]).compile(options)
  for each in batches:
    state, found = step(state, each)
    metrics.append(found)
  steps = make_train_steps(ours.graphdef, ours.tx, ours.config, ours.mesh, 10)
  other = sharding.replicate(first, ours.mesh)
  other, sums = steps.lower(other, data, indices).compile(options)(other, data, indices)
  return jax.device_get((state, metrics)), (jax.device_get(other), Metrics.by_step([sums]))


@pytest.mark.parametrize(
  ('devices', 'changes'),
  [
    (2, {**FULL, 'average_decay': 0.5, 'weight_decay': 1e-3, 'augment.erasing': 0.5, 'augment.cutmix': 0.5}),
    (1, {**FULL, 'augment.flip': False, 'augment.alternating_flip': True, 'augment.mixup': 0.2}),
  ],
)
def test_several_steps_in_a_call_are_the_steps_one_by_one(devices, changes, monkeypatch):
  """In float64: tests compile without optimisation, and the two programs then round differently."""
  monkeypatch.setattr(googlenet, 'TABLE', least_table())
  with jax.enable_x64(True):
    ours = Program(devices, small_config(dtype='float64', **changes))
    (state, metrics), (other, sums) = one_by_one_and_in_a_call(ours)
  assert jax.tree.structure(other) == jax.tree.structure(state)
  assert int(other.step) == 12
  np.testing.assert_allclose(losses(metrics), losses(sums), rtol=1e-6)
  assert len(set(losses(metrics))) == 4
  assert_close(state.params, other.params, 1e-6)
  assert_close(state.averaged, other.averaged, 1e-6)
  assert_close(state.opt_state, other.opt_state, 1e-5)
  assert [m.correct for m in metrics] == [m.correct for m in sums]


def test_several_steps_in_a_call_are_exact_as_users_compile_them(monkeypatch):
  """Bit for bit on a CPU, with XLA's own options instead of those of the tests."""
  monkeypatch.setattr(googlenet, 'TABLE', least_table())
  options = {'xla_backend_optimization_level': 3}
  if 'xla_cpu_use_fusion_emitters' in os.environ['XLA_FLAGS']:
    options['xla_cpu_use_fusion_emitters'] = True
  changes = {'model.stem': 'small', 'model.norm': 'batch', 'model.dropout': 0.3, 'augment.flip': True}
  ours = Program(1, small_config(**changes, image_size=8, average_decay=0.5, weight_decay=1e-3))
  (state, metrics), (other, sums) = one_by_one_and_in_a_call(ours, options)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
  jax.tree.map(np.testing.assert_array_equal, metrics, sums)


@pytest.mark.parametrize('bad', [np.nan, np.inf, 1e30])
def test_an_update_that_is_not_finite_changes_only_the_step(bad):
  ours = program(2, **BATCH_NORM)
  first = jax.tree.map(np.copy, ours.first)
  first.params['conv1']['kernel'][...] *= bad  # 1e30: the variance of the batch overflows
  state, (metrics,) = ours.run(1, first)
  assert (int(metrics.skipped), int(metrics.count), int(metrics.correct)) == (1, 0, 0)
  assert metrics.is_finite()
  assert int(state.step) == 1
  opt_state = optax.tree_utils.tree_set(first.opt_state, count=1)  # the learning rate is that of the step
  jax.tree.map(np.testing.assert_array_equal, state, first.replace(step=state.step, opt_state=opt_state))
  _, (metrics,) = ours.run(1)
  assert (int(metrics.skipped), int(metrics.count)) == (0, 16)


def test_skipped_updates_leave_the_learning_rate_to_the_step():
  config = small_config(schedule='linear', epochs=10, learning_rate=0.5, momentum=0.9, clip_norm=1.0)
  schedule = optimizers.learning_rate_schedule(config, 1)
  tx, params = optimizers.make_optimizer(config, schedule), {'w': jnp.ones(1)}
  state = TrainState(jnp.int32(0), params, {}, tx.init(params), {}, jnp.int32(0))
  for step, gradient in enumerate([np.nan, np.nan, np.nan, 1.0]):
    old, grads = state, {'w': jnp.full(1, gradient)}
    new = update(old, {}, grads, tx, config)
    state, _ = unless_nonfinite(old, new, grads, Metrics({'loss': jnp.float32(1)}, jnp.int32(0), jnp.int32(1)))
    expected = 0 if np.isnan(gradient) else float(schedule(step))
    assert float(old.params['w'][0] - state.params['w'][0]) == pytest.approx(expected)


def test_the_loss_falls_on_real_digits():
  _, metrics = program(2, **BATCH_NORM).run(steps=40)
  found = losses(metrics)
  assert np.mean(found[-10:]) < 0.7 * np.mean(found[:10])


def test_running_statistics_move_as_in_pytorch_but_with_the_biased_variance():
  """After one step they are 0.9 * initial + 0.1 * those of the whole batch, on any number of devices.

  PyTorch takes the unbiased variance, N / (N - 1) times the variance here over N values. The difference falls with N.
  """
  ours = program(2, **BATCH_NORM)

  @jax.jit
  def convolved(image, kernel):
    image, names = augment.prepare(image, 17), ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(image, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=names)

  maps = jax.device_get(convolved(batch(0)['image'], ours.first.params['conv1']['kernel']))
  after, _ = ours.run(steps=1)
  found = after.batch_stats['conv1']['norm']
  np.testing.assert_allclose(found['mean'], 0.1 * maps.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found['var'], 0.9 + 0.1 * maps.var((0, 1, 2)), rtol=1e-4)


def test_auxiliary_classifiers_enter_the_loss_with_three_tenths():
  ours = program(2, **AUXILIARY)
  _, (metrics,) = ours.run(steps=1)

  @jax.jit
  def end_points(params, image):
    keys = random_keys.example_keys(0, jnp.int32(0), jnp.arange(16))
    keys = random_keys.stream(keys, random_keys.DROPOUT)
    return nnx.merge(ours.graphdef, params, {}).end_points(augment.prepare(image, 17), train=True, keys=keys)

  out = end_points(ours.first.params, batch(0)['image'])
  parts = {name: cross_entropy(out[name], batch(0)['label'])[0] for name in ('logits', 'aux_4a', 'aux_4d')}
  parts['total'] = parts['logits'] + 0.3 * (parts['aux_4a'] + parts['aux_4d'])
  for name, metric in (('logits', 'loss'), ('total', 'total'), ('aux_4a', 'aux_4a'), ('aux_4d', 'aux_4d')):
    assert losses([metrics], metric) == pytest.approx([parts[name]], rel=1e-5)
  assert sorted(metrics.losses) == ['aux_4a', 'aux_4d', 'loss', 'total']


def test_averaged_weights_and_statistics():
  """The average after three steps, from the weights after each of them."""
  ours = program(2, **BATCH_NORM)
  expected = {'params': ours.first.params, 'batch_stats': ours.first.batch_stats}
  for steps in (1, 2, 3):
    state, _ = ours.run(steps=steps)
    decay = min(0.15, steps / (9 + steps))  # 0.1, then 0.15
    now = {'params': state.params, 'batch_stats': state.batch_stats}
    expected = jax.tree.map(lambda old, new, decay=decay: decay * old + (1 - decay) * new, expected, now)
  assert_close(state.averaged, expected, 1e-6)
  averaged, raw = networks(state)
  assert averaged == (state.averaged['params'], state.averaged['batch_stats'])
  assert raw == (state.params, state.batch_stats)
  assert np.abs(state.averaged['params']['logits']['kernel'] - state.params['logits']['kernel']).max() > 1e-5


def test_the_seed_is_an_argument_of_the_step():
  """All members of an ensemble run one program, with different random choices."""
  ours = program(2, **{'augment.min_area': 0.5})
  found = []
  for seed in (0, 1, 0):
    _, metrics = ours.run(steps=1, first=ours.first.replace(seed=np.int32(seed)))
    found += losses(metrics)
  assert found[0] == found[2] != found[1]
  assert ours.step._cache_size() == 1


def test_images_of_many_sizes_train_as_images_of_their_size():
  """Digits in the upper left of a canvas whose rest must not be seen, and the digits by themselves."""
  ours = program(2, **{'augment.min_area': 0.5})

  def laid(number):
    canvas = np.full((16, 12, 12, 1), 255, np.uint8)
    canvas[:, :8, :8] = batch(number)['image']
    return {**batch(number), 'image': canvas, 'size': np.full((16, 2), 8, np.int32)}

  _, plain = ours.run(steps=1)
  _, on_canvas = Program(2, ours.config).run(steps=1, batches=laid)
  assert losses(plain) == pytest.approx(losses(on_canvas), rel=1e-5)
