"""Turns stored images into the network's input, on the device and inside the jitted step.

Each example has its own random key; see `random_keys`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from googlenet_jax.data import colour, random_keys, resample

CROP_TRIES = 10


def resized_lengths(sizes: jax.Array, short: int | jax.Array) -> jax.Array:
  """Returns height and width after resizing the shorter side to `short` pixels, rounded to the nearest pixel.

  Args:
    sizes: int32 `[.., 2]`, height and width in pixels.
    short: length of the shorter side in pixels.

  Returns:
    int32 `[.., 2]`; halves are rounded up.
  """
  least = sizes.min(-1, keepdims=True)
  return (2 * short * sizes + least) // (2 * least)


def full_sizes(image: jax.Array) -> jax.Array:
  """Returns int32 `[B, 2]`: height and width of images that fill `[B, H, W, C]`."""
  return jnp.full((image.shape[0], 2), jnp.array(image.shape[1:3], jnp.int32))


def pad(image: jax.Array, padding: int) -> jax.Array:
  """Adds `padding` pixels of zeros to each side of `[B, H, W, C]`."""
  return jnp.pad(image, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def to_float(image: jax.Array) -> jax.Array:
  """Returns float32 images in [0, 1]: uint8 is divided by 255, floating point must be in [0, 1] already."""
  if jnp.issubdtype(image.dtype, jnp.floating):
    return image.astype(jnp.float32)
  return image.astype(jnp.float32) / 255


def prepare(
  image: jax.Array, image_size: int, padding: int = 0, sizes: jax.Array | None = None, resize: float = 1.0
) -> jax.Array:
  """Prepares images for evaluation: scales to [0, 1], resizes, cuts out the middle and pads with zeros.

  The shorter side becomes `resize` times the side of the result. Resizing is bilinear, with half-pixel centres and
  antialiasing as in PIL. With `resize=1` the result shows a square image whole; the paper has 256 / 224.

  Args:
    image: uint8 `[B, H, W, C]`, or floating point in [0, 1].
    image_size: side of the result in pixels.
    padding: pixels of zeros on each side, included in `image_size`.
    sizes: int32 `[B, 2]`, height and width of each image in the upper left of the canvas; None if all fill it.
    resize: at least 1.

  Returns:
    float32 `[B, image_size, image_size, C]` in [0, 1].
  """
  height, width = image.shape[1:3]
  side = image_size - 2 * padding
  image = to_float(image)
  if sizes is not None or (height, width) != (side, side) or resize > 1:
    sizes = jnp.array((height, width)) if sizes is None else sizes
    lengths = resized_lengths(sizes, round(resize * side))
    matrices = []
    for axis, canvas in enumerate((height, width)):
      size, ratio = sizes[..., axis], sizes[..., axis] / lengths[..., axis]
      offset = (lengths[..., axis] - side) // 2
      matrices.append(resample.sampling_matrix(offset * ratio, side * ratio, size, side, canvas))
    image = resample.resample(image, *matrices)
  return pad(image, padding)


def seen(size: np.ndarray, image_size: int, padding: int = 0, resize: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
  """Returns which part of an image `prepare` turns into the network's input.

  Args:
    size: int `[2]`, height and width of the image in pixels.
    image_size: see `prepare`.
    padding: see `prepare`; the padding belongs to the part, so that can reach beyond the image.
    resize: see `prepare`.

  Returns:
    Upper left corner and extent, float `[2]` each, in pixels of the image: (row, column) and (height, width).
  """
  side = image_size - 2 * padding
  lengths = resized_lengths(size, round(resize * side))
  ratio = size / lengths
  return ((lengths - side) // 2 - padding) * ratio, image_size * ratio


def random_shift(image: jax.Array, most: int, keys: jax.Array) -> jax.Array:
  """Moves each image by whole pixels, uniform in [-most, most] on each axis, and fills with zeros.

  Args:
    image: `[B, H, W, C]`.
    most: largest shift in pixels.
    keys: typed keys `[B]`.

  Returns:
    `[B, H, W, C]`.
  """
  padded = jnp.pad(image, ((0, 0), (most, most), (most, most), (0, 0)))

  def crop(image_, key):
    top, left = jax.random.randint(key, (2,), 0, 2 * most + 1)
    return lax.dynamic_slice(image_, (top, left, 0), image.shape[1:])

  return jax.vmap(crop)(padded, keys)


def random_flip(image: jax.Array, keys: jax.Array) -> jax.Array:
  """Mirrors each image left to right with probability 1/2.

  Args:
    image: `[B, H, W, C]`.
    keys: typed keys `[B]`.

  Returns:
    `[B, H, W, C]`.
  """
  return mirror(image, jax.vmap(jax.random.bernoulli)(keys))


def mirror(image: jax.Array, mirrored: jax.Array) -> jax.Array:
  """Mirrors those images of `[B, H, W, C]` left to right for which `mirrored`, bool `[B]`, is true."""
  return jnp.where(mirrored[:, None, None, None], image[:, :, ::-1], image)


def alternating_mirror(seed: jax.Array, index: jax.Array, epoch: jax.Array) -> jax.Array:
  """Decides which images are mirrored in an epoch: each in every second epoch, half of all in each epoch.

  Two epochs in a row show every image both ways; random mirroring shows half of them the same way twice. Which epoch
  comes first is random for each image.

  Source: Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024, arXiv:2404.00498.

  Args:
    seed: int32 scalar, seed of the run.
    index: int32 `[B]`, indices of the images in the training split.
    epoch: int32 scalar, number of whole epochs before this one.

  Returns:
    bool `[B]`.
  """
  keys = random_keys.stream(random_keys.image_keys(seed, index), random_keys.ALTERNATING)
  return jax.vmap(jax.random.bernoulli)(keys) ^ (epoch % 2 == 1)


def with_mirrored(batch: dict[str, jax.Array], seed: jax.Array, epoch: jax.Array, options: Any) -> dict[str, jax.Array]:
  """Adds `mirrored` from `alternating_mirror` to a batch with `index`, if the recipe has `alternating_flip`.

  Args:
    batch: `index` int32 `[B]`, and the other arrays of a training batch.
    seed: int32 scalar, seed of the run.
    epoch: int32 scalar, number of whole epochs before this one.
    options: `augment` part of a recipe.

  Returns:
    The batch, with `mirrored` bool `[B]` or unchanged.
  """
  if not options.alternating_flip:
    return batch
  return {**batch, 'mirrored': alternating_mirror(seed, batch['index'], epoch)}


def random_crop(
  image: jax.Array,
  out: int,
  keys: jax.Array,
  sizes: jax.Array | None = None,
  min_area: float = 0.08,
  max_aspect: float = 4 / 3,
  random_kernel: bool = True,
) -> jax.Array:
  """Cuts a random part out of each image and resizes it: the training samples of the paper (section 6).

  Args:
    image: float32 `[B, H, W, C]`.
    out: side of the result in pixels.
    keys: typed keys `[B]`.
    sizes: see `prepare`.
    min_area: see `_draw_box`.
    max_aspect: see `_draw_box`.
    random_kernel: resize with a random one of `resample.KERNELS`, as in the paper; otherwise with 'linear'.

  Returns:
    float32 `[B, out, out, C]`, clipped to [0, 1] because cubic interpolation can leave it.
  """
  sizes = full_sizes(image) if sizes is None else sizes

  def draw(key, size):
    box_key, place_key, kernel_key = jax.random.split(key, 3)
    corner, extent = _draw_box(box_key, place_key, size, min_area, max_aspect)
    kernel = jax.random.randint(kernel_key, (), 0, len(resample.KERNELS)) if random_kernel else jnp.int32(0)
    return corner, extent, kernel

  corners, extents, kernels = jax.vmap(draw)(keys, sizes)
  kernel = kernels if random_kernel else 0
  rows, columns = (
    resample.sampling_matrix(corners[:, i], extents[:, i], sizes[:, i], out, image.shape[1 + i], kernel) for i in (0, 1)
  )
  return jnp.clip(resample.resample(image, rows, columns), 0, 1)


def _draw_box(
  box_key: jax.Array, place_key: jax.Array, size: jax.Array, min_area: float, max_aspect: float
) -> tuple[jax.Array, jax.Array]:
  """Draws a random box in an image. Boxes are not rounded to whole pixels.

  The share of the area is uniform in [min_area, 1], the ratio of width to height log-uniform in [1 / max_aspect,
  max_aspect], the place uniform. A box that does not fit is drawn again, CROP_TRIES times at most. If none fits, the
  box is the largest centred one with an allowed ratio.

  Args:
    box_key: typed key for the area and the ratio.
    place_key: typed key for the place.
    size: int32 `[2]`, height and width of the image in pixels.
    min_area: smallest share of the image's area, above 0.
    max_aspect: largest ratio of a longer to a shorter side, at least 1.

  Returns:
    Upper left corner and extent, float32 `[2]` each, in pixels: (row, column) and (height, width).
  """
  height, width = size[0].astype(jnp.float32), size[1].astype(jnp.float32)
  u = jax.random.uniform(box_key, (CROP_TRIES, 2))
  area = (min_area + (1 - min_area) * u[:, 0]) * height * width
  aspect = max_aspect ** (2 * u[:, 1] - 1)
  tall, wide = jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)
  fits = (tall <= height) & (wide <= width)
  first = fits.argmax()
  whole = jnp.clip(width / height, 1 / max_aspect, max_aspect)
  tall = jnp.where(fits.any(), tall[first], jnp.minimum(height, width / whole))
  wide = jnp.where(fits.any(), wide[first], jnp.minimum(width, height * whole))
  room = jnp.stack([height - tall, width - wide])
  corner = room * jnp.where(fits.any(), jax.random.uniform(place_key, (2,)), 0.5)
  return corner, jnp.stack([tall, wide])


def random_erasing(image: jax.Array, probability: float, keys: jax.Array) -> jax.Array:
  """Fills a random rectangle of an image with noise, with a given probability.

  The share of the area lies in [0.02, 0.4], the ratio of height to width in [0.3, 1 / 0.3], the noise in [0, 1], as in
  the source. All are uniform there, and a rectangle that does not fit is drawn again. Here the ratio is log-uniform:
  tall and wide rectangles are equally likely. A side longer than the image is cut to the image.

  Source: Zhong et al., "Random erasing data augmentation", 2017, arXiv:1708.04896.

  Args:
    image: float32 `[B, H, W, C]`.
    probability: chance that an image is erased, in [0, 1].
    keys: typed keys `[B]`.

  Returns:
    float32 `[B, H, W, C]`.
  """
  height, width = image.shape[1:3]

  def one(image, key):
    key, noise_key = jax.random.split(key)
    erase, area, aspect, top, left = jax.random.uniform(key, (5,))
    area, aspect = (0.02 + 0.38 * area) * height * width, 0.3 ** (2 * aspect - 1)
    tall, wide = jnp.minimum(jnp.sqrt(area * aspect), height), jnp.minimum(jnp.sqrt(area / aspect), width)
    top, left = top * (height - tall), left * (width - wide)
    rows, columns = jnp.arange(height) + 0.5, jnp.arange(width) + 0.5
    inside = ((rows >= top) & (rows < top + tall))[:, None] & ((columns >= left) & (columns < left + wide))
    noise = jax.random.uniform(noise_key, image.shape)
    return jnp.where((erase < probability) & inside[..., None], noise, image)

  return jax.vmap(one)(image, keys)


def augment(
  image: jax.Array,
  keys: jax.Array,
  image_size: int,
  options: Any,
  sizes: jax.Array | None = None,
  mirrored: jax.Array | None = None,
) -> jax.Array:
  """Changes each image of a training batch at random. `mixing.training_input` calls it and then mixes images.

  Args:
    image: uint8 `[B, H, W, C]`, or floating point in [0, 1].
    keys: typed keys `[B]`; each transformation uses its own stream.
    image_size: side of the result in pixels.
    options: `augment` part of a recipe.
    sizes: see `prepare`.
    mirrored: bool `[B]` from `alternating_mirror`, needed if the recipe has `alternating_flip`.

  Returns:
    float32 `[B, image_size, image_size, C]` in [0, 1].
  """
  use = lambda number: random_keys.stream(keys, number)
  side = image_size - 2 * options.padding
  if options.min_area < 1:
    image = random_crop(
      to_float(image),
      side,
      use(random_keys.CROP),
      sizes,
      options.min_area,
      options.max_aspect,
      options.random_interpolation,
    )
  else:
    image = prepare(image, side, sizes=sizes, resize=options.resize)
  if options.photometric:
    image = colour.photometric(image, options.photometric, use(random_keys.PHOTOMETRIC))
  image = pad(image, options.padding)
  if options.shift:
    image = random_shift(image, options.shift, use(random_keys.SHIFT))
  if options.flip:
    image = random_flip(image, use(random_keys.FLIP))
  if options.alternating_flip:
    image = mirror(image, mirrored)
  if options.erasing:
    image = random_erasing(image, options.erasing, use(random_keys.ERASING))
  return image
