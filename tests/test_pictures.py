import contextlib
import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from googlenet_jax.data import pictures, splits
from googlenet_jax.host.errors import UserError, one_line

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 7, 3), np.uint8)
GREY = RNG.integers(0, 256, (5, 7), np.uint8)
BLOCKS = Image.fromarray(np.kron(RNG.integers(0, 256, (2, 3, 3), np.uint8), np.ones((8, 8, 1), np.uint8)))


def encoded(image, kind, **options):
  """The bytes of a picture file."""
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def written(path, content):
  path.write_bytes(content)
  return path


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


def lab(image):
  return ImageCms.profileToProfile(
    image, ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB'), outputMode='LAB'
  )


def palette(image):
  return image.quantize(16)  # the blocks have six colours


@pytest.mark.parametrize(
  ('kind', 'change', 'options', 'tolerance'),
  [
    ('png', palette, {}, 0),
    ('bmp', palette, {}, 0),
    ('gif', palette, {}, 0),
    ('tiff', palette, {}, 0),
    ('bmp', None, {}, 0),
    ('ppm', None, {}, 0),
    ('webp', None, {'lossless': True}, 0),
    ('tiff', None, {'compression': 'tiff_lzw'}, 0),
    ('tiff', 'CMYK', {}, 0),
    ('jpeg', 'CMYK', {'quality': 95}, 8),
    ('jpeg', None, {'quality': 95, 'progressive': True, 'subsampling': 0}, 8),
    ('tiff', 'YCbCr', {'compression': 'tiff_lzw'}, 3),  # Pillow 12 cannot read its own without compression
    ('tiff', lab, {}, 16),
  ],
)
def test_other_kinds_of_colours(kind, change, options, tolerance, tmp_path):
  image = change(BLOCKS) if callable(change) else BLOCKS.convert(change)
  path = written(tmp_path / 'blocks.png', encoded(image, kind, **options))  # the ending does not matter
  found = pictures.read(path, 3)
  assert np.abs(found.astype(int) - np.asarray(BLOCKS)).max() <= tolerance
  assert np.abs(pictures.read(path, 1)[..., 0].astype(int) - np.asarray(BLOCKS.convert('L'))).max() <= tolerance + 1
  assert pictures.header(path) == (16, 24, False)


@pytest.mark.parametrize('kind', ['png', 'gif', 'bmp', 'tiff', 'jpeg', 'ppm'])
def test_grey_files_are_known_by_their_header(kind, tmp_path):
  path = tmp_path / 'grey'
  for mode in ('L', '1', 'P'):
    if (mode, kind) not in (('P', 'jpeg'), ('P', 'ppm')):
      written(path, encoded(BLOCKS.convert('L').convert(mode), kind))
      assert pictures.header(path) == (16, 24, True), mode
      assert pictures.read(path, 1).shape == (16, 24, 1)


