import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import small_config

from googlenet_jax.training import optimizers


def rates(at_epochs, **changes):
  config = small_config(**changes)
  schedule = optimizers.learning_rate_schedule(config, steps_per_epoch=10)
  return [float(schedule(round(epoch * 10))) for epoch in at_epochs]


def test_step_schedule_falls_4_percent_every_8_epochs():
  found = rates([0, 7.9, 8, 15.9, 16, 40, 100], learning_rate=0.01, epochs=100)
  expected = [0.01, 0.01, 0.0096, 0.0096, 0.009216, 0.01 * 0.8153726976, 0.01 * 0.96**12]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_constant_and_cosine():
  assert rates([0, 5], schedule='constant', learning_rate=0.5) == [0.5, 0.5]
  found = rates([0, 2.5, 5, 7.5, 10], schedule='cosine', learning_rate=1.0, epochs=10)
  np.testing.assert_allclose(found, [1, 0.853553, 0.5, 0.146447, 0], atol=1e-5)


def test_one_cycle_rises_for_30_percent_and_ends_near_zero():
  found = rates([0, 1.5, 3, 6.5, 10], schedule='one_cycle', learning_rate=1.0, epochs=10)
  np.testing.assert_allclose(found, [0.04, 0.52, 1, 0.5, 4e-6], atol=1e-4)


@pytest.mark.parametrize('nesterov', [False, True])
def test_five_steps_equal_pytorchs_sgd(nesterov):
  config = small_config(momentum=0.9, nesterov=nesterov, weight_decay=0.1, learning_rate=0.2, schedule='constant')
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 10))
  params = {'kernel': jnp.asarray([[1.0, -2.0]])}
  state = tx.init(params)
  weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
  reference = torch.optim.SGD([weight], lr=0.2, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
  for step in range(5):
    gradient = np.array([[0.5, step - 2.0]], np.float32)
    updates, state = tx.update({'kernel': jnp.asarray(gradient)}, state, params)
    params = {'kernel': params['kernel'] + updates['kernel']}
    weight.grad = torch.tensor(gradient)
    reference.step()
  np.testing.assert_allclose(params['kernel'], weight.detach().numpy(), rtol=1e-5)


def test_clipping_and_no_decay_of_biases():
  config = small_config(momentum=0.0, clip_norm=1.0, learning_rate=1.0, schedule='constant', weight_decay=0.5)
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 10))
  params = {'kernel': jnp.zeros((1, 2)), 'bias': jnp.asarray([4.0])}
  updates, _ = tx.update({'kernel': jnp.asarray([[3.0, 4.0]]), 'bias': jnp.zeros(1)}, tx.init(params), params)
  np.testing.assert_allclose(updates['kernel'], [[-0.6, -0.8]], rtol=1e-6)
  assert float(updates['bias'][0]) == 0


def test_averages_begin_with_little_memory():
  decays = [float(optimizers.average_decay(jnp.int32(step), 0.99)) for step in (0, 8, 90, 10_000)]
  assert decays == pytest.approx([0.1, 0.5, 0.91, 0.99])
