"""Reads picture files."""

import os
import pathlib
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from googlenet_jax.host.errors import UserError


def read(path: str | os.PathLike, channels: int) -> np.ndarray:
  """Reads a picture as it should be seen.

  The EXIF orientation is applied. Transparent parts become white. 16-bit grey is scaled to 8 bits. Of an animation the
  first frame is read.

  Args:
    path: a PNG, JPEG or other file that PIL reads.
    channels: 1 for grey, 3 for RGB.

  Returns:
    uint8 `[h, w, channels]`.

  Raises:
    UserError: there is no such file, it is a folder, it is not a picture, it is damaged or too large, or the channels
      are not 1 or 3.
  """
  path = pathlib.Path(path).expanduser()
  if channels not in (1, 3):
    raise UserError(f'{path}: pictures are read with 1 or 3 channels, not {channels}: give arrays instead')
  try:
    with path.open('rb') as file, warnings.catch_warnings():
      warnings.simplefilter('ignore')  # PIL warns about odd metadata
      warnings.simplefilter('error', Image.DecompressionBombWarning)
      pixels = np.array(_flat(Image.open(file)).convert('L' if channels == 1 else 'RGB'))
  except UserError as error:
    raise UserError(f'{path} {error}') from error
  except FileNotFoundError as error:
    raise UserError(f'{path} does not exist: check the path') from error
  except IsADirectoryError as error:
    raise UserError(f'{path} is a folder: give a picture file') from error
  except UnidentifiedImageError as error:
    raise UserError(f'{path} is not a picture that can be read: give a PNG or JPEG file') from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    most = Image.MAX_IMAGE_PIXELS / 1e6
    raise UserError(f'{path} is too large: make it smaller than {most:.0f} million pixels') from error
  except Exception as error:  # PIL raises many types for damaged files
    if getattr(error, 'errno', None):
      raise UserError(f'{path} cannot be read: {error.strerror}') from error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f'{path} is damaged ({reason}): copy it again or give another picture') from error
  if not pixels.size:
    raise UserError(f'{path} has no pixels: give another picture')
  return pixels.reshape(*pixels.shape[:2], channels)


def _flat(image: Image.Image) -> Image.Image:
  """Turns a picture upright, to 8 bits and opaque."""
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith('I'):
    levels = np.asarray(image).astype(np.int64)
    if levels.min(initial=0) < 0 or levels.max(initial=0) > 65535:
      raise UserError('has values outside 16 bits: save it with 8 or 16 bits')
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # 65535 / 255 = 257
  if image.mode == 'F':
    raise UserError('has floating point values: save it with 8 or 16 bits')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return image