@pytest.mark.parametrize('kind', ['jpeg', 'png', 'webp', 'tiff'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_pictures_are_turned_upright(orientation, kind, tmp_path):
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
  Image.fromarray(np.ascontiguousarray(stored)).save(path, kind, exif=exif, quality=95)
  assert pictures.header(path) == (16, 24, False)
  found = pictures.read(path, 3)
  assert found.shape == upright.shape
  assert np.abs(found.astype(int) - upright).max() < 20
  assert pictures.read(path, 1).shape == (16, 24, 1)


def test_damaged_metadata_do_not_spoil_a_picture(tmp_path, recwarn):
  path = written(tmp_path / 'odd.png', encoded(BLOCKS, 'png', exif=b'Exif\0\0MM\0*\0\0\xff\xff nonsense'))
  np.testing.assert_array_equal(pictures.read(path, 3), np.asarray(BLOCKS))
  assert pictures.header(path) == (16, 24, False)
  assert not recwarn.list


def test_16_bit_grey_is_scaled_to_8_bits(tmp_path):
  levels = np.array([[0, 128, 129, 257, 32896, 65406, 65407, 65535]], np.uint16)
  big_endian = Image.frombytes('I;16B', (8, 1), levels.astype('>u2').tobytes())
  images = {name: Image.fromarray(levels) for name in ('grey.png', 'grey.tif', 'grey.pgm')}
  for name, image in (*images.items(), ('big_endian.tif', big_endian)):
    image.save(tmp_path / name)
    np.testing.assert_array_equal(pictures.read(tmp_path / name, 1)[..., 0], [[0, 0, 1, 1, 128, 254, 255, 255]])
    assert pictures.read(tmp_path / name, 3).shape == (1, 8, 3)
    assert pictures.header(tmp_path / name) == (1, 8, True)


def test_transparent_parts_become_white(tmp_path):
  path = tmp_path / 'transparent.png'
  alpha = np.array([[255, 0], [128, 0]], np.uint8)
  black = np.zeros((2, 2, 3), np.uint8)
  Image.fromarray(np.dstack([black, alpha])).save(path)
  expected = 255 - alpha
  np.testing.assert_array_equal(pictures.read(path, 3), np.stack([expected] * 3, -1))
  np.testing.assert_array_equal(pictures.read(path, 1)[..., 0], expected)
  assert pictures.header(path) == (2, 2, False)
  Image.fromarray(np.dstack([black[..., 0], alpha])).save(path)  # grey with alpha
  np.testing.assert_array_equal(pictures.read(path, 1)[..., 0], expected)
  assert pictures.header(path) == (2, 2, True)
  with_palette = Image.fromarray(black[..., 0]).convert('P').convert('PA')
  with_palette.putalpha(Image.fromarray(alpha))
  with_palette.save(path, 'tiff')
  np.testing.assert_array_equal(pictures.read(path, 1)[..., 0], expected)


def test_palettes_become_colours(tmp_path):
  path = tmp_path / 'palette.png'
  image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), 'P')
  image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
  image.save(path)
  np.testing.assert_array_equal(pictures.read(path, 3), [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]])
  for kind in ('png', 'gif'):
    image.save(path, kind, transparency=1)
    np.testing.assert_array_equal(pictures.read(path, 3), [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]])


def test_bits_become_black_and_white(tmp_path):
  for kind in ('png', 'tiff'):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / 'bits', kind)
    np.testing.assert_array_equal(pictures.read(tmp_path / 'bits', 1)[..., 0], [[255, 0]])


@pytest.mark.parametrize('kind', ['gif', 'webp', 'png', 'tiff'])
def test_the_first_of_several_frames_is_read(kind, tmp_path):
  red, blue = (Image.new('RGB', (9, 5), colour) for colour in ('red', 'blue'))
  options = {'lossless': True} if kind == 'webp' else {}
  path = written(tmp_path / 'moving', encoded(red, kind, save_all=True, append_images=[blue], **options))
  with Image.open(path) as image:
    assert image.n_frames == 2
  np.testing.assert_array_equal(pictures.read(path, 3), np.full((5, 9, 3), [255, 0, 0]))
  assert pictures.header(path) == (5, 9, False)


@pytest.mark.parametrize('size', [(1, 1), (20_000, 10), (10, 20_000)])
@pytest.mark.parametrize('kind', ['png', 'jpeg', 'tiff'])
def test_extreme_shapes(kind, size, tmp_path):
  path = written(tmp_path / 'long', encoded(Image.new('RGB', size, 'white'), kind))
  assert pictures.read(path, 3).shape == (size[1], size[0], 3)
  assert pictures.header(path) == (size[1], size[0], False)


