import jax
import numpy as np
import pytest
from flax import nnx
from helpers import small_config

from googlenet_jax.classifier import Classifier
from googlenet_jax.data import augment, datasets
from googlenet_jax.evaluation import evaluate
from googlenet_jax.model.googlenet import make_network


@pytest.mark.usefixtures('small_network')
@pytest.mark.parametrize('devices', [1, 8])
def test_every_image_counts_once_when_the_batch_does_not_divide(devices, mesh_of):
  split = datasets.load('digits').test.take(np.arange(37))
  network = make_network(small_config(), 10, 1, nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
  both = [(params, {}), (jax.tree.map(lambda a: 2 * a, params), {})]
  classifier = Classifier(small_config(), tuple('0123456789'), 1, both, mesh_of(devices))
  results = evaluate.evaluate(classifier, split)
  assert len(results) == 2
  reference = jax.jit(lambda params, image: nnx.merge(classifier.graphdef, params, {})(augment.prepare(image, 17)))
  for (params, _), found in zip(both, results, strict=True):
    log_p = np.asarray(jax.nn.log_softmax(reference(params, split.images)), np.float64)
    np.testing.assert_array_equal(found.labels, split.labels)
    np.testing.assert_array_equal(found.predictions, log_p.argmax(-1))
    assert found.loss == pytest.approx(-log_p[np.arange(37), split.labels].mean(), rel=1e-5)
    assert found.accuracy == (log_p.argmax(-1) == split.labels).sum() / 37
    np.testing.assert_allclose(found.confidences, np.exp(log_p.max(-1)), rtol=1e-4)
    assert found.confusion.sum() == 37


def test_confusion_and_accuracy_by_class():
  labels, predictions = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 2, 2])
  log_probabilities = np.log(np.full((6, 4), 0.2, np.float32) + 0.2 * np.eye(4, dtype=np.float32)[predictions])
  result = evaluate.Evaluation(labels, log_probabilities)
  np.testing.assert_array_equal(result.confusion, [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]])
  np.testing.assert_allclose(result.per_class_accuracy, [1 / 2, 1, 2 / 3, np.nan])
  assert result.accuracy == 4 / 6
  assert result.loss == pytest.approx(-(4 * np.log(0.4) + 2 * np.log(0.2)) / 6)
  np.testing.assert_allclose(result.confidences, 0.4, rtol=1e-6)


def test_top_errors():
  probabilities = np.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]], np.float32)
  result = evaluate.Evaluation(np.array([1, 3, 0]), np.log(probabilities))
  assert [result.error(top) for top in (1, 2, 3, 4)] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 0])


def test_the_probabilities_of_an_ensemble_are_the_mean_over_its_members():
  rng = np.random.default_rng(0)
  probabilities = rng.dirichlet(np.ones(5), (7, 20)).astype(np.float32)
  labels = rng.integers(0, 5, 20)
  found = evaluate.together([evaluate.Evaluation(labels, np.log(p)) for p in probabilities])
  np.testing.assert_allclose(np.exp(found.log_probabilities), probabilities.mean(0), rtol=1e-5)
