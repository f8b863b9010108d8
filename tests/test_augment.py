import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from googlenet_jax import augment


def keys(step=0, seed=0, count=64):
  return augment.example_keys(seed, jnp.int32(step), jnp.arange(count))


@pytest.mark.parametrize('side', [8, 17, 28, 32, 96, 224])
def test_resize_equals_pil_within_one_level(side):
  images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
  ours = np.round(np.asarray(augment.prepare(jnp.asarray(images), side)) * 255)
  for image, mine in zip(images, ours, strict=True):
    theirs = Image.fromarray(image[..., 0]).resize((side, side), Image.Resampling.BILINEAR)
    assert np.abs(mine[..., 0] - np.asarray(theirs, np.float32)).max() <= 1


def test_prepare_scales_and_pads():
  out = augment.prepare(jnp.full((1, 28, 28, 1), 51, jnp.uint8), 32, padding=2)
  assert out.shape == (1, 32, 32, 1)
  np.testing.assert_allclose(out[0, 2:-2, 2:-2], 0.2, rtol=1e-6)
  assert float(out.sum()) == pytest.approx(0.2 * 28 * 28, rel=1e-5)


def test_random_shift_takes_every_offset_and_fills_with_zeros():
  image = jnp.zeros((64, 5, 5, 1)).at[:, 2, 2].set(1)
  out = np.asarray(augment.random_shift(image, 1, keys()))
  places = {(int(i), int(j)) for i, j in zip(*np.nonzero(out[..., 0])[1:], strict=True)}
  assert places == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}
  assert (out.sum((1, 2, 3)) == 1).all()


def test_random_flip_mirrors_about_half():
  image = jnp.tile(jnp.arange(4.0), (64, 4, 1))[..., None]
  out = np.asarray(augment.random_flip(image, keys()))[:, 0, :, 0]
  flipped = (out == [3, 2, 1, 0]).all(1)
  assert (flipped | (out == [0, 1, 2, 3]).all(1)).all()
  assert 16 < flipped.sum() < 48


def test_augmentation_is_a_function_of_seed_step_and_position():
  image = jax.random.uniform(jax.random.key(1), (64, 8, 8, 1))
  whole = augment.augment(image, keys(step=3), shift=2, flip=True)
  part = augment.augment(image[40:], keys(step=3)[40:], shift=2, flip=True)
  np.testing.assert_array_equal(whole[40:], part)
  assert (augment.augment(image, keys(step=4), 2, True) != whole).any()
  assert (augment.augment(image, keys(step=3, seed=1), 2, True) != whole).any()
  np.testing.assert_array_equal(augment.augment(image, keys()), image)
