"""Several views of each image at test time, cut on the device: the paper's 144, 10 or 1 crops (section 7), or 6 views.

144 crops: the shorter side is resized to 256, 288, 320 and 352 pixels, for a network of 224. Each resized image gives
three squares: left, middle and right, or upper, middle and lower in a portrait. Each square gives six crops at the
network's size: four corners, the middle, and the whole square resized. All are also mirrored: 4 * 3 * 6 * 2 = 144. For
networks of other sizes the four lengths are in proportion.

10 crops: corners and middle of the middle square at the smallest of the four lengths, also mirrored. 1 crop: the result
of `augment.prepare`.

6 views fit networks that were trained on whole images with small shifts and mirroring: the result of `augment.prepare`
unmoved, moved one pixel up and left, and moved one pixel down and right. All are also mirrored. Zeros fill the edges.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from googlenet_jax.data import augment, resample

COUNTS = (1, 6, 10, 144)
NAMES = {1: '1 crop', 6: '6 views', 10: '10 crops', 144: '144 crops'}
NOTES = {6: '6 views: mirror and shifts of one pixel'}  # what a table says below
SHIFTS = ((0, 0), (-1, -1), (1, 1))  # the 6 views are moved by these: (down, right) in pixels
PAPER_SIZE, PAPER_SCALES = 224, (256, 288, 320, 352)
SQUARES = (0, 1, 2)  # left or upper, middle, right or lower
MIDDLE = 1
VIEWS = {6: len(SHIFTS), 10: 5, 144: 6}  # views of the prepared image (6) or of each square, without mirroring
# Places of the corners and the middle in a square: (rows, columns) in halves of the free space.
PLACES = ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1))


def label(count: int) -> str:
  """Returns the text of a table's cell: the number, and 'views' where it counts no crops."""
  return NAMES[count] if count in NOTES else str(count)


def scales(image_size: int) -> tuple[int, ...]:
  """Returns the four lengths of the shorter side in pixels: (256, 288, 320, 352) for a network of 224."""
  return tuple(math.floor(image_size * scale / PAPER_SIZE + 0.5) for scale in PAPER_SCALES)


