import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.stats import kstest, uniform

from configs import default
from googlenet_jax.data import augment, colour, random_keys


@functools.partial(jax.jit, static_argnames='count')
def keys(step=0, seed=0, count=64):
  return random_keys.example_keys(seed, jnp.int32(step), jnp.arange(count))


prepare = jax.jit(augment.prepare, static_argnames=('image_size', 'padding', 'resize'))
random_crop = jax.jit(augment.random_crop, static_argnames=('out', 'min_area', 'max_aspect', 'random_kernel'))
photometric = jax.jit(colour.photometric, static_argnames='strength')
random_erasing = jax.jit(augment.random_erasing, static_argnames='probability')


@pytest.mark.parametrize('side', [8, 17, 28, 32, 96, 224])
def test_resize_equals_pil_within_one_level(side):
  images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
  ours = np.round(np.asarray(prepare(images, side)) * 255)
  for image, mine in zip(images, ours, strict=True):
    theirs = Image.fromarray(image[..., 0]).resize((side, side), Image.Resampling.BILINEAR)
    assert np.abs(mine[..., 0] - np.asarray(theirs, np.float32)).max() <= 1


def test_prepare_scales_and_pads():
  out = prepare(jnp.full((1, 28, 28, 1), 51, jnp.uint8), 32, padding=2)
  assert out.shape == (1, 32, 32, 1)
  np.testing.assert_allclose(out[0, 2:-2, 2:-2], 0.2, rtol=1e-6)
  assert float(out.sum()) == pytest.approx(0.2 * 28 * 28, rel=1e-5)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, jnp.bfloat16, np.float64])
def test_floating_point_images_are_in_0_to_1_already(dtype):
  image = np.random.default_rng(0).integers(0, 256, (2, 30, 20, 3)).astype(np.uint8)
  exact = (image / np.float32(255)).astype(dtype)
  found = augment.to_float(exact)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, exact.astype(np.float32))
  if dtype == np.float32:
    np.testing.assert_allclose(prepare(exact, 16), prepare(image, 16), rtol=1e-6)


def test_random_shift_takes_every_offset_and_fills_with_zeros():
  image = np.zeros((64, 5, 5, 1), np.float32)
  image[:, 2, 2] = 1
  out = np.asarray(jax.jit(augment.random_shift, static_argnums=1)(image, 1, keys()))
  places = {(int(i), int(j)) for i, j in zip(*np.nonzero(out[..., 0])[1:], strict=True)}
  assert places == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}
  assert (out.sum((1, 2, 3)) == 1).all()


def test_random_flip_mirrors_about_half():
  image = np.tile(np.arange(4.0, dtype=np.float32), (64, 4, 1))[..., None]
  out = np.asarray(jax.jit(augment.random_flip)(image, keys()))[:, 0, :, 0]
  flipped = (out == [3, 2, 1, 0]).all(1)
  assert (flipped | (out == [0, 1, 2, 3]).all(1)).all()
  assert 16 < flipped.sum() < 48


def alternating(seed, index, epoch):
  return np.asarray(
    jax.jit(augment.alternating_mirror)(jnp.int32(seed), jnp.asarray(index, jnp.int32), jnp.int32(epoch))
  )


def test_alternating_mirroring_shows_every_image_both_ways_in_two_epochs():
  index = np.arange(4096)
  epochs = [alternating(3, index, epoch) for epoch in range(4)]
  assert epochs[0].dtype == bool
  np.testing.assert_array_equal(epochs[1], ~epochs[0])
  np.testing.assert_array_equal(epochs[2], epochs[0])
  np.testing.assert_array_equal(epochs[3], epochs[1])
  assert abs(epochs[0].mean() - 0.5) < 0.03
  assert abs((epochs[0] == alternating(4, index, 0)).mean() - 0.5) < 0.03  # another seed
  order = np.random.default_rng(0).permutation(4096)[:100]  # by the image, not by its position in a batch
  np.testing.assert_array_equal(alternating(3, order, 1), epochs[1][order])


def test_alternating_mirroring_in_the_augmentation():
  options = default.get_config().augment
  image = np.random.default_rng(1).integers(0, 256, (8, 8, 8, 1), np.uint8)
  mirrored = np.arange(8) % 3 == 0
  see = jax.jit(lambda image, mirrored: augment.augment(image, keys(count=8), 8, options, mirrored=mirrored))
  options.alternating_flip = True
  expected = np.where(mirrored[:, None, None, None], image[:, :, ::-1], image) / np.float32(255)
  np.testing.assert_allclose(see(image, mirrored), expected, atol=1e-6)


