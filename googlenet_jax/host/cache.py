"""The cache between runs, ~/.cache/googlenet_jax (XDG_CACHE_HOME): compiled programs and decoded images."""

import contextlib
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence

import jax
import numpy as np

from googlenet_jax.host.errors import expanded
from googlenet_jax.host.files import replacing


def folder() -> pathlib.Path:
  """Returns the folder of the cache; it may not exist yet."""
  return expanded(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'googlenet_jax'


def use_compilation_cache() -> None:
  """Keeps compiled programs between runs, unless the user has named a folder (JAX_COMPILATION_CACHE_DIR)."""
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', str(folder()))


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
  """Returns the arrays that `write_file` kept; None if there are none, or the file is damaged."""
  with (
    contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),  # missing or damaged
    (folder() / f'{name}.npz').open('rb') as file,
    np.load(file, allow_pickle=False) as kept,
  ):
    return {key: kept[key] for key in kept}
  return None


def write_file(name: str, found: dict[str, np.ndarray]) -> None:
  """Keeps arrays by name. On a full disk nothing is kept, and the next run reads the sources again."""
  path = folder() / f'{name}.npz'
  with contextlib.suppress(OSError):
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open('wb') as file:
      np.savez(file, **found)
