"""Reads picture files that somebody else made: any kind of colours, and any kind of damage."""

import contextlib
import ctypes
import logging
import os
import pathlib
import re
import stat
import warnings
from collections.abc import Iterator

import numpy as np
import PIL
from PIL import Image, ImageCms, UnidentifiedImageError

from googlenet_jax.host.errors import UserError, expanded_text, one_line

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.pgm')
# PIL opens these and no others: its plugin for EPS, for example, runs another program.
FORMATS = ('JPEG', 'PNG', 'GIF', 'BMP', 'PPM', 'WEBP', 'TIFF')
MOST_PIXELS = 89_478_485  # where PIL suspects a small file that was made to fill the memory
MOST_BYTES = 1 << 30
_SMALLER = f'make it smaller than {MOST_PIXELS / 1e6:.0f} million pixels'

_CONVERT = 'convert it to JPEG or PNG'
_OTHER_SUFFIXES = {
  # Most of these look like a TIFF with a very small picture.
  **dict.fromkeys(('.dng', '.nef', '.cr2', '.cr3', '.arw', '.raf', '.orf', '.rw2'), 'is a raw photograph'),
  **dict.fromkeys(('.heic', '.heif'), 'is a HEIC picture'),
  **dict.fromkeys(('.svg', '.svgz'), 'is an SVG drawing'),
}
_BROKEN = 'is damaged, or an unusual kind of {}: copy it again, or save it again as JPEG or PNG'
_REASONS = {  # the start of a file that PIL does not open
  rb'\xff\xd8\xff': _BROKEN.format('JPEG'),
  rb'\x89PNG': _BROKEN.format('PNG'),
  rb'GIF8': _BROKEN.format('GIF'),
  rb'BM': _BROKEN.format('BMP'),
  rb'RIFF....WEBP': _BROKEN.format('WebP'),
  rb'II[*+]\0|MM\0[*+]': _BROKEN.format('TIFF'),
  rb'....ftyp(heic|heix|hevc|mif1|msf1)': f'is a HEIC picture: {_CONVERT}',
  rb'....ftypavi[fs]': f'is an AVIF picture: {_CONVERT}',
  rb'\xff\x0a|\0\0\0\x0cJXL ': f'is a JPEG XL picture: {_CONVERT}',
  rb'\xff\x4f\xff\x51|\0\0\0\x0cjP  ': f'is a JPEG 2000 picture: {_CONVERT}',
  rb'(\xef\xbb\xbf)?\s*(<\?xml.*)?(<!--.*-->\s*)?<svg': f'is an SVG drawing: {_CONVERT}',
  rb'%!PS|\xc5\xd0\xd3\xc6': f'is a PostScript file: {_CONVERT}',
  rb'%PDF': f'is a PDF file: {_CONVERT}',
  rb'8BPS': f'is a Photoshop file: {_CONVERT}',
  rb'(\xef\xbb\xbf)?\s*<(!doctype )?html': 'is a web page: download the picture itself',
  rb'': 'is not a picture that can be read: give a PNG or JPEG file',
}
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
# What PIL and libtiff say about odd files is for programmers; `read` says what is wrong.
logging.getLogger('PIL').setLevel(logging.CRITICAL)
for _folder, _pattern in (('pillow.libs', 'libtiff*.so*'), ('PIL/.dylibs', 'libtiff*.dylib')):  # of Pillow's wheels
  for _library in (pathlib.Path(PIL.__file__).parents[1] / _folder).glob(_pattern):
    with contextlib.suppress(OSError, AttributeError):  # another kind of library
      ctypes.CDLL(str(_library)).TIFFSetErrorHandler(None)
_NO_WARNINGS = ('ignore', None, Warning, re.compile(r'PIL\b'), 0)


def is_picture_name(name: str | os.PathLike) -> bool:
  """Returns whether a file of this name counts as a picture: by its ending, in any case, and not hidden."""
  name = os.path.basename(name)
  return not name.startswith('.') and os.path.splitext(name)[1].lower() in SUFFIXES


def read(path: str | os.PathLike, channels: int, canvas: int | None = None) -> np.ndarray:
  """Reads a picture as it should be seen.

  The EXIF orientation is applied. Transparent parts become white. 16-bit grey is scaled to 8 bits. The first frame of
  an animation and the first page of a document are read. Colour profiles are not applied.

  Args:
    path: a file with one of the formats of SUFFIXES; its name may end otherwise.
    channels: 1 for grey, 3 for RGB.
    canvas: a longer side is shrunk to this many pixels. A large JPEG is not decoded whole for that: a photograph of 12
      million pixels takes a seventh of the time.

  Returns:
    uint8 `[h, w, channels]`.

  Raises:
    UserError: one line with the path and the reason: there is no such file, it is no picture, it is damaged or too
      large, its numbers are not 8 or 16 bits, or the channels are not 1 or 3. Nothing else is raised for a file.
  """
  if channels not in (1, 3):
    raise UserError(f'{one_line(path)}: pictures are read with 1 or 3 channels, not {channels}: give arrays instead')
  with _opened(path) as image:
    turn = _UPRIGHT.get(_orientation(image))
    if canvas:
      # JPEG's decoder can halve a picture up to three times; the shorter side does not count.
      image.draft(None, (canvas, 1) if image.width > image.height else (1, canvas))
    image.load()
    image = _eight_bits(image)
    mode = 'L' if channels == 1 else 'RGB'
    image = image if image.mode == mode else image.convert(mode)
    image = image if turn is None else image.transpose(turn)
    pixels = np.array(shrunk(image, canvas) if canvas else image)
    return pixels.reshape(*pixels.shape[:2], channels)