def test_keys_of_images_are_no_keys_of_steps():
  data = lambda keys: {tuple(key) for key in np.asarray(jax.random.key_data(keys))}
  images = data(random_keys.image_keys(0, jnp.arange(64)))
  assert len(images) == 64
  for step in (0, 1, 2**31 - 1):
    assert not images & data(random_keys.example_keys(0, jnp.int32(step), jnp.arange(64)))


def test_augmentation_is_a_function_of_seed_step_and_position():
  options = default.get_config().augment
  image = np.random.default_rng(1).integers(0, 256, (64, 8, 8, 3), np.uint8)

  see = jax.jit(lambda image, keys: augment.augment(image, keys, 8, options))
  np.testing.assert_allclose(see(image, keys()), image.astype(np.float32) / 255, atol=1e-6)
  everything = {'shift': 2, 'flip': True, 'min_area': 0.3, 'photometric': 0.5, 'erasing': 0.5}
  options.update(everything | {'random_interpolation': True})
  see = jax.jit(lambda image, keys: augment.augment(image, keys, 8, options))
  whole = see(image, keys(step=3))
  np.testing.assert_allclose(see(image[40:], keys(step=3)[40:]), whole[40:], atol=1e-6)
  assert (see(image, keys(step=4)) != whole).any()
  assert (see(image, keys(step=3, seed=1)) != whole).any()
  assert whole.min() >= 0
  assert whole.max() <= 1


# Training samples of the paper ---------------------------------------------------------------------------------------


def boxes(height, width, count=4096, **options):
  """Extent and centre of random crops, read from pictures of their own coordinates; 'linear' keeps straight lines."""
  y, x = np.mgrid[:height, :width] + 0.5
  image = jnp.asarray(np.stack([y / height, x / width], -1), jnp.float32)[None].repeat(count, 0)
  crop = jax.jit(lambda image, keys: augment.random_crop(image, 16, keys, random_kernel=False, **options))
  out = np.asarray(crop(image, keys(count=count)), np.float64) * [height, width]
  # The outermost pixels of the result may lie at the border, where interpolation lacks neighbours.
  tall, wide = (
    np.abs(out[:, 12, 8, 0] - out[:, 3, 8, 0]) * 16 / 9,
    np.abs(out[:, 8, 12, 1] - out[:, 8, 3, 1]) * 16 / 9,
  )
  return tall, wide, out[:, 7:9, 7:9].mean((1, 2))


def test_random_crops_have_the_papers_distribution():
  tall, wide, centre = boxes(40, 60, min_area=0.08, max_aspect=4 / 3)
  rng = np.random.default_rng(0)
  area, aspect = rng.uniform(0.08, 1, 20000), np.exp(rng.uniform(-np.log(4 / 3), np.log(4 / 3), 20000))
  fits = (np.sqrt(area * 2400 / aspect) <= 40) & (np.sqrt(area * 2400 * aspect) <= 60)
  assert kstest(tall * wide / 2400, area[fits]).pvalue > 1e-3
  assert kstest(np.log(wide / tall), np.log(aspect[fits])).pvalue > 1e-3
  for axis, size, extent in ((0, 40, tall), (1, 60, wide)):
    place = (centre[:, axis] - extent / 2) / (size - extent)
    assert kstest(place[size - extent > 2], 'uniform').pvalue > 1e-3


def test_a_box_that_never_fits_is_the_largest_in_the_middle():
  tall, wide, centre = boxes(20, 200, count=8, min_area=0.9, max_aspect=4 / 3)
  np.testing.assert_allclose(tall, 20, rtol=0.01)  # shrunk lines are straight only nearly
  np.testing.assert_allclose(wide, 20 * 4 / 3, rtol=0.01)
  np.testing.assert_allclose(centre, [[10, 100]] * 8, rtol=0.01)


def test_random_crops_see_only_the_image_on_its_canvas():
  image = np.ones((64, 40, 40, 1), np.float32)
  image[:, :9, :13] = 0.25
  sizes = np.full((64, 2), [9, 13], np.int32)
  out = random_crop(image, 8, keys(), sizes)
  np.testing.assert_allclose(out, 0.25, rtol=1e-5)


