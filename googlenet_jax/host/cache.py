"""The cache between runs, ~/.cache/googlenet_jax (XDG_CACHE_HOME): compiled programs and decoded images."""

import contextlib
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import compilation_cache

from googlenet_jax.host import console
from googlenet_jax.host.errors import UserError, expanded, reason
from googlenet_jax.host.files import remove_left, replacing

MOST_BYTES = 2 << 30  # that all arrays may take: a data set in another folder has files of its own


def folder() -> pathlib.Path | None:
  """Returns the folder of the cache, which may not exist yet; None, with a warning, if none can be named."""
  try:
    given = expanded(os.environ.get('XDG_CACHE_HOME', ''), 'XDG_CACHE_HOME')
  except UserError as error:
    console.warn_once(f'{error}; until then nothing is kept for the next run')
    return None
  try:  # the rules of XDG: a relative path is ignored
    return (given if given.is_absolute() else expanded('~/.cache')) / 'googlenet_jax'
  except UserError:
    console.warn_once(f'there is no home folder, and {_NOTHING_KEPT}')
    return None


_VARIABLE = 'JAX_COMPILATION_CACHE_DIR'
_NOTHING_KEPT = 'nothing is kept for the next run: XDG_CACHE_HOME=FOLDER names a place for it'


def use_compilation_cache() -> None:
  """Keeps compiled programs between runs, in our folder unless the user has named one (JAX_COMPILATION_CACHE_DIR).

  That holds for everything that this process compiles. JAX has no cache for a part of a process.
  """
  _repair_compilation_cache()
  given = os.environ.get(_VARIABLE)
  if given and given == jax.config.jax_compilation_cache_dir:
    try:
      place = str(expanded(given, _VARIABLE))
    except UserError as error:
      console.warn_once(f'{error}; until then compiled programs are kept as without {_VARIABLE}')
      place = None
    jax.config.update('jax_compilation_cache_dir', place)
  if jax.config.jax_compilation_cache_dir is None and (place := folder()):
    try:
      place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      console.warn_once(f'{reason(error)}, and {_NOTHING_KEPT}')
    else:
      jax.config.update('jax_compilation_cache_dir', str(place))


def _repair_compilation_cache() -> None:
  """Lets JAX delete a damaged program of the compilation cache, and make it anew.

  JAX itself only warns, keeps the damaged file, and compiles again in every run. It has no setting for this. If a later
  version has other functions, its own behaviour comes back. A program that fails for another reason stays: the device
  may have no memory now, or the user's folder may hold programs for another machine.
  """
  read = getattr(compilation_cache, 'get_executable_and_time', None)
  write = getattr(compilation_cache, 'put_executable_and_time', None)
  decompress = getattr(compilation_cache, 'decompress_executable', None)
  if None in (read, write, decompress) or hasattr(read, '__wrapped__'):
    return

  @functools.wraps(read)
  def read_or_delete(key: str, *arguments: Any) -> tuple[Any, Any]:
    try:
      return read(key, *arguments)
    except Exception as error:  # each part of a damaged file fails in its own way
      if jax.config.jax_raise_persistent_cache_errors:
        raise
      place = jax.config.jax_compilation_cache_dir
      try:
        damaged = _delete_if_damaged(key, error)
      except OSError as refused:
        error, damaged = refused, False
      if damaged:
        console.warn_once(f'a compiled program in {place} was damaged and is made anew')
      else:
        console.warn_once(f'compiled programs in {place} cannot be read: {reason(error)}')
      return None, None

  @functools.wraps(write)
  def write_whole(key: str, *arguments: Any) -> None:
    try:
      write(key, *arguments)
    except OSError as error:
      with contextlib.suppress(OSError):
        _delete_if_damaged(key, error)  # it may be half of a file
      if jax.config.jax_raise_persistent_cache_errors:
        raise
      place = jax.config.jax_compilation_cache_dir
      console.warn_once(f'compiled programs cannot be kept in {place} for the next run: {reason(error)}')

  compilation_cache.get_executable_and_time, compilation_cache.put_executable_and_time = read_or_delete, write_whole


def _delete_if_damaged(key: str, error: Exception) -> bool:
  """Deletes a program of the compilation cache that is damaged, and returns whether it was."""
  path = pathlib.Path(jax.config.jax_compilation_cache_dir) / f'{key}-cache'
  damaged = _is_damaged(path, error)
  if damaged:
    path.unlink(missing_ok=True)
  return damaged


def _is_damaged(path: pathlib.Path, error: Exception) -> bool:
  """Returns whether a file of the compilation cache holds no program. In the user's folder only a checksum counts."""
  try:
    compilation_cache.decompress_executable(path.read_bytes())
  except (OSError, MemoryError):
    return False
  except Exception:  # zlib and zstandard have their own
    return True
  return bool(re.search('Failed to parse|deserialization failed', str(error))) and path.parent == folder()


def arrays(
  name: str, sources: Sequence[pathlib.Path], read: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
  """Returns the arrays that `read` makes from some files; from the cache if the files have not changed.

  Files count as unchanged if path, size and modification time are the same. A cached file has checksums. If it is
  damaged or cannot be written, the sources are read.

  Args:
    name: begins the name of the cached file. The folder of the sources decides how it ends.
    sources: the files.
    read: reads the sources and returns named arrays.
  """
  place = hashlib.sha256(str(sources[0].resolve()).encode()).hexdigest()[:8]
  name = f'{name}_{place}'
  state = str([(source.name, source.stat().st_size, source.stat().st_mtime_ns) for source in sources])
  kept = read_file(name)
  if kept is not None and kept.pop('of', None) == state:
    return kept
  found = read()
  write_file(name, {'of': np.array(state), **found})
  return found


def read_file(name: str) -> dict[str, np.ndarray] | None:
  """Returns the arrays that `write_file` kept; None if there are none. A damaged file is deleted."""
  place = folder()
  if place is None:
    return None
  path = place / f'{name}.npz'
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as kept:
      found = {key: kept[key] for key in kept}
    if not all(isinstance(array, np.ndarray) for array in found.values()):
      raise ValueError('not written by this program')
  except (OSError, MemoryError):
    return None
  except Exception:  # NumPy raises anything for a damaged file, even an error of Python's tokenizer
    with contextlib.suppress(OSError):
      path.unlink()
    return None
  with contextlib.suppress(OSError):
    os.utime(path)  # used now
  return found


def write_file(name: str, found: dict[str, np.ndarray]) -> None:
  """Keeps arrays by name. On a full disk nothing is kept, and the next run reads the sources again."""
  place = folder()
  if place is None:
    return
  path = place / f'{name}.npz'
  with contextlib.suppress(OSError):
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open('wb') as file:
      np.savez(file, **found)
    remove_left(place)
    _delete_oldest(place)


def _delete_oldest(place: pathlib.Path) -> None:
  """Deletes the files of arrays that have not been used for longest, where all take more than MOST_BYTES."""
  states = [(path, path.stat()) for path in place.glob('*.npz')]
  states.sort(key=lambda state: state[1].st_mtime_ns, reverse=True)
  total = 0
  for path, status in states:
    total += status.st_size
    if total > MOST_BYTES:
      path.unlink(missing_ok=True)