@pytest.mark.parametrize('size', [(1300, 700), (300, 1001)])
@pytest.mark.parametrize(('kind', 'orientation'), [('jpeg', 1), ('jpeg', 6), ('png', 1), ('webp', 6)])
def test_large_pictures_are_shrunk_to_the_canvas(kind, orientation, size, tmp_path):
  exif = Image.Exif()
  exif[0x0112] = orientation
  path = written(tmp_path / 'large', encoded(BLOCKS.resize(size), kind, exif=exif, quality=95, subsampling=0))
  whole = pictures.read(path, 3)
  (images,), (sizes,) = splits.on_canvas([whole], 128)
  height, width = sizes
  found = pictures.read(path, 3, canvas=128)
  assert found.shape == (height, width, 3)
  assert max(found.shape) == 128
  difference = np.abs(found.astype(int) - images[:height, :width])
  assert difference.max() <= (20 if kind == 'jpeg' else 0)  # a JPEG is halved by its decoder first
  assert difference.mean() < 1
  assert pictures.read(path, 1, canvas=128).shape == (height, width, 1)
  np.testing.assert_array_equal(pictures.read(path, 3, canvas=2000), whole)


# Bad files ------------------------------------------------------------------------------------------------------------


def fails(path, match, channels=3):
  with pytest.raises(UserError, match=match) as caught:
    pictures.read(path, channels)
  assert '\n' not in str(caught.value)
  assert str(caught.value).isprintable()
  assert str(caught.value).startswith(one_line(path))


def chunk(kind, data):
  return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(width, height, *more):
  """A PNG that states this size and holds one row at most."""
  header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
  pixels = chunk(b'IDAT', zlib.compress(bytes(min(width, 100) + 1)))
  return b'\x89PNG\r\n\x1a\n' + header + b''.join(more) + pixels + chunk(b'IEND', b'')


def stated_size(kind, image, find, size):
  """A file whose header states another size."""
  content = encoded(image, kind)
  assert find in content
  return content.replace(find, size, 1)


BAD_FILES = {
  'empty.png': (b'', 'is empty'),
  'text.png': (b'hello world\n' * 100, 'is not a picture that can be read'),
  'page.jpg': (b'\n<!DOCTYPE html><html>404</html>', 'is a web page: download the picture itself'),
  'bytes.webp': (bytes(range(256)), 'is not a picture that can be read'),
  'bomb.png': (png(100_000, 100_000), 'is too large: make it smaller than 89 million pixels'),
  'smaller_bomb.png': (png(10_000, 10_000), 'is too large'),  # PIL only warns
  'bomb.gif': (stated_size('gif', Image.new('L', (7, 5)), b'\7\0\5\0', b'\xff\xff\xff\xff'), 'is too large'),
  'bomb.bmp': (
    stated_size('bmp', Image.new('L', (7, 5)), struct.pack('<ii', 7, 5), struct.pack('<ii', 99_999, 99_999)),
    'is too large',
  ),
  'text_bomb.png': (png(1, 1, chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(1 << 26)))), 'is damaged'),
  'no_pixels.png': (png(0, 3), 'is damaged'),
  'no_pixels.ppm': (b'P6 0 3 255 ', 'is (damaged|not a picture)'),
  'half_header.png': (encoded(BLOCKS, 'png')[:20], 'is damaged'),
  'half_header.jpg': (encoded(BLOCKS, 'jpeg')[:12], 'is damaged'),
  'odd.png': (encoded(BLOCKS, 'png').replace(b'IHDR', b'IHRD', 1), 'is damaged, or an unusual kind of PNG: copy it'),
  'float.tif': (encoded(Image.fromarray(np.full((2, 2), 0.5, np.float32)), 'tiff'), 'has floating point values'),
  'large_numbers.tif': (
    encoded(Image.fromarray(np.full((2, 2), 70_000, np.int32)), 'tiff'),
    'has values outside 16 bits',
  ),
  'drawing.png': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'is a PostScript file: convert it to JPEG'),
  'vector.svg': (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', 'is an SVG drawing: convert it to JPEG or PNG'),
  'vector.png': (b'<?xml version="1.0"?>\n<!-- by hand -->\n<svg></svg>', 'is an SVG drawing'),
  'phone.HEIC': (b'\0\0\0\x18ftypheic', 'is a HEIC picture: convert it to JPEG or PNG'),
  'phone.jpg': (b'\0\0\0\x18ftypheic', 'is a HEIC picture'),
  'modern.avif': (b'\0\0\0\x1cftypavif', 'is an AVIF picture'),
  'camera.nef': (encoded(BLOCKS, 'tiff'), 'is a raw photograph: convert it'),
  'paper.jpg': (b'%PDF-1.7', 'is a PDF file'),
  'line\nbreak \x1b[31m.png': (b'text', 'is not a picture'),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_a_bad_file_is_one_line(name, tmp_path, recwarn, capfd):
  content, reason = BAD_FILES[name]
  fails(written(tmp_path / name, content), reason)
  with contextlib.suppress(UserError):  # the header may be good
    pictures.header(tmp_path / name)
  assert not recwarn.list
  assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('kind', ['jpeg', 'png', 'gif', 'webp', 'bmp', 'tiff', 'ppm'])
def test_truncated_files_are_one_line(kind, tmp_path):
  whole = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)), kind)
  for share in (0.95, 0.5):
    fails(written(tmp_path / 'cut', whole[: int(share * len(whole))]), 'is damaged')