def test_random_interpolation_takes_all_kernels():
  image = jnp.asarray(np.random.default_rng(0).random((1, 12, 12, 1), np.float32)).repeat(64, 0)
  same = keys()[np.zeros(64, int)]
  one = random_crop(image, 16, same, min_area=0.5)
  assert len({np.asarray(o).tobytes() for o in one}) == 1
  # Four equally likely kernels: the chance that 64 images miss one is 4e-8.
  whole = random_crop(image, 16, keys(), min_area=1.0, max_aspect=1.0)
  assert len({np.round(np.asarray(o), 3).tobytes() for o in whole}) == 4


@pytest.mark.parametrize('name', ['Brightness', 'Contrast', 'Color'])
def test_photometric_distortions_are_pils(name):
  image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
  enhance = getattr(ImageEnhance, name)(Image.fromarray(image))
  operation = ['Brightness', 'Contrast', 'Color'].index(name)
  for factor in (0.6, 1.0, 1.4):
    ours = jax.jit(colour.enhance)(np.float32(image) / 255, operation, factor)
    assert np.abs(255 * np.asarray(ours) - np.asarray(enhance.enhance(factor), np.float32)).max() < 1.5


def test_photometric_strength_and_grey_images():
  image = jnp.full((512, 4, 4, 1), 0.5)
  out = np.asarray(photometric(image, 0.5, keys(count=512)))
  assert kstest(out[:, 0, 0, 0], uniform(0.25, 0.5).cdf).pvalue > 1e-3  # only brightness changes a flat grey image
  np.testing.assert_allclose(photometric(image, 0.0, keys(count=512)), image)


def test_photometric_distortions_come_in_any_order_and_with_the_light():
  image = jnp.broadcast_to(jnp.array([[[0.2, 0.5, 0.6], [0.5, 0.4, 0.3]]]), (256, 1, 2, 3))
  out = np.asarray(photometric(image, 0.5, keys(count=256)))

  @jax.jit
  @jax.vmap
  def in_all_orders(key):
    factors = jax.random.uniform(jax.random.fold_in(key, 0), (3,), minval=0.5, maxval=1.5)
    pictures = []
    for order in itertools.permutations(range(3)):
      picture = image[0]
      for operation in order:
        picture = colour.enhance(picture, jnp.int32(operation), factors[operation])
      pictures.append(colour.light(picture[None], 0.1, jax.random.fold_in(key, 2)[None])[0])
    return jnp.stack(pictures)

  found = np.isclose(in_all_orders(keys(count=256)), out[:, None], atol=1e-5).all((2, 3, 4))  # image, order
  assert found.any(axis=1).all()
  assert found.any(axis=0).all()


def test_light_is_coloured_by_the_principal_components():
  image = jnp.full((2048, 2, 2, 3), 0.5)
  out = np.asarray(jax.jit(colour.light)(image, 0.1, keys(count=2048)))[:, 0, 0] - 0.5
  light = np.array(colour.LIGHT)
  np.testing.assert_allclose(np.cov(out.T), 0.01 * light @ light.T, atol=3e-5)


def test_random_erasing_has_its_probability_and_area():
  image = jnp.full((2048, 24, 24, 1), -1.0)
  out = np.asarray(random_erasing(image, 0.5, keys(count=2048)))[..., 0]
  share = (out >= 0).mean((1, 2))
  assert abs((share > 0).mean() - 0.5) < 0.04
  erased = share[share > 0]
  assert erased.max() < 0.45
  assert abs(np.median(erased) - 0.21) < 0.03  # uniform in [0.02, 0.4]


def test_random_erasing_has_its_shape_and_place():
  side, count = 64, 1024
  out = np.asarray(random_erasing(jnp.full((count, side, side, 1), -1.0), 1.0, keys(count=count)))[..., 0]
  erased, found = out >= 0, []
  for mask in erased:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # a rectangle
    found.append((len(rows), len(columns), rows[0], columns[0]))
  tall, wide, top, left = np.array(found).T
  rng = np.random.default_rng(0)
  area, ratio = rng.uniform(0.02, 0.4, 10_000), np.exp(rng.uniform(np.log(0.3), -np.log(0.3), 10_000))
  expected = np.minimum(np.sqrt(area * ratio), 1) / np.minimum(np.sqrt(area / ratio), 1)
  assert kstest(np.log(tall / wide), np.log(expected)).pvalue > 1e-3
  for first, extent in ((top, tall), (left, wide)):
    room = side - extent
    assert kstest(((first + rng.random(count)) / (room + 1))[room > 8], 'uniform').pvalue > 1e-3
