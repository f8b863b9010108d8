import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import small_config

from googlenet_jax.host import sharding
from googlenet_jax.training import optimizers, packing
from googlenet_jax.training.state import TrainState, create_state
from googlenet_jax.training.step import update

TREE = {
  'conv': {'kernel': np.arange(12.0, dtype=np.float32).reshape(1, 1, 3, 4), 'bias': np.arange(4, dtype=np.float32)},
  'logits': {'kernel': -np.arange(8, dtype=np.float32).reshape(4, 2), 'bias': np.ones(2, np.float32)},
}


def test_kernels_lie_in_one_row_and_other_values_in_another_array():
  packed = packing.pack(TREE)
  np.testing.assert_array_equal(packed.kernels, [[*range(12), *(-i for i in range(8))]])
  np.testing.assert_array_equal(packed.others, [0, 1, 2, 3, 1, 1])
  back = packing.unpack(packed)
  assert jax.tree.structure(back) == jax.tree.structure(TREE)
  jax.tree.map(np.testing.assert_array_equal, back, TREE)


@pytest.mark.parametrize('tree', [{}, {'mean': np.ones(3, np.float32)}, {'kernel': np.ones((2, 2), np.float32)}])
def test_a_part_may_be_empty(tree):
  back = packing.unpack(packing.pack(tree))
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  jax.tree.map(np.testing.assert_array_equal, back, tree)


def random_like(tree, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), tree)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'weight_decay': 0.1, 'average_decay': 0.9},
    {'weight_decay': 0.1, 'nesterov': True, 'schedule': 'cosine', 'average_decay': 0.9},
    {'momentum': 0.0},
  ],
)
def test_the_update_of_a_packed_state_is_that_of_the_tree(changes):
  """Bit for bit, one operation after another: only XLA's fusions can round differently."""
  config = small_config(**changes)
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 10))
  stats = {'conv': {'norm': {'mean': np.zeros(4, np.float32), 'var': np.ones(4, np.float32)}}}
  averaged = {'params': TREE, 'batch_stats': stats} if config.average_decay else {}
  tree = TrainState(jnp.int32(0), TREE, stats, tx.init(TREE), averaged, jnp.int32(0))
  packed = packing.pack_state(tree)
  assert len(jax.tree.leaves(packed)) < len(jax.tree.leaves(tree))
  with jax.disable_jit():
    for seed in range(3):
      grads, new_stats = random_like(TREE, seed), random_like(stats, 10 + seed)
      tree = update(tree, new_stats, grads, tx, config)
      packed = update(packed, packing.pack(new_stats), packing.pack(grads), tx, config)
  assert (np.asarray(tree.params['conv']['kernel']) != TREE['conv']['kernel']).any()
  back = packing.unpack_state(packed)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_clipping_sums_the_norm_in_another_order_only():
  config = small_config(clip_norm=0.5)
  tx = optimizers.make_optimizer(config, optax.constant_schedule(0.1))
  grads = random_like(TREE, 0)
  updates, _ = tx.update(grads, tx.init(TREE), TREE)
  packed = packing.pack(TREE)
  others, _ = tx.update(packing.pack(grads), tx.init(packed), packed)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), packing.unpack(others), updates)
  assert optax.tree.norm(updates) == pytest.approx(0.05, rel=1e-5)


def test_the_state_of_the_network_becomes_a_few_arrays():
  config = small_config(**{'model.norm': 'batch', 'average_decay': 0.9, 'weight_decay': 1e-3})
  tx = optimizers.make_optimizer(config, optax.constant_schedule(0.1))
  _, state = create_state(config, 10, 1, tx, sharding.make_mesh(jax.devices()[:1]))
  packed = packing.pack_state(state)
  assert len(jax.tree.leaves(state)) > 100
  # Two arrays each of parameters, statistics, momentum and both averages; step, seed, and the optimizer's count.
  assert len(jax.tree.leaves(packed)) == 13
