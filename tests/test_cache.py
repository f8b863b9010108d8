import os

import numpy as np
import pytest

from googlenet_jax.host import cache


@pytest.fixture
def reads(tmp_path, monkeypatch):
  """`reads()` reads two files through the cache; `reads.count` says how often the files were really read."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
  sources = [tmp_path / 'a', tmp_path / 'b']
  for source in sources:
    source.write_text(source.name)

  def read():
    reads.count += 1
    return {'images': np.arange(6, dtype=np.uint8).reshape(2, 3) + len(sources[1].read_text())}

  def reads():
    return cache.arrays('set_train', sources, read)['images'].tolist()

  reads.count, reads.sources = 0, sources
  return reads


def kept(tmp_path):
  (path,) = (tmp_path / 'home' / 'googlenet_jax').iterdir()
  return path


def test_files_are_read_once(reads):
  assert reads() == reads() == [[1, 2, 3], [4, 5, 6]]
  assert reads.count == 1


def test_changed_files_are_read_again_and_replace_the_old(reads, tmp_path):
  reads()
  reads.sources[1].write_text('longer')
  assert reads() == reads() == [[6, 7, 8], [9, 10, 11]]
  assert reads.count == 2
  os.utime(reads.sources[0], ns=(1, 1))  # the same size, another time
  reads()
  assert reads.count == 3
  kept(tmp_path)


@pytest.mark.parametrize('harm', ['flip', 'truncate', 'empty', 'other'])
def test_a_damaged_cache_is_made_again(reads, tmp_path, harm):
  expected = reads()
  path = kept(tmp_path)
  content = bytearray(path.read_bytes())
  content[content.index(bytes([1, 2, 3, 4, 5, 6]))] ^= 255
  path.write_bytes({'flip': content, 'truncate': content[:-40], 'empty': b'', 'other': b'text'}[harm])
  assert reads() == expected
  assert reads.count == 2
  assert reads() == expected
  assert reads.count == 2


def test_where_nothing_can_be_written_files_are_read_every_time(reads, tmp_path):
  (tmp_path / 'home').write_text('a file in the place of the folder')
  assert reads() == reads()
  assert reads.count == 2
