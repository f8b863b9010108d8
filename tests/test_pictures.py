import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from googlenet_jax.data import pictures
from googlenet_jax.host.errors import UserError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 7, 3), np.uint8)
GREY = RNG.integers(0, 256, (5, 7), np.uint8)


def test_colour_and_grey_pngs(tmp_path):
  path = tmp_path / 'colour.png'
  Image.fromarray(COLOUR).save(path)
  np.testing.assert_array_equal(pictures.read(path, 3), COLOUR)
  luma = COLOUR @ [0.299, 0.587, 0.114]
  assert pictures.read(str(path), 1).shape == (5, 7, 1)
  assert np.abs(pictures.read(path, 1)[..., 0] - luma).max() < 1
  Image.fromarray(GREY).save(path)
  np.testing.assert_array_equal(pictures.read(path, 1)[..., 0], GREY)
  np.testing.assert_array_equal(pictures.read(path, 3), np.stack([GREY] * 3, -1))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_jpegs_are_turned_upright(orientation, tmp_path):
  upright = np.zeros((16, 24, 3), np.uint8)
  upright[:8, :8] = 255  # a white square in the upper left
  # What a camera stores for each value of EXIF's orientation.
  stored = {
    1: upright,
    2: upright[:, ::-1],
    3: upright[::-1, ::-1],
    4: upright[::-1],
    5: upright.swapaxes(0, 1),
    6: np.rot90(upright),
    7: upright[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(upright, -1),
  }[orientation]
  exif = Image.Exif()
  exif[0x0112] = orientation
  path = tmp_path / 'camera.jpg'
  Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=95)
  found = pictures.read(path, 3)
  assert found.shape == upright.shape
  assert np.abs(found.astype(int) - upright).max() < 20


def test_16_bit_grey_is_scaled_to_8_bits(tmp_path):
  levels = np.array([[0, 128, 129, 257, 32896, 65406, 65407, 65535]], np.uint16)
  for name in ('grey.png', 'grey.tif', 'grey.pgm'):
    Image.fromarray(levels).save(tmp_path / name)
    np.testing.assert_array_equal(pictures.read(tmp_path / name, 1)[..., 0], [[0, 0, 1, 1, 128, 254, 255, 255]])
    assert pictures.read(tmp_path / name, 3).shape == (1, 8, 3)


@pytest.mark.parametrize('values', [np.full((2, 2), 70_000, np.int32), np.full((2, 2), 0.5, np.float32)])
def test_other_number_formats_are_refused(values, tmp_path):
  path = tmp_path / 'numbers.tif'
  Image.fromarray(values).save(path)
  fails(path, 'save it with 8 or 16 bits')


def test_transparent_parts_become_white(tmp_path):
  path = tmp_path / 'transparent.png'
  alpha = np.array([[255, 0], [128, 0]], np.uint8)
  black = np.zeros((2, 2, 3), np.uint8)
  Image.fromarray(np.dstack([black, alpha])).save(path)
  expected = 255 - alpha
  np.testing.assert_array_equal(pictures.read(path, 3), np.stack([expected] * 3, -1))
  np.testing.assert_array_equal(pictures.read(path, 1)[..., 0], expected)
  Image.fromarray(np.dstack([black[..., 0], alpha])).save(path)  # grey with alpha
  np.testing.assert_array_equal(pictures.read(path, 1)[..., 0], expected)


def test_palettes_become_colours(tmp_path):
  path = tmp_path / 'palette.png'
  image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), 'P')
  image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
  image.save(path)
  np.testing.assert_array_equal(pictures.read(path, 3), [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]])
  image.save(path, transparency=1)
  np.testing.assert_array_equal(pictures.read(path, 3), [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]])


def test_bits_and_print_colours(tmp_path):
  Image.fromarray(np.array([[True, False]])).save(tmp_path / 'bits.png')
  np.testing.assert_array_equal(pictures.read(tmp_path / 'bits.png', 1)[..., 0], [[255, 0]])
  Image.fromarray(COLOUR).convert('CMYK').save(tmp_path / 'print.jpg')
  assert pictures.read(tmp_path / 'print.jpg', 3).shape == (5, 7, 3)


def fails(path, match, channels=3):
  with pytest.raises(UserError, match=match) as caught:
    pictures.read(path, channels)
  assert '\n' not in str(caught.value)
  assert str(path) in str(caught.value)


def test_files_that_are_no_pictures_are_one_line(tmp_path):
  fails(tmp_path / 'none.png', 'none.png does not exist: check the path')
  fails(tmp_path, 'is a folder')
  text = tmp_path / 'text.png'
  for content, reason in ((b'', 'is empty'), (b'hello world\n' * 100, 'is not a picture that can be read')):
    text.write_bytes(content)
    fails(text, reason)


@pytest.mark.parametrize('name', ['photo.jpg', 'drawing.png', 'moving.gif'])
def test_truncated_files_are_one_line(name, tmp_path):
  path = tmp_path / name
  Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
  whole = path.read_bytes()
  for share in (0.95, 0.5):
    path.write_bytes(whole[: int(share * len(whole))])
    fails(path, 'is damaged')


def png(width, height):
  """A PNG that states this size and holds one row at most."""
  chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
  return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(bytes(width + 1))) + chunk(b'IEND', b'')


@pytest.mark.parametrize('side', [10_000, 20_000])  # PIL warns about the first and refuses the second
def test_too_many_pixels_are_one_line(side, tmp_path, recwarn):
  path = tmp_path / 'bomb.png'
  path.write_bytes(png(side, side))
  fails(path, 'is too large: make it smaller than 89 million pixels')
  assert not recwarn.list


def test_a_picture_without_pixels_is_one_line(tmp_path):
  path = tmp_path / 'nothing.png'
  path.write_bytes(png(0, 3))
  fails(path, 'nothing.png (has no pixels|is damaged|is not a picture)')


def test_other_numbers_of_channels_are_refused(tmp_path):
  path = tmp_path / 'colour.png'
  Image.fromarray(COLOUR).save(path)
  fails(path, 'with 1 or 3 channels, not 4', channels=4)
