"""What a user gives a network, as a batch: arrays, a file, or files of many sizes."""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from googlenet_jax.data import pictures, splits

Images = np.ndarray | jax.Array | str | os.PathLike | Sequence


def batch_of(images: Images, channels: int, canvas: int) -> tuple[dict[str, np.ndarray], bool]:
  """Makes a batch.

  Args:
    images: uint8, or floating point in [0, 1]: `[B, H, W, C]`, or one image `[H, W, C]`; or a path of a picture, or a
      list of paths.
    channels: channels that the network takes.
    canvas: larger pictures are shrunk to this side in pixels.

  Returns:
    `image [B, H, W, C]`, with `size [B, 2]` for pictures; and whether it was one image.

  Raises:
    ValueError: an array of another shape, type or range.
    UserError: a picture cannot be read.
  """
  is_path = lambda value: isinstance(value, str | os.PathLike)
  single = is_path(images)
  if single or (isinstance(images, list | tuple) and images and all(map(is_path, images))):
    paths = [images] if single else images
    return on_canvas([pictures.read(path, channels, canvas) for path in paths], canvas), single
  try:
    array = np.asarray(images)
  except ValueError as error:
    raise ValueError('images of different sizes do not fit in one array: give them in turn, or as paths') from error
  single = array.ndim == 3
  batch = array[None] if single else array
  if batch.ndim != 4 or batch.shape[-1] != channels or 0 in batch.shape[1:]:
    raise ValueError(
      f'images of shape {array.shape} do not fit: give [B, H, W, {channels}], [H, W, {channels}], a path or a list of '
      'paths'
    )
  return {'image': _checked_values(batch)}, single


def on_canvas(images: Sequence[np.ndarray], canvas: int, least: int = 1) -> dict[str, np.ndarray]:
  """Makes a batch of pictures of many sizes.

  Args:
    images: uint8 `[h, w, C]` each, as `pictures.read` returns them.
    canvas: larger pictures are shrunk to this side in pixels.
    least: least side of the batch in pixels. A batch of another side is another program to compile.

  Returns:
    `image` uint8 `[B, side, side, C]` and `size` int32 `[B, 2]`; the side is a power of two, or `canvas`.
  """
  largest = max(least, *(max(image.shape[:2]) for image in images))
  found, sizes = splits.on_canvas(images, min(canvas, 1 << (largest - 1).bit_length()))
  return {'image': found, 'size': sizes}


def _checked_values(batch: np.ndarray) -> np.ndarray:
  if batch.dtype == np.uint8:
    return batch
  if not jnp.issubdtype(batch.dtype, jnp.floating):
    raise ValueError(f'images of type {batch.dtype} do not fit: give uint8, or floating point in [0, 1]')
  batch = batch.astype(np.float32)
  if batch.size and not (batch.min() >= 0 and batch.max() <= 1):
    raise ValueError(
      f'floating point images must lie in [0, 1], these range from {batch.min():g} to {batch.max():g}: divide by 255, '
      'or give uint8'
    )
  return batch
