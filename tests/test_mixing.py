"""CutMix and mixup against NumPy, from the same random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_config
from scipy.stats import beta, kstest

from googlenet_jax.data import mixing, random_keys
from googlenet_jax.host import sharding

cutmix = jax.jit(mixing.cutmix, static_argnums=1)
mixup = jax.jit(mixing.mixup, static_argnums=1)


def keys(count, step=0):
  return random_keys.example_keys(0, jnp.int32(step), jnp.arange(count))


def images(count, height=12, width=20, channels=2):
  return np.random.default_rng(0).random((count, height, width, channels), np.float32)


def numbers(stream_keys, count):
  """The uniform numbers that each key gives, float32 `[B, count]`."""
  return np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (count,)))(stream_keys))


def test_cutmix_equals_a_loop_over_pixels():
  image, count, probability = images(64), 64, 0.7
  found, weight = cutmix(image, probability, keys(count))
  expected, weights = image.copy(), np.ones(count)
  for i, (use, area, row, column) in enumerate(numbers(keys(count), 4)):
    if use >= probability:
      continue
    tall, wide = np.sqrt(area) * 12, np.sqrt(area) * 20
    pasted = 0
    for y in range(12):
      for x in range(20):
        if abs(y + 0.5 - row * 12) < tall / 2 and abs(x + 0.5 - column * 20) < wide / 2:
          expected[i, y, x] = image[(i + 1) % count, y, x]
          pasted += 1
    weights[i] = 1 - pasted / 240
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_allclose(weight, weights, atol=1e-6)
  assert 0.5 < (weights < 1).mean() < 0.9


def test_the_weight_counts_the_pixels_that_are_left():
  """Of images that are all zeros or all ones in turn."""
  count = 512
  image = np.zeros((count, 28, 28, 1), np.float32)
  image[1::2] = 1
  found, weight = cutmix(image, 1.0, keys(count))
  kept = (np.asarray(found) == image).mean((1, 2, 3))
  np.testing.assert_allclose(weight, kept, atol=1e-6)


def test_rectangles_have_their_share_and_their_centre():
  """Far from the edges nothing is cut off: then the share is uniform, as in the paper with alpha = 1."""
  count, side = 4096, 64
  image = np.zeros((count, side, side, 1), np.float32)
  image[1::2] = 1
  found, weight = cutmix(image, 1.0, keys(count))
  _, area, row, column = numbers(keys(count), 4).T
  half = np.sqrt(area) / 2
  inside = (np.minimum(row, column) > half) & (np.maximum(row, column) < 1 - half)
  np.testing.assert_allclose(1 - np.asarray(weight)[inside], area[inside], atol=2 * 8 / side)
  for uniform in (area, row, column):
    assert kstest(uniform, 'uniform').pvalue > 1e-3
  pasted = (np.asarray(found) != image)[..., 0]
  for mask in pasted[:200]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows):
      assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # a rectangle
  # A rectangle may be cut off at an edge, so more than half of the image is left on average.
  assert 0.6 < float(weight.mean()) < 0.75


@pytest.mark.parametrize('probability', [0.0, 0.25, 1.0])
def test_cutmix_has_its_probability(probability):
  _, weight = cutmix(images(2048, 16, 16, 1), probability, keys(2048))
  # A rectangle may be smaller than a pixel.
  assert abs((np.asarray(weight) < 1).mean() - probability) < 0.04


def test_mixup_blends_with_the_next_image():
  image = images(16)
  found, weight = mixup(image, 0.4, keys(16))
  w = np.asarray(weight, np.float64)[:, None, None, None]
  np.testing.assert_allclose(found, w * image + (1 - w) * np.roll(image, -1, axis=0), atol=1e-6)
  assert len(set(np.asarray(weight).tolist())) == 16  # one weight for each image


@pytest.mark.parametrize('alpha', [0.05, 0.2, 0.5, 1.0, 4.0, 1e4])
def test_weights_of_mixup_have_the_beta_distribution(alpha):
  weight = np.asarray(jax.jit(jax.vmap(lambda key: mixing.symmetric_beta(key, alpha)))(keys(8192)), np.float64)
  assert np.isfinite(weight).all()
  assert weight.min() >= 0
  assert weight.max() <= 1
  near = 1e-5  # where float32 cannot tell 1 - x from 1
  for share in (np.minimum(weight, 1 - weight), weight):
    assert abs((share < 0.1).mean() - (beta.cdf(0.1, alpha, alpha) * (2 if share.max() <= 0.5 else 1))) < 0.02
  middle = weight[(weight > near) & (weight < 1 - near)]
  low, high = beta.cdf([near, 1 - near], alpha, alpha)
  assert kstest((beta.cdf(middle, alpha, alpha) - low) / (high - low), 'uniform').pvalue > 1e-3


def test_extreme_random_numbers_give_numbers(monkeypatch):
  for alpha in (1e-3, 0.2, 1.0, 1e3):
    for radius in (0.0, 1e-38, 1 - 2**-24):
      for angle in (0.0, 0.25, 0.5, 1 - 2**-24):
        monkeypatch.setattr(jax.random, 'uniform', lambda *_, r=radius, a=angle: jnp.array([r, a], jnp.float32))
        found = float(mixing.symmetric_beta(None, alpha))
        assert 0 <= found <= 1


def test_a_recipe_without_mixing_mixes_nothing():
  image = images(4)
  found, weight = mixing.mix(image, keys(4), small_config().augment)
  assert found is image
  assert weight is None


MIXED = {'augment.shift': 2, 'augment.erasing': 0.5, 'augment.alternating_flip': True}


@pytest.mark.parametrize('mixed', [{'augment.cutmix': 0.5}, {'augment.mixup': 0.3}])
@pytest.mark.parametrize('devices', [2, 4])
def test_several_devices_mix_as_one(mixed, devices, mesh_of):
  config = small_config(**MIXED, **mixed)
  images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
  batch = {'image': images, 'label': np.arange(16, dtype=np.int32) % 10, 'mirrored': np.arange(16) % 3 == 0}

  def results(mesh):
    cut = sharding.cut(mesh)
    program = jax.jit(lambda batch: mixing.training_input(batch, keys(16), config), in_shardings=cut, out_shardings=cut)
    return jax.device_get(program(sharding.shard_batch(batch, mesh)))

  for one, many in zip(results(mesh_of(1)), results(mesh_of(devices)), strict=True):
    np.testing.assert_allclose(one, many, atol=1e-6)


def test_mixing_is_a_function_of_seed_step_and_position_and_follows_the_augmentation():
  """Each image's own augmentation first: what is pasted was augmented with the other image's keys."""
  config = small_config(**{**MIXED, 'augment.cutmix': 1.0})
  plain = small_config(**MIXED)
  batch = {'image': np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8), 'mirrored': np.ones(8, bool)}
  see = lambda config, step: jax.jit(lambda: mixing.training_input(batch, keys(8, step), config))()
  (mixed, weight), (alone, none) = see(config, 5), see(plain, 5)
  assert none is None
  own, other = np.isclose(mixed, alone, atol=1e-6), np.isclose(mixed, np.roll(alone, -1, axis=0), atol=1e-6)
  assert (own | other).all()
  assert (own.mean((1, 2, 3)) >= np.asarray(weight) - 1e-6).all()
  assert (np.asarray(see(config, 6)[1]) != np.asarray(weight)).any()