def test_no_other_plugin_of_pil_sees_a_file(tmp_path, monkeypatch):
  Image.init()

  def opened(*_):
    raise AssertionError('another plugin opened the file')

  others = set(Image.OPEN) - set(pictures.FORMATS)
  assert len(others) > 20
  for kind in others:
    monkeypatch.setitem(Image.OPEN, kind, (opened, None))
  for kind in sorted(others & set(Image.SAVE)):
    try:
      content = encoded(BLOCKS, kind)
    except (OSError, KeyError, ValueError):  # of other kinds of pictures
      content = b'text'
    fails(written(tmp_path / 'other.png', content), 'is (not a picture|an? .* convert it|damaged)')


def test_what_is_no_file_is_one_line(tmp_path):
  fails(tmp_path / 'none.png', 'none.png does not exist: check the path')
  fails(tmp_path, 'is a folder: give a picture file')
  (tmp_path / 'dangling.png').symlink_to(tmp_path / 'none.png')
  fails(tmp_path / 'dangling.png', 'is a link to nothing')
  (tmp_path / 'loop.png').symlink_to(tmp_path / 'loop.png')
  fails(tmp_path / 'loop.png', 'cannot be read: Too many levels of symbolic links')
  os.mkfifo(tmp_path / 'pipe.png')
  fails(tmp_path / 'pipe.png', 'is a device or a pipe')  # and nobody waits for a writer
  (tmp_path / 'zero.png').symlink_to('/dev/zero')
  fails(tmp_path / 'zero.png', 'is a device or a pipe')
  fails(tmp_path / ('a' * 300), 'cannot be read: File name too long')
  fails('zero\0byte.png', 'null')
  fails('~no_such_user/picture.png', 'is unknown')


def test_files_that_may_not_be_read_are_one_line(tmp_path, monkeypatch):
  path = written(tmp_path / 'secret.png', encoded(BLOCKS, 'png'))

  def refuse(*_):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(pictures, 'open', refuse, raising=False)  # root may read what chmod forbids
  fails(path, 'cannot be read: Permission denied')


def test_a_file_without_enough_memory_is_one_line(tmp_path, monkeypatch):
  path = written(tmp_path / 'large.png', encoded(BLOCKS, 'png'))
  monkeypatch.setattr(pictures, '_eight_bits', lambda _: bytearray(1 << 62))
  fails(path, 'does not fit in memory: make it smaller')
  with path.open('r+b') as file:
    file.truncate(pictures.MOST_BYTES + 1)  # without using the disk
  fails(path, 'is too large')


def test_files_that_change_after_their_header_was_read(tmp_path):
  path = written(tmp_path / 'photo.jpg', encoded(BLOCKS, 'jpeg'))
  assert pictures.header(path) == (16, 24, False)
  written(path, path.read_bytes()[:300])
  fails(path, 'is damaged')
  path.unlink()
  fails(path, 'does not exist')


