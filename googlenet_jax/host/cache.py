"""What is kept between runs, in ~/.cache/googlenet_jax (XDG_CACHE_HOME): compiled programs, and decoded images."""

import contextlib
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence

import numpy as np

from googlenet_jax.host.checkpoints import replacing


def folder() -> pathlib.Path:
  """Where everything lies; it may not be there yet."""
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'googlenet_jax'


def arrays(
  name: str, sources: Sequence[pathlib.Path], read: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
  """What `read` makes of some files: read now, or kept from the last time that they were read.

  Files are the same if path, size and time of change are. What is kept has checksums; where it is damaged, or cannot
  be written, the files are read.

  Args:
    name: of what is kept; sources of another place have another file.
    sources: the files.
    read: makes named arrays of them.

  Returns:
    The arrays.
  """
  place = hashlib.sha256(str(sources[0].resolve()).encode()).hexdigest()[:8]
  path = folder() / f'{name}_{place}.npz'
  state = str([(source.name, source.stat().st_size, source.stat().st_mtime_ns) for source in sources])
  with (
    contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),  # not there, or damaged
    path.open('rb') as file,
    np.load(file, allow_pickle=False) as kept,
  ):
    if kept['of'] == state:
      return {key: kept[key] for key in kept if key != 'of'}
  found = read()
  with contextlib.suppress(OSError):  # without room for it the next run takes its time again
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open('wb') as file:
      np.savez(file, of=state, **found)
  return found
