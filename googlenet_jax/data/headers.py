"""Looks at the headers of picture files, and at the bytes of those that may be equal; remembers what it found."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from googlenet_jax.data import pictures
from googlenet_jax.host import cache, progress
from googlenet_jax.host.errors import UserError

THREADS = 8  # they wait for the disk; more did not help
# What is kept of each file beside its name: kind of number, and shape of a row.
COLUMNS = {'states': ('int64', 2), 'sides': ('int32',), 'grey': ('bool',), 'digests': ('uint8', 32)}
MANY = 2000  # new pictures: looking at them takes long enough to say so


@dataclasses.dataclass(frozen=True)
class Look:
  """What headers and bytes say of pictures."""

  sides: np.ndarray  # int32 [N], longer side in pixels; 0 for a file that cannot be read
  grey: np.ndarray  # bool [N]
  digests: list[bytes]  # equal for equal files; empty for a file whose size no other has
  reasons: dict[int, str]  # why a file cannot be read, by its index


def look(root: pathlib.Path, files: Sequence[str]) -> Look:
  """Reads the headers of pictures, and the bytes of those that have the size of another one.

  What was found is kept in the cache by path, size and time of change, so the next start only asks for those.

  Args:
    root: the folder.
    files: relative to it.
  """
  states = _states(root, files)  # int64 [N, 2]: bytes, time
  known = _Known(root)
  headers = [known.get(file, state) for file, state in zip(files, states.tolist(), strict=True)]
  sizes = collections.Counter(states[:, 0].tolist())
  twins = [sizes[size] > 1 and size > 0 for size in states[:, 0].tolist()]
  new = [i for i, header in enumerate(headers) if header is None or (twins[i] and not header[2])]
  reasons = {}

  def examine(i: int) -> None:
    path = os.path.join(root, files[i])
    try:
      height, width, grey = pictures.header(path)
      headers[i] = max(height, width), grey, _digest(path) if twins[i] else b''
    except (UserError, OSError) as error:
      headers[i] = 0, False, b''
      reasons[i] = str(error)

  if len(new) > MANY:
    done = []
    with progress.waiting(f'looking at {len(new):,} new pictures', 'once', lambda: f'{len(done):,} so far'):
      _in_threads(lambda i: done.append(examine(i)), new)
  else:
    _in_threads(examine, new)
  if new:
    known.keep(files, states, headers)
  sides, grey, digests = zip(*headers, strict=True)
  return Look(np.array(sides, np.int32), np.array(grey, bool), list(digests), dict(sorted(reasons.items())))


def _in_threads(work, items: Sequence[int]) -> None:
  parts = [items[start : start + 256] for start in range(0, len(items), 256)]
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    for _ in pool.map(lambda part: [work(item) for item in part], parts):
      pass


def _states(root: pathlib.Path, files: Sequence[str]) -> np.ndarray:
  states = np.zeros((len(files), 2), np.int64)
  for i, file in enumerate(files):
    try:
      status = os.stat(os.path.join(root, file))
      states[i] = status.st_size, status.st_mtime_ns
    except OSError:  # a link to nothing: reading its header says so
      pass
  return states


def _digest(path: str) -> bytes:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').digest()


class _Known:
  """What earlier starts found out about the pictures of a folder."""

  def __init__(self, root: pathlib.Path):
    self._name = f'folder_{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}'
    kept = cache.read_file(self._name)
    self._rows = {}
    if kept is not None and kept.keys() >= {'files', *COLUMNS}:
      files = os.fsdecode(kept['files'].tobytes()).split('\0')
      columns = [kept[name] for name in COLUMNS]
      if [(column.dtype, column.shape) for column in columns] == [
        (np.dtype(kind), (len(files), *rest)) for kind, *rest in COLUMNS.values()
      ]:
        rows = zip(files, *(column.tolist() for column in columns[:-1]), columns[-1], strict=True)
        self._rows = {file: (state, side, grey, digest.tobytes()) for file, state, side, grey, digest in rows}

  def get(self, file: str, state: list[int]) -> tuple[int, bool, bytes] | None:
    """Returns side, greyness and digest of a file that has not changed; None for any other."""
    row = self._rows.get(file)
    return (row[1], row[2], row[3] if any(row[3]) else b'') if row and row[0] == state else None

  def keep(self, files: Sequence[str], states: np.ndarray, headers: Sequence[tuple[int, bool, bytes]]) -> None:
    """Keeps what is known of the files that can be read; the others are looked at again the next time."""
    good = [i for i, header in enumerate(headers) if header[0]]
    if not good:
      return
    digests = b''.join(headers[i][2] or bytes(32) for i in good)
    cache.write_file(
      self._name,
      {
        'files': np.frombuffer(os.fsencode('\0'.join(files[i] for i in good)), np.uint8),
        'states': states[good],
        'sides': np.array([headers[i][0] for i in good], np.int32),
        'grey': np.array([headers[i][1] for i in good], bool),
        'digests': np.frombuffer(digests, np.uint8).reshape(-1, 32),
      },
    )
