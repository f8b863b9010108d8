"""Compares the grid of crops with PIL, and the mean over it with the crops one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import default
from googlenet_jax.data import augment, crops

OPTIONS = default.get_config().augment
SHAPES = [(30, 30), (30, 44)]
cut = jax.jit(crops.cut, static_argnums=4)  # compiled once for all scales and squares


def photograph(height, width):
  """A smooth colour picture with an edge in it, uint8 `[height, width, 3]`."""
  y, x = np.mgrid[:height, :width]
  waves = [np.sin(x / 7 + c) + np.cos(y / 11 - c) + (x > width / 3) for c in range(3)]
  image = np.stack(waves, -1)
  return np.uint8(255 * (image - image.min()) / np.ptp(image))


def grid_by_pil(image, scale, square, size):
  """The six crops, cut by hand."""
  height, width = image.shape[:2]
  short = min(height, width)
  lengths = [(2 * scale * n + short) // (2 * short) for n in (height, width)]
  resized = Image.fromarray(image).resize((lengths[1], lengths[0]), Image.Resampling.BILINEAR)
  top, left = ((n - scale) * square // 2 for n in lengths)
  whole = resized.crop((left, top, left + scale, top + scale))
  room, middle = scale - size, (scale - size) // 2
  corners = [(0, 0), (room, 0), (0, room), (room, room), (middle, middle)]  # x, y
  cut = [whole.crop((x, y, x + size, y + size)) for x, y in corners]
  return np.stack([np.asarray(c, np.float32) for c in [*cut, whole.resize((size, size), Image.Resampling.BILINEAR)]])


def test_scales_are_the_papers_and_in_proportion():
  assert crops.scales(224) == (256, 288, 320, 352)
  assert crops.scales(32) == (37, 41, 46, 50)


@pytest.mark.parametrize(
  'shape', [(60, 97), (97, 60), (70, 70), (300, 401)], ids=['landscape', 'portrait', 'square', 'large']
)
@pytest.mark.parametrize('square', crops.SQUARES)
def test_the_grid_equals_pils(shape, square):
  size = 64
  image = photograph(*shape)
  canvas = np.full((420, 420, 3), 255, np.uint8)  # pixels beside the image must not be seen
  canvas[: shape[0], : shape[1]] = image
  for scale in crops.scales(size):
    ours = cut(np.float32(canvas[None]) / 255, np.array([shape]), scale, square, size)
    theirs = grid_by_pil(image, scale, square, size)
    assert ours.shape == (6, 1, size, size, 3)
    # PIL rounds to whole levels after each resizing.
    assert np.abs(255 * np.asarray(ours[:, 0]) - theirs).max() < 2.5


def network(image):
  """A function that is not linear and changes when an image is mirrored."""
  means = image.reshape(image.shape[0], 4, image.shape[1] // 4, 4, -1).mean((2, 4))
  return jnp.tanh(means.reshape(image.shape[0], -1) @ jax.random.normal(jax.random.key(0), (16, 10))) * 8


def explicit(image, squares, size, taken=6):
  """The number of crops, and the mean over them, computed one by one."""
  probabilities = []
  for scale in crops.scales(size) if taken == 6 else crops.scales(size)[:1]:
    for square in squares:
      sizes = np.full((len(image), 2), image.shape[1:3], np.int32)
      for crop in np.asarray(cut(np.float32(image) / 255, sizes, scale, square, size))[:taken]:
        probabilities += [softmax(crop), softmax(crop[:, :, ::-1])]
  return len(probabilities), np.mean(probabilities, axis=0)


softmax = jax.jit(lambda image: jax.nn.softmax(network(image)))


@functools.partial(jax.jit, static_argnames='count')
def log_probabilities(batch, count):
  return crops.log_probabilities(network, batch, count, 32, OPTIONS)


def images(shape):
  return np.random.default_rng(0).integers(0, 256, (3, *shape, 1)).astype(np.uint8)


@pytest.mark.parametrize(('count', 'squares'), [(144, crops.SQUARES), (10, [crops.MIDDLE])])
@pytest.mark.parametrize('shape', SHAPES)
def test_the_mean_covers_all_crops(count, squares, shape):
  image = images(shape)
  taken, expected = explicit(image, squares, 32, 6 if count == 144 else 5)
  assert taken == count
  found = log_probabilities({'image': image}, count)
  np.testing.assert_allclose(np.exp(found), expected, rtol=1e-4)
  np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-5)


def test_square_images_have_48_different_crops():
  assert len(crops.squares(144, 32, square_images=True)) * crops.VIEWS[144] * 2 == 48
  assert len(crops.squares(144, 32, square_images=False)) * crops.VIEWS[144] * 2 == 144


def test_one_crop_is_the_middle_of_the_resized_image():
  image = photograph(60, 97)[None]
  options = default.get_config().augment
  options.resize = 256 / 224
  flat = lambda x: x.reshape(1, -1)
  found = jax.jit(lambda image: crops.log_probabilities(flat, {'image': image}, 1, 56, options))(image)
  expected = grid_by_pil(image[0], 64, 1, 56)[4] / 255
  expected = jax.nn.log_softmax(expected.reshape(1, -1))
  np.testing.assert_allclose(found, expected, atol=0.01)


@pytest.mark.parametrize('padding', [0, 3])
def test_six_views_are_mirrored_and_shifted_by_one_pixel(padding):
  image = images((20, 25))
  options = default.get_config().augment
  options.padding = padding
  found = jax.jit(lambda image: crops.log_probabilities(network, {'image': image}, 6, 32, options))(image)
  whole = np.asarray(augment.prepare(image, 32, padding))
  up_left, down_right = np.zeros_like(whole), np.zeros_like(whole)
  up_left[:, :-1, :-1] = whole[:, 1:, 1:]
  down_right[:, 1:, 1:] = whole[:, :-1, :-1]
  views = [view for shifted in (whole, up_left, down_right) for view in (shifted, shifted[:, :, ::-1])]
  np.testing.assert_array_equal(crops.shifted(whole), views[::2])
  np.testing.assert_allclose(np.exp(found), np.mean([softmax(view) for view in views], axis=0), rtol=1e-5)


def test_each_number_has_a_name():
  assert [crops.NAMES[count] for count in crops.COUNTS] == ['1 crop', '6 views', '10 crops', '144 crops']
  assert [crops.label(count) for count in crops.COUNTS] == ['1', '6 views', '10', '144']
  assert [crops.distinct(count, 32, square_images=True) for count in crops.COUNTS] == [1, 6, 10, 48]
  assert [crops.distinct(count, 32, square_images=False) for count in crops.COUNTS] == [1, 6, 10, 144]


def test_memory_is_bounded_by_the_batch():
  assert crops.batch_size(256, 1, 1) == 256
  assert crops.batch_size(256, 6, 1) == 42  # times 6 views
  assert crops.batch_size(256, 144, 1) == 21  # times 12 crops of a square
  assert crops.batch_size(256, 144, 8) == 16
  assert crops.batch_size(8, 144, 8) == 8


def test_a_canvas_does_not_change_the_result():
  image = images(SHAPES[1])
  canvas = np.full((3, 50, 50, 1), 255, np.uint8)
  canvas[:, :30, :44] = image
  laid = {'image': canvas, 'size': np.full((3, 2), [30, 44], np.int32)}
  for count in crops.COUNTS:
    found, expected = log_probabilities(laid, count), log_probabilities({'image': image}, count)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_floating_point_images_give_the_same_crops():
  image = images(SHAPES[0])
  for count in crops.COUNTS:
    found = log_probabilities({'image': np.float32(image) / 255}, count)
    np.testing.assert_allclose(found, log_probabilities({'image': image}, count), atol=1e-5)


def test_an_unknown_number_of_crops_is_named():
  with pytest.raises(ValueError, match='11 crops per image are unknown: choose from 1, 6, 10, 144'):
    crops.squares(11, 32, True)