def shrunk(image: Image.Image, canvas: int) -> Image.Image:
  """Shrinks an image in proportion if it has a side of more pixels than `canvas`."""
  longest = max(image.size)
  if longest <= canvas:
    return image
  size = [max(1, round(side * canvas / longest)) for side in image.size]
  return image.resize(size, Image.Resampling.BILINEAR)


def header(path: str | os.PathLike) -> tuple[int, int, bool]:
  """Reads height and width in pixels, as `read` returns them, and whether every colour the file can hold is grey.

  The pixels are not decoded: they may be damaged, and those of a picture with RGB colours may all be grey.

  Raises:
    UserError: as `read`.
  """
  with _opened(path) as image:
    width, height = image.size[::-1] if _orientation(image) >= 5 else image.size
    grey = image.mode in ('1', 'L', 'LA', 'La', 'F') or image.mode.startswith('I')
    if image.mode in ('P', 'PA'):
      raw_mode, colours = image.palette.getdata()
      palette = Image.new('P', (1, 1))
      palette.putpalette(colours, raw_mode)
      red, green, blue = np.reshape(palette.getpalette(), (-1, 3)).T
      grey = bool((red == green).all() and (green == blue).all())
    return height, width, grey


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
  """Opens a picture file; what goes wrong with it in the `with` block becomes a UserError of one line."""
  if _NO_WARNINGS not in warnings.filters:  # catch_warnings() is not safe in threads
    warnings.filterwarnings('ignore', module=r'PIL\b')
  path = expanded_text(path)
  name = one_line(path)
  try:
    _check_file(path)
    with open(path, 'rb') as file:
      yield _checked_size(_open_image(file))
  except UserError as error:
    raise UserError(f'{name} {error}') from error
  except FileNotFoundError as error:
    link = os.path.islink(path)
    raise UserError(f'{name} {"is a link to nothing" if link else "does not exist"}: check the path') from error
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # with `python -W error` the second
    raise UserError(f'{name} is too large: {_SMALLER}') from error
  except MemoryError as error:
    raise UserError(f'{name} does not fit in memory: make it smaller') from error
  except Exception as error:  # PIL raises many types for damaged files
    if getattr(error, 'errno', None):
      raise UserError(f'{name} cannot be read: {error.strerror}') from error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f'{name} is damaged ({one_line(reason)}): copy it again or give another picture') from error


def _check_file(path: str) -> None:
  """Refuses what cannot be opened without waiting (a pipe), and files that are no pictures by their name."""
  status = os.stat(path)
  if stat.S_ISDIR(status.st_mode):
    raise UserError('is a folder: give a picture file')
  if not stat.S_ISREG(status.st_mode):
    raise UserError('is a device or a pipe: give a picture file')
  if not status.st_size:
    raise UserError('is empty: copy it again or give another picture')
  if status.st_size > MOST_BYTES:
    raise UserError(f'is too large: {_SMALLER}')
  kind = _OTHER_SUFFIXES.get(os.path.splitext(path)[1].lower())
  if kind:
    raise UserError(f'{kind}: {_CONVERT}')


def _open_image(file) -> Image.Image:
  try:
    return Image.open(file, formats=FORMATS)
  except UnidentifiedImageError as error:
    file.seek(0)
    start = file.read(1024)
    reason = next(reason for pattern, reason in _REASONS.items() if re.match(pattern, start, re.DOTALL | re.IGNORECASE))
    raise UserError(reason) from error


def _checked_size(image: Image.Image) -> Image.Image:
  if image.width * image.height > MOST_PIXELS:
    raise UserError(f'is too large: {_SMALLER}')
  if not image.width * image.height:
    raise UserError('has no pixels: give another picture')
  return image


def _orientation(image: Image.Image) -> int:
  """Returns EXIF's orientation, 1 to 8, of a picture that is not loaded yet."""
  if image.format == 'TIFF':
    return 1  # PIL turns these itself
  try:
    # PIL's own method for PNG looks behind the pixels too, and decodes them for that.
    found = Image.Image.getexif(image).get(_ORIENTATION)
  except Exception:  # odd metadata do not spoil a picture
    return 1
  return found if found in _UPRIGHT else 1


def _eight_bits(image: Image.Image) -> Image.Image:
  """Returns a picture with 8 bits a channel, in a mode that PIL converts to grey and to RGB, and opaque."""
  if image.mode.startswith('I'):
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
      raise UserError('has values outside 16 bits: save it with 8 or 16 bits')
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # 65535 / 255 = 257
  if image.mode == 'F':
    raise UserError('has floating point values: save it with 8 or 16 bits')
  if image.mode == 'LAB':
    profiles = ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB')
    return ImageCms.profileToProfile(image, *profiles, outputMode='RGB')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
  return image
