"""Decodes the pictures of a folder: all at once into memory, or those of a batch when it is due."""

import concurrent.futures
import copy
import math
import os
import pathlib
import threading
from collections.abc import Mapping

import numpy as np

from googlenet_jax.data import pictures
from googlenet_jax.data.splits import Pace, on_canvas
from googlenet_jax.host import console
from googlenet_jax.host.errors import UserError, one_line

MOST_THREADS = 16
PART = 16  # pictures that a thread decodes at a time


def threads() -> int:
  """Returns how many threads decode pictures. PIL decodes outside Python's lock."""
  return min(os.cpu_count() or 1, MOST_THREADS)


class Damage:
  """The pictures that turned out to be unreadable, and how many may."""

  def __init__(self, root: pathlib.Path, total: int, most: float, reasons: Mapping[str, str]):
    """Begins with files that could not be read before.

    Args:
      root: the folder.
      total: pictures in the folder.
      most: largest share that may be unreadable.
      reasons: a line for each unreadable file, by its name; the line names it too.

    Raises:
      UserError: there are too many.
    """
    self._root, self._total, self._most, self._lock = root, total, most, threading.Lock()
    self.reasons = dict(reasons)  # a line for each file
    self._check()

  def add(self, file: str, reason: str) -> bool:
    """Notes that a file is damaged; returns whether that is new. Too many raise UserError."""
    with self._lock:
      if file in self.reasons:
        return False
      self.reasons[file] = reason
      self._check()
      return True

  def _check(self) -> None:
    count, allowed = len(self.reasons), math.floor(self._most * self._total + 1e-6)  # 0.29 * 100 is 28.999...
    if count > allowed:
      first = '; '.join(list(self.reasons.values())[:3])
      raise UserError(
        f'{count:,} of {self._total:,} pictures in {one_line(self._root)} cannot be read, and '
        f'config.data.max_unreadable={self._most:g} allows {allowed:,}: {first}'
        f'{"; ..." if count > 3 else ""}. Repair or delete them, or allow more, such as '
        f'--config.data.max_unreadable={math.ceil(100 * count / self._total) / 100:g}'
      )


class FolderImages:
  """Pictures of a folder that are decoded on demand. They are indexed like an array.

  A picture that turns out to be damaged changes nothing else. Among training images another picture of its class takes
  its place: the next one in the split that can be read. Elsewhere nothing may count twice: its place is black.
  """

  def __init__(
    self, root: pathlib.Path, files: np.ndarray, canvas: int, channels: int, damage: Damage, labels: np.ndarray | None
  ):
    """Makes a view of files.

    Args:
      root: the folder.
      files: str `[N]`, relative to it.
      canvas: side of the canvas in pixels.
      channels: 1 or 3.
      damage: collects the files that cannot be read.
      labels: int32 `[N]` for training images: pictures of equal labels replace each other. None: a black canvas does.
    """
    self._root, self._files, self._canvas, self._channels = root, files, canvas, channels
    self._damage, self._indices, self.pace = damage, np.arange(len(files)), Pace()
    self._next = None if labels is None else _next_alike(labels)

  def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 `[n, canvas, canvas, C]`, and heights and widths int32 `[n, 2]`."""
    return on_canvas([self._readable(int(i)) for i in self._indices[indices]], self._canvas)

  def __getitem__(self, indices: np.ndarray) -> np.ndarray:
    return self.fetch(indices)[0]

  def take(self, indices: np.ndarray) -> 'FolderImages':
    """Returns a view of the pictures at `indices`."""
    view = copy.copy(self)
    view._indices = self._indices[indices]
    return view

  def _readable(self, index: int) -> np.ndarray:
    """Returns the picture of a file, or what takes its place."""
    image, other = self._read(index), index
    while image is None:
      if self._next is None:
        return np.zeros((self._canvas, self._canvas, self._channels), np.uint8)
      other = int(self._next[other])
      if other == index:
        raise UserError(
          f'{one_line(self._root)}: no picture of the class of {one_line(self._files[index])} can be read'
        )
      image = self._read(other)
    return image

  def _read(self, index: int) -> np.ndarray | None:
    file = self._files[index]
    try:
      return pictures.read(os.path.join(self._root, file), self._channels, self._canvas)
    except UserError as error:
      if self._damage.add(file, str(error)):
        console.say(f'unreadable: {error}')
      return None

  def decoded(self, replace: bool, done: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decodes every picture, by several threads.

    Args:
      replace: as in `fetch`; otherwise damaged pictures are left out.
      done: gets an entry for each picture that is done.

    Returns:
      Images uint8 `[n, canvas, canvas, C]`, their sizes int32 `[n, 2]`, and their indices int `[n]`.
    """
    count = len(self._indices)
    images = np.zeros((count, self._canvas, self._canvas, self._channels), np.uint8)
    sizes, good = np.ones((count, 2), np.int32), np.ones(count, bool)

    def work(start: int) -> None:
      for i in range(start, min(start + PART, count)):
        index = int(self._indices[i])
        image = self._readable(index) if replace else self._read(index)
        if image is None:
          good[i] = False
        else:
          (images[i],), (sizes[i],) = on_canvas([image], self._canvas)
        done.append(index)

    with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
      for _ in pool.map(work, range(0, count, PART)):
        pass
    kept = np.flatnonzero(good)
    if len(kept) < count:
      for place, i in enumerate(kept):  # in place: a copy would need as much memory again
        images[place] = images[i]
    return images[: len(kept)], sizes[kept], kept


def _next_alike(labels: np.ndarray) -> np.ndarray:
  """Returns for each place the next place with the same label; after the last one comes the first."""
  order = np.argsort(labels, kind='stable')
  following, ordered = np.roll(order, -1), labels[order]
  last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
  following[last] = order[np.append(0, last[:-1] + 1)]
  found = np.empty_like(order)
  found[order] = following
  return found
