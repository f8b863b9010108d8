import os
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache, lru_cache

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


def test_a_damaged_file_that_cannot_be_made_anew_is_deleted(reads, tmp_path, monkeypatch):
  expected = reads()
  path = kept(tmp_path)
  path.write_bytes(b'text')
  monkeypatch.setattr(cache, 'replacing', lambda path: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
  assert reads() == expected
  assert not path.exists()


def test_the_arrays_that_were_used_last_are_kept(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(cache, 'MOST_BYTES', 30_000)
  place = tmp_path / 'googlenet_jax'
  program = place / 'jit_step-cache'
  for number in range(6):
    cache.write_file(f'set_{number}', {'images': np.full(9000, number, np.uint8)})
    for path in place.iterdir():
      os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))  # a second passes
    program.touch()
    assert cache.read_file('set_0')['images'][-1] == 0
  assert sorted(path.name for path in place.iterdir()) == [program.name, 'set_0.npz', 'set_4.npz', 'set_5.npz']
  left = place / '.googlenet_jax.0123'
  left.touch()
  os.utime(left, (0, 0))
  cache.write_file('set_6', {'images': np.zeros((10**6), np.uint8)})  # too large beside any other
  assert sorted(path.name for path in place.iterdir()) == [program.name]


def test_where_nothing_can_be_written_files_are_read_every_time(reads, tmp_path):
  (tmp_path / 'home').write_text('a file in the place of the folder')
  assert reads() == reads()
  assert reads.count == 2


def test_without_a_home_nothing_is_kept_and_it_is_said_once(tmp_path, monkeypatch, capsys):
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.delenv('HOME', raising=False)
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
  cache.write_file('a', {'b': np.zeros(1)})
  assert cache.folder() is None
  assert cache.read_file('a') is None
  assert capsys.readouterr().err.startswith('warning: there is no home folder, and nothing is kept for the next run')


def test_a_bad_folder_is_no_cache_and_it_is_said_once(monkeypatch, capsys):
  monkeypatch.setenv('XDG_CACHE_HOME', 'gs://b/not-a-folder')
  assert cache.folder() is None
  assert cache.folder() is None
  told = capsys.readouterr().err
  assert told.startswith('warning: XDG_CACHE_HOME=gs://b/not-a-folder is a URL, and files must be on this machine: ')
  assert told.endswith('; until then nothing is kept for the next run\n')
  assert told.count('\n') == 1


def test_a_relative_folder_is_ignored(monkeypatch):
  monkeypatch.setenv('HOME', '/home/somebody')
  for given, place in {'x': '~/.cache', '': '~/.cache', '~/x': '~/x', 'file:///x': '/x'}.items():
    monkeypatch.setenv('XDG_CACHE_HOME', given)
    assert cache.folder() == pathlib.Path(os.path.expanduser(place)) / 'googlenet_jax'


@pytest.fixture
def compilation_cache_dir(monkeypatch):
  """`set_dir(value)`; afterwards JAX has the folder of the tests again."""
  before = jax.config.jax_compilation_cache_dir
  yield lambda value: jax.config.update('jax_compilation_cache_dir', value)
  jax.config.update('jax_compilation_cache_dir', before)


def test_a_folder_that_cannot_be_made_is_no_cache(tmp_path, monkeypatch, capsys, compilation_cache_dir):
  compilation_cache_dir(None)
  (tmp_path / 'file').touch()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  cache.use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir is None
  assert f'{tmp_path}/file/googlenet_jax: Not a directory, and nothing is kept' in capsys.readouterr().err
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  cache.use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'googlenet_jax')


def test_a_url_is_no_folder_for_compiled_programs(tmp_path, monkeypatch, capsys, compilation_cache_dir):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  for given, place in {'gs://b/programs': f'{tmp_path}/googlenet_jax', f'file://{tmp_path}/x': f'{tmp_path}/x'}.items():
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', given)
    compilation_cache_dir(given)
    cache.use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == place
  told = capsys.readouterr().err
  assert told.startswith('warning: JAX_COMPILATION_CACHE_DIR=gs://b/programs is a URL, and files must be on this ')
  assert told.count('\n') == 1