def test_names_of_all_sorts_are_read(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  bytes_name = os.fsdecode(b'caf\xe9.png')  # Latin-1 on a UTF-8 system
  for name in ('two words.png', '"quo\'ted".png', 'line\nbreak.png', '蔷薇.png', '--help.png', '~root.png', bytes_name):
    written(tmp_path / name, encoded(BLOCKS, 'png'))
    for path in (name, tmp_path / name):
      np.testing.assert_array_equal(pictures.read(path, 3), np.asarray(BLOCKS))
    written(tmp_path / name, b'text')
    fails(name, 'is not a picture')
  assert one_line('蔷薇 \n' + bytes_name) == '蔷薇 \\ncaf\\udce9.png'


def test_which_names_are_pictures():
  yes = ['a.jpg', 'A.JPEG', 'folder/b.Png', 'two words.webp', 'c.bmp', 'd.gif', 'e.tif', 'f.TIFF', '.hidden/g.png']
  no = ['.DS_Store', '.a.jpg', '._a.jpg', 'folder/.b.png', 'jpg', 'Thumbs.db', 'a.jpg.txt', 'a.heic', 'a.svg', '.png']
  assert [name for name in yes + no if pictures.is_picture_name(name)] == yes


def test_other_numbers_of_channels_are_refused(tmp_path):
  path = tmp_path / 'colour.png'
  Image.fromarray(COLOUR).save(path)
  fails(path, 'with 1 or 3 channels, not 4', channels=4)


def test_damaged_bytes_never_raise_anything_else(tmp_path, recwarn):
  """A small fuzz: each file is a picture or one line, and its header agrees; no file stays open."""
  exif = Image.Exif()
  exif[0x0112] = 6
  files = [encoded(BLOCKS, kind, exif=exif) for kind in ('jpeg', 'png', 'webp', 'tiff')]
  files += [encoded(palette(BLOCKS), kind) for kind in ('png', 'gif', 'bmp', 'tiff')]
  files += [encoded(BLOCKS, kind, save_all=True, append_images=[BLOCKS.rotate(180)]) for kind in ('gif', 'webp')]
  files += [encoded(BLOCKS.convert('RGBA'), 'png'), encoded(BLOCKS.convert('CMYK'), 'jpeg'), encoded(BLOCKS, 'ppm')]
  rng, path, reasons = np.random.default_rng(0), tmp_path / 'damaged', []
  open_files = len(os.listdir('/proc/self/fd'))
  for i in range(50 * len(files)):
    content = bytearray(files[i % len(files)])
    near = min(len(content), 200) if rng.random() < 0.5 else len(content)  # the headers, or anywhere
    for place in rng.integers(0, near, rng.integers(1, 5)):
      content[place] = rng.choice([0, 1, 127, 128, 255, content[place] ^ 1 << rng.integers(8)])
    cut = rng.integers(1, len(content)) if rng.random() < 0.2 else len(content)
    written(path, content[:cut])
    try:
      found = pictures.read(path, 3)
      assert found.dtype == np.uint8
      height, width, grey = pictures.header(path)
      assert found.shape == (height, width, 3)
      assert not grey or (found == found[..., :1]).all()
      reasons.append('')
    except UserError as error:
      reasons.append(str(error))
  assert 100 < reasons.count('') < len(reasons) - 100
  assert all(re.fullmatch(re.escape(str(path)) + ' [^\n]+', reason) for reason in reasons if reason)
  assert len(os.listdir('/proc/self/fd')) == open_files
  assert not recwarn.list


def test_libtiff_says_nothing_of_its_own(tmp_path, capfd):
  path = tmp_path / 'a.tif'
  Image.new('RGB', (64, 64)).save(path, compression='tiff_adobe_deflate')
  content = bytearray(path.read_bytes())
  content[20] ^= 255
  path.write_bytes(content)
  with pytest.raises(UserError, match='is damaged'):
    pictures.read(path, 3)
  assert capfd.readouterr() == ('', '')
