"""Batch statistics that fit the weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_config, small_table
from jax import lax

from googlenet_jax.classifier import Classifier
from googlenet_jax.data import augment, datasets, mixing, pipeline, random_keys
from googlenet_jax.evaluation import statistics
from googlenet_jax.evaluation.evaluate import evaluate
from googlenet_jax.host import sharding
from googlenet_jax.model import googlenet
from googlenet_jax.training import optimizers
from googlenet_jax.training.state import create_state, networks, with_statistics
from googlenet_jax.training.step import make_train_step

BATCHES, SEED, STEPS = 3, 5, 20


def config():
  return small_config(
    **{'model.norm': 'batch', 'augment.shift': 2, 'average_decay': 0.9, 'learning_rate': 0.05, 'seed': SEED}
  )


@pytest.fixture(autouse=True, scope='module')
def setting():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(googlenet, 'TABLE', small_table())
    patch.setattr(statistics, 'EXAMPLES', BATCHES * 16)
    yield
  statistics_step.cache_clear()


@pytest.fixture(scope='module')
def digits():
  return datasets.load('digits')


def mesh(devices):
  return sharding.make_mesh(jax.devices()[:devices])


@pytest.fixture(scope='module')
def trained(digits):
  """The state after a few steps on two devices."""
  tx = optimizers.make_optimizer(config(), optimizers.learning_rate_schedule(config(), 90))
  graphdef, state = create_state(config(), 10, 1, tx, mesh(2))
  step = make_train_step(graphdef, tx, config(), mesh(2), 10)
  batches = pipeline.train_batches(digits.train, 16, SEED, 0, mesh(2))
  for _ in range(STEPS):
    state, _ = step(state, next(batches))
  return state


@functools.cache
def statistics_step(devices):
  graphdef = Classifier(config(), tuple('0123456789'), 1, [], mesh(1)).graphdef
  return statistics.make_statistics_step(graphdef, config(), mesh(devices))


def recompute(state, split, devices=1, seed=SEED, step=STEPS):
  there = mesh(devices)
  own = sharding.replicate(networks(state), there)
  return statistics.recompute(statistics_step(devices), own, split, config(), seed, step, there)


@pytest.fixture(scope='module')
def found(trained, digits):
  return recompute(trained, digits.train)


@jax.jit
def convolved(kernel, image, step):
  keys = random_keys.example_keys(SEED, step, jnp.arange(16))
  image = augment.augment(image, keys, 17, config().augment)
  return lax.conv_general_dilated(image, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def first_maps(params, split, step):
  """What the first convolution makes of a training batch, by hand: float64 `[16, 9, 9, 64]`."""
  indices = pipeline.train_indices(step, len(split), 16, SEED)
  return np.asarray(convolved(params['conv1']['kernel'], split.images[indices], step), np.float64)


def test_they_are_mean_and_variance_over_all_images_of_the_last_batches(found, trained, digits):
  """Of the averaged weights, then of the raw ones: population variance, from the first layer."""
  assert len(found) == 2
  for own, (params, _) in zip(found, networks(trained), strict=True):
    params = jax.device_get(params)
    maps = np.concatenate([first_maps(params, digits.train, step) for step in range(STEPS - BATCHES, STEPS)])
    assert len(maps) == 48
    np.testing.assert_allclose(own['conv1']['norm']['mean'], maps.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(own['conv1']['norm']['var'], maps.var((0, 1, 2)), rtol=1e-4)


def test_the_first_batches_are_used_before_there_are_enough(trained, digits):
  own = recompute(trained, digits.train, step=1)[1]
  params = jax.device_get(trained.params)
  maps = np.concatenate([first_maps(params, digits.train, step) for step in range(BATCHES)])
  np.testing.assert_allclose(own['conv1']['norm']['mean'], maps.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)


def test_means_and_variances_of_batches_are_combined():
  batches = np.random.default_rng(0).normal(1, 3, (4, 50, 2))
  of_batch = lambda batch: {'norm': {'mean': batch.mean(0), 'var': batch.var(0)}}
  combined = statistics._combined([of_batch(batch) for batch in batches])
  np.testing.assert_allclose(combined['norm']['mean'], batches.mean((0, 1)))
  np.testing.assert_allclose(combined['norm']['var'], batches.var((0, 1)))


def test_two_devices_give_what_one_gives(found, trained, digits):
  for one, two in zip(found, recompute(trained, digits.train, devices=2), strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, two)


def test_they_are_a_function_of_weights_seed_and_step(found, trained, digits):
  means = lambda own: own[1]['inception_4a']['ch3x3']['norm']['mean']
  jax.tree.map(np.testing.assert_array_equal, found, recompute(trained, digits.train))
  assert (means(recompute(trained, digits.train, seed=SEED + 1)) != means(found)).any()
  assert (means(recompute(trained, digits.train, step=STEPS - 1)) != means(found)).any()


def test_they_do_not_depend_on_the_running_statistics(found, trained, digits):
  moved = with_statistics(
    trained, [jax.tree.map(lambda a: 3 * a + 1, stats) for _, stats in networks(trained)], mesh(2)
  )
  jax.tree.map(np.testing.assert_array_equal, found, recompute(moved, digits.train))


def test_they_replace_those_of_raw_and_averaged_weights_and_nothing_else(found, trained):
  state = with_statistics(trained, found, mesh(2))
  jax.tree.map(np.testing.assert_array_equal, state.averaged['batch_stats'], found[0])
  jax.tree.map(np.testing.assert_array_equal, state.batch_stats, found[1])
  for name in ('step', 'params', 'opt_state', 'seed'):
    jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(trained, name))
  jax.tree.map(np.testing.assert_array_equal, state.averaged['params'], trained.averaged['params'])
  for array, before in zip(jax.tree.leaves(state), jax.tree.leaves(trained), strict=True):
    assert (array.sharding, array.dtype, array.shape) == (before.sharding, before.dtype, before.shape)


def test_a_young_network_predicts_far_better_with_them(found, trained, digits):
  """Running statistics lag behind weights that move fast: a first epoch looked broken."""
  test = digits.test.take(np.arange(96))
  classifier = Classifier(config(), digits.class_names, 1, networks(trained), mesh(2))
  _, running = evaluate(classifier, test)
  classifier.networks = networks(with_statistics(trained, found, mesh(2)))
  _, fitting = evaluate(classifier, test)
  assert fitting.loss < 0.5 * running.loss
  assert fitting.loss < np.log(10)


def test_they_are_of_images_as_training_mirrors_and_mixes_them(digits):
  """Three batches of the second epoch, by hand."""
  recipe = small_config(
    **{'model.norm': 'batch', 'augment.alternating_flip': True, 'augment.cutmix': 0.7, 'seed': SEED}
  )
  tx = optimizers.make_optimizer(recipe, optimizers.learning_rate_schedule(recipe, 90))
  graphdef, state = create_state(recipe, 10, 1, tx, mesh(1))
  step_fn, last = statistics.make_statistics_step(graphdef, recipe, mesh(1)), len(digits.train) // 16 + 6
  (found,) = statistics.recompute(step_fn, networks(state), digits.train, recipe, SEED, last, mesh(1))

  @jax.jit
  def first_maps(batch, step):
    keys = random_keys.example_keys(SEED, step, jnp.arange(16))
    image, _ = mixing.training_input(batch, keys, recipe)
    kernel, dimensions = state.params['conv1']['kernel'], ('NHWC', 'HWIO', 'NHWC')
    return lax.conv_general_dilated(image, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=dimensions)

  maps = []
  for step in range(last - BATCHES, last):
    indices = pipeline.train_indices(step, len(digits.train), 16, SEED)
    mirrored = augment.alternating_mirror(jnp.int32(SEED), indices, jnp.int32(1))
    maps.append(np.asarray(first_maps({**digits.train.batch(indices), 'mirrored': mirrored}, step), np.float64))
  np.testing.assert_allclose(found['conv1']['norm']['mean'], np.mean(maps, axis=(0, 1, 2, 3)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found['conv1']['norm']['var'], np.var(maps, axis=(0, 1, 2, 3)), rtol=1e-4)