def compile_a_program():
  """Compiles, or reads, the same small program as a new function, and returns its file in the cache."""

  def healed_by_test_cache(x):
    return jnp.sin(x) + 3

  with jax._src.config.persistent_cache_min_compile_time_secs(0.0):
    assert jax.jit(healed_by_test_cache)(0.0) == 3
  (path,) = pathlib.Path(jax.config.jax_compilation_cache_dir).glob('jit_healed_by_test_cache-*-cache')
  return path


DAMAGE = {
  'cut': lambda content: content[:-40],
  'empty': lambda content: b'',
  'flipped': lambda content: content[:300] + bytes([content[300] ^ 255]) + content[301:],
  'another file': lambda content: zlib.compress(b'text, but no program'),
  'cut before it was compressed': lambda content: zlib.compress(zlib.decompress(content)[:-100]),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_program_is_made_anew(kind, capsys, monkeypatch):
  cache.use_compilation_cache()
  path = compile_a_program()
  monkeypatch.setattr(cache, 'folder', lambda: path.parent)
  whole = path.read_bytes()
  path.write_bytes(DAMAGE[kind](whole))
  compile_a_program()
  assert capsys.readouterr().err == f'warning: a compiled program in {path.parent} was damaged and is made anew\n'
  assert len(zlib.decompress(path.read_bytes())) > 1000
  compile_a_program()
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize('kind', DAMAGE)
def test_in_a_folder_of_the_user_a_program_is_deleted_only_by_its_checksum(kind, capsys):
  cache.use_compilation_cache()
  path = compile_a_program()
  whole = path.read_bytes()
  damaged = DAMAGE[kind](whole)
  path.write_bytes(damaged)
  compile_a_program()
  stays = kind in ('another file', 'cut before it was compressed')
  assert (path.read_bytes() == damaged) == stays
  assert ('cannot be read: ' if stays else 'was damaged and') in capsys.readouterr().err
  path.write_bytes(whole)


@pytest.mark.parametrize('error', [jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'), ValueError('new')])
def test_a_healthy_program_stays_whatever_fails(error, capsys, monkeypatch):
  cache.use_compilation_cache()
  path = compile_a_program()
  monkeypatch.setattr(cache, 'folder', lambda: path.parent)

  def fail(_):
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(compilation_cache, 'extract_executable_and_time', fail)
    compile_a_program()
    assert f'cannot be read: {error}' in capsys.readouterr().err
    with jax._src.config.raise_persistent_cache_errors(True), pytest.raises(type(error)):
      compile_a_program()
  assert path.exists()


def test_a_program_that_cannot_be_written_leaves_no_half_file(monkeypatch, capsys):
  cache.use_compilation_cache()
  path = compile_a_program()
  path.unlink()

  def full(self, key, value):
    path.write_bytes(value[:10])
    raise OSError(28, 'No space left on device', str(path))

  with monkeypatch.context() as patch:
    patch.setattr(lru_cache.LRUCache, 'put', full)
    with pytest.raises(ValueError, match='unpack'):  # there is no file
      compile_a_program()
  assert 'cannot be kept in' in capsys.readouterr().err
  compile_a_program()


def test_a_program_that_may_not_be_read_stays(monkeypatch, capsys):
  cache.use_compilation_cache()
  path = compile_a_program()

  def refused(self, key):
    raise PermissionError(13, 'Permission denied', str(path))

  monkeypatch.setattr(lru_cache.LRUCache, 'get', refused)
  assert compile_a_program() == path
  message = f'warning: compiled programs in {path.parent} cannot be read: {path}: Permission denied\n'
  assert capsys.readouterr().err == message
