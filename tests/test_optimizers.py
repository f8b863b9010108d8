import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def test_linear_ends_at_exactly_zero():
  found = rates([0, 2.5, 5, 7.5, 10], schedule='linear', learning_rate=1.0, epochs=10)
  np.testing.assert_allclose(found, [1, 0.75, 0.5, 0.25, 0], atol=1e-6)
  assert found[-1] == 0


@pytest.mark.parametrize(
  ('schedule', 'after'),
  [
    ('cosine', [1, 0.853553, 0.5, 0.146447, 0]),
    ('linear', [1, 0.75, 0.5, 0.25, 0]),
    ('constant', [1] * 5),
    ('step', [1, 1, 1, 0.96, 0.96]),
  ],
)
def test_a_warm_up_rises_from_zero_and_the_schedule_follows(schedule, after):
  """Ten steps an epoch; two epochs of warm-up. The falls of 'step' are counted from the beginning."""
  changes = {'learning_rate': 1.0, 'epochs': 10, 'warmup_epochs': 2.0, 'schedule': schedule}
  changes['decay_epochs'] = 8
  np.testing.assert_allclose(rates([0, 0.1, 0.5, 1, 1.9], **changes), [0, 0.05, 0.25, 0.5, 0.95], rtol=1e-6)
  found = rates([2, 4, 6, 8, 10], **changes)
  np.testing.assert_allclose(found, after, atol=1e-6)
  if schedule in ('cosine', 'linear'):
    assert found[-1] == 0  # exactly


def test_a_schedule_without_a_warm_up_is_as_it_was():
  epochs = np.arange(0, 10.1, 0.1)
  for schedule in ('step', 'constant', 'cosine', 'one_cycle'):
    config = small_config(schedule=schedule, learning_rate=0.3, epochs=10)
    plain = {
      'step': optax.exponential_decay(0.3, 80, 0.96, staircase=True),
      'constant': optax.constant_schedule(0.3),
      'cosine': optax.cosine_decay_schedule(0.3, 100),
      'one_cycle': optax.cosine_onecycle_schedule(100, 0.3, final_div_factor=1e4),
    }[schedule]
    found = optimizers.learning_rate_schedule(config, 10)
    assert [float(found(round(10 * e))) for e in epochs] == [float(plain(round(10 * e))) for e in epochs]


def test_a_warm_up_of_parts_of_an_epoch_works_inside_jit():
  config = small_config(schedule='linear', learning_rate=0.5, epochs=3, warmup_epochs=0.25)
  schedule = optimizers.learning_rate_schedule(config, 8)
  found = jax.jit(jax.vmap(schedule))(jnp.arange(25))
  steps = np.arange(25)
  np.testing.assert_allclose(found, 0.5 * np.where(steps < 2, steps / 2, (24 - steps) / 22), atol=1e-7)


def test_an_unknown_schedule_lists_those_that_exist():
  with pytest.raises(
    ValueError, match="schedule='up' is unknown: choose from step, constant, cosine, linear, one_cycle"
  ):
    rates([0], schedule='up')


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


@pytest.mark.parametrize('nesterov', [False, True])
def test_the_learning_rate_of_the_body_is_that_of_a_second_parameter_group_in_pytorch(nesterov):
  changes = {'momentum': 0.9, 'nesterov': nesterov, 'weight_decay': 0.1, 'learning_rate': 0.2, 'epochs': 1}
  config = small_config(**changes, body_learning_rate=0.3, schedule='linear')
  rng, names = np.random.default_rng(0), ('conv1', 'inception_3a', 'hidden', 'logits', 'aux_4a')
  with jax.enable_x64(True):
    tx = optimizers.make_optimizer(config, lambda step: 0.2 * (1 - step.astype(float) / 10))
    params = {name: {'kernel': jnp.asarray(rng.normal(size=(2, 3)))} for name in names}
    weights = {name: torch.nn.Parameter(torch.tensor(np.array(params[name]['kernel']))) for name in names}
    body, heads = ([weights[name] for name in part] for part in (names[:2], names[2:]))
    groups = [{'params': body, 'lr': 0.06}, {'params': heads, 'lr': 0.2}]
    reference = torch.optim.SGD(groups, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    state, start = tx.init(params), [group['lr'] for group in groups]
    for step in range(5):
      gradients = {name: {'kernel': rng.normal(size=(2, 3))} for name in names}
      updates, state = tx.update(jax.tree.map(jnp.asarray, gradients), state, params)
      params = optax.apply_updates(params, updates)
      for name in names:
        weights[name].grad = torch.tensor(gradients[name]['kernel'])
      for group, rate in zip(reference.param_groups, start, strict=True):
        group['lr'] = rate * (1 - step / 10)
      reference.step()
    for name in names:
      np.testing.assert_allclose(params[name]['kernel'], weights[name].detach().numpy(), rtol=1e-12)


def test_a_body_at_rate_zero_stays(small_network):
  config = small_config(body_learning_rate=0.0, weight_decay=0.1)
  tx = optimizers.make_optimizer(config, optax.constant_schedule(0.1))
  params = {'conv2': {'kernel': jnp.ones((2, 2))}, 'logits': {'kernel': jnp.ones((2, 2))}}
  updates, _ = tx.update(params, tx.init(params), params)
  assert not updates['conv2']['kernel'].any()
  assert updates['logits']['kernel'].all()


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


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'constant'])
def test_a_warm_up_leaves_a_step_for_the_rest(schedule):
  config = small_config(schedule=schedule, learning_rate=1.0, epochs=1, warmup_epochs=0.99)
  rate = optimizers.learning_rate_schedule(config, 10)
  assert float(rate(8)) == pytest.approx(8 / 9)
  assert float(rate(9)) == 1.0
