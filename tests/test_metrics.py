import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from googlenet_jax.training.metrics import Metrics


def of_step(loss, correct=3, count=16, **losses):
  """As the step returns it: float32 and int32."""
  losses = {name: np.float32(value) for name, value in {'loss': loss, **losses}.items()}
  return Metrics(losses, np.int32(correct), np.int32(count))


def test_sums_are_added_in_double_precision():
  values = [0.1, 1e8, 3.3, 1e-7]
  total = Metrics.zero()
  for value in values:
    total = total.add(of_step(value))
  expected = 0.0
  for value in values:
    expected += float(np.float32(value))
  assert total == Metrics({'loss': expected}, 12, 64)
  assert expected != float(np.float32(expected))
  assert [type(value) for value in (total.losses['loss'], total.correct, total.count)] == [float, int, int]


def test_adding_changes_neither():
  first, second = Metrics({'loss': 1.0}, 1, 16), of_step(2.0)
  first.add(second)
  assert first == Metrics({'loss': 1.0}, 1, 16)
  assert second == of_step(2.0)
  assert Metrics.zero() == Metrics({}, 0, 0)


def test_means_are_per_example():
  total = Metrics.zero().add(of_step(8.0, 3, total=16.0, aux_4a=4.0)).add(of_step(24.0, 13, total=16.0, aux_4a=0.0))
  expected = {'loss': 1.0, 'accuracy': 0.5, 'loss_total': 1.0, 'loss_aux_4a': 0.125}
  assert total.mean() == expected
  assert list(total.mean()) == list(expected)  # loss and accuracy come first
  assert Metrics({'loss': 8.0}, 4, 16).mean() == {'loss': 0.5, 'accuracy': 0.25}


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_every_loss_must_be_finite(value):
  assert of_step(1.0, aux_4a=2.0).is_finite()
  assert Metrics.zero().is_finite()
  assert not of_step(value).is_finite()
  assert not of_step(1.0, aux_4a=value).is_finite()
  assert not Metrics({'loss': value}, 0, 1).is_finite()
  assert not Metrics({'loss': jnp.float32(value)}, jnp.int32(0), jnp.int32(1)).is_finite()


def test_json_gives_the_same_sums_back():
  total = Metrics.zero()
  for value in (0.1, 1 / 3, 2e-9):
    total = total.add(of_step(value, aux_4a=value * 7))
  again = Metrics(**json.loads(json.dumps(total.to_json())))
  assert again == total
  assert again.mean() == total.mean()
  assert Metrics(**json.loads(json.dumps(Metrics.zero().to_json()))) == Metrics.zero()


def test_a_jitted_function_may_return_them():
  found = jax.jit(lambda x: Metrics({'loss': x.sum()}, (x > 1).sum(), jnp.int32(len(x))))(jnp.arange(4.0))
  assert jax.device_get(found) == Metrics({'loss': 6.0}, 2, 4)


def test_the_steps_of_a_call_are_taken_apart():
  call = Metrics({'loss': jnp.array([1.0, 2.0])}, jnp.array([3, 4]), jnp.array([16, 16]))
  steps = Metrics.by_step([call, Metrics({'loss': jnp.float32(5)}, jnp.int32(6), jnp.int32(8))])
  assert [(float(s.losses['loss']), int(s.correct), int(s.count)) for s in steps] == [(1, 3, 16), (2, 4, 16), (5, 6, 8)]
  assert {type(value) for s in steps for value in jax.tree.leaves(s)} <= {np.int32, np.float32}
