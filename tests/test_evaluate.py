import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import small_config
from flax import nnx

from googlenet_jax import augment, datasets, evaluate
from googlenet_jax.state import create_state


@pytest.mark.usefixtures('small_network')
@pytest.mark.parametrize('devices', [1, 8])
def test_every_image_counts_once_when_the_batch_does_not_divide(devices, mesh_of):
  config, mesh = small_config(), mesh_of(devices)
  split = datasets.load('digits').test
  split = datasets.Split(split.images[:37], split.labels[:37])
  graphdef, state = create_state(config, 10, 1, optax.identity(), mesh)
  found = evaluate.evaluate(evaluate.make_eval_step(graphdef, config, mesh), state, split, 16, mesh, 10)

  params = jax.device_get(state.params)
  logits = nnx.merge(graphdef, params, {})(augment.prepare(jnp.asarray(split.images), config.image_size))
  log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
  np.testing.assert_array_equal(found.predictions, log_p.argmax(-1))
  assert found.loss == pytest.approx(-log_p[np.arange(37), split.labels].mean(), rel=1e-5)
  assert found.accuracy == (log_p.argmax(-1) == split.labels).sum() / 37
  np.testing.assert_allclose(found.confidences, np.exp(log_p.max(-1)), rtol=1e-4)
  assert found.confusion.sum() == 37


def test_confusion_and_accuracy_by_class():
  labels, predictions = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 2, 2])
  result = evaluate.Evaluation(labels, predictions, np.arange(6.0), np.ones(6), 4)
  np.testing.assert_array_equal(result.confusion, [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]])
  np.testing.assert_allclose(result.per_class_accuracy, [1 / 2, 1, 2 / 3, np.nan])
  assert (result.accuracy, result.loss) == (4 / 6, 2.5)