def cut(image: jax.Array, sizes: jax.Array, scale: jax.Array, square: jax.Array, image_size: int) -> jax.Array:
  """Cuts six crops out of one square of images resized to one scale.

  Resizing the image, cutting the square and resizing the square are matrices (see `resample`). They are multiplied
  before they are applied to the image.

  Args:
    image: float32 `[B, H, W, C]`, each in the upper left of the canvas.
    sizes: int32 `[B, 2]`, height and width of each image.
    scale: int32 scalar, one of `scales(image_size)`.
    square: int32 scalar, one of SQUARES.
    image_size: side of a crop in pixels.

  Returns:
    float32 `[6, B, image_size, image_size, C]`: four corners, the middle, the whole square.
  """
  lengths = augment.resized_lengths(sizes, scale)
  largest = scales(image_size)[-1]
  shrink = resample.sampling_matrix(0, scale, scale, image_size, largest)  # resizes the whole square
  by_axis = []
  for axis in (0, 1):
    size, ratio = sizes[:, axis], sizes[:, axis] / lengths[:, axis]
    offset = (lengths[:, axis] - scale) * square // 2

    def rows(start, count, size=size, ratio=ratio, canvas=image.shape[1 + axis]):
      return resample.sampling_matrix(start * ratio, count * ratio, size, count, canvas)

    matrices = [rows(offset + (scale - image_size) * halves // 2, image_size) for halves in (0, 1, 2)]
    by_axis.append([*matrices, jnp.matmul(shrink, rows(offset, largest), precision=lax.Precision.HIGHEST)])
  places = (*PLACES, (3, 3))
  return jnp.stack([resample.resample(image, by_axis[0][i], by_axis[1][j]) for i, j in places])


def batch_size(batch: int, count: int, devices: int) -> int:
  """Returns how many images to cut at once: the network then gets about as many crops as images in training.

  Args:
    batch: images in a training batch, over all devices.
    count: crops or views per image, one of COUNTS.
    devices: number of devices.

  Returns:
    Images over all devices, at least one on each.
  """
  return max(1, batch // (1 if count == 1 else 2 * VIEWS[count]) // devices) * devices


def squares(count: int, image_size: int, square_images: bool) -> np.ndarray:
  """Returns the squares that give `count` crops; VIEWS has the number of crops of each square.

  Args:
    count: crops per image, 10 or 144.
    image_size: side of a crop in pixels.
    square_images: whether every image is square. The three squares of a scale are then the same, and one is enough.

  Returns:
    int32 `[n, 2]`: scale and square.

  Raises:
    ValueError: the count is not 10 or 144.
  """
  if count == 10:
    return np.array([[scales(image_size)[0], MIDDLE]], np.int32)
  if count == 144:
    different = (MIDDLE,) if square_images else SQUARES
    return np.array([[scale, square] for scale in scales(image_size) for square in different], np.int32)
  raise ValueError(f'{count} crops per image are unknown: choose from {", ".join(map(str, COUNTS))}')


def all_square(batch: dict[str, jax.Array | np.ndarray], options: Any) -> bool:
  """Returns whether crops are cut from square images only; for arguments see `log_probabilities`."""
  return bool(options.padding) or ('size' not in batch and batch['image'].shape[1] == batch['image'].shape[2])


def distinct(count: int, image_size: int, square_images: bool) -> int:
  """Returns how many different crops of an image there are: 48 of the 144 for a square one; see `squares`."""
  if count in (1, 6):
    return count
  return 2 * VIEWS[count] * len(squares(count, image_size, square_images))


def shifted(image: jax.Array) -> jax.Array:
  """Returns `[3, B, H, W, C]`: images `[B, H, W, C]` moved by each of SHIFTS, with zeros at the edges."""
  height, width = image.shape[1:3]
  padded = augment.pad(image, 1)
  return jnp.stack([padded[:, 1 - down : 1 - down + height, 1 - right : 1 - right + width] for down, right in SHIFTS])


def log_mean(log_probabilities: jax.Array) -> jax.Array:
  """Log of the mean probability over axis 0."""
  return jax.nn.logsumexp(log_probabilities, axis=0) - math.log(log_probabilities.shape[0])


def log_probabilities(
  network: Callable[[jax.Array], jax.Array], batch: dict[str, jax.Array], count: int, image_size: int, options
) -> jax.Array:
  """Returns the log of the mean softmax over `count` crops or views of each image.

  The network gets all crops of one square at once, 2 * VIEWS[count] per image, and one square after another. It gets
  the 6 views at once.

  Args:
    network: maps `[B, image_size, image_size, C]` to logits `[B, classes]`.
    batch: `image` uint8 `[B, H, W, C]`, or floating point in [0, 1]; and `size` for images of many sizes, see
      `augment.prepare`.
    count: crops or views per image, one of COUNTS.
    image_size: side of a crop in pixels.
    options: `augment` part of a recipe; `padding` and `resize` are read. With padding, crops are cut from the padded
      images.

  Returns:
    float32 `[B, classes]`.

  Raises:
    ValueError: the count is not one of COUNTS.
  """
  image, sizes = batch['image'], batch.get('size')
  prepared = augment.prepare(image, image_size, options.padding, sizes, options.resize)
  if count == 1:
    return jax.nn.log_softmax(network(prepared))

  def mean_of(crops):
    crops = jnp.concatenate([crops, crops[:, :, :, ::-1]])
    logits = network(crops.reshape(-1, *crops.shape[2:]))
    logits = logits.reshape(crops.shape[0], -1, logits.shape[-1])
    return log_mean(jax.nn.log_softmax(logits))

  if count == 6:
    return mean_of(shifted(prepared))
  if options.padding:
    image, sizes = prepared, None
  else:
    image = augment.to_float(image)
  if sizes is None:
    sizes = augment.full_sizes(image)
  places = squares(count, image_size, all_square(batch, options))
  one = lambda place: mean_of(cut(image, sizes, *place, image_size)[: VIEWS[count]])
  return log_mean(lax.map(one, jnp.asarray(places)))
