"""The form of a data set in this program: splits of images and labels, in memory or on disk."""

import contextlib
import dataclasses
import functools
import os
import threading
import time
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from PIL import Image

from googlenet_jax.data.pictures import shrunk
from googlenet_jax.host.errors import UserError

SPLITS = ('train', 'validation', 'test')
MOST_BYTES = 2**30  # images go into a checksum up to here, which takes a second
SKIPPED = 'skipped'  # in the place of a split: the file could not be read when training began


@dataclasses.dataclass(frozen=True)
class Split:
  """Images and labels. `images[indices]` is uint8 `[n, H, W, C]`, for images in memory and on disk alike.

  Images of many sizes lie in the upper left of a canvas `[H, W]`.
  """

  images: Any
  labels: np.ndarray  # int32 [N]
  sizes: np.ndarray | None = None  # int32 [N, 2], heights and widths; None for images of one size or on disk
  files: np.ndarray | None = None  # str [N], paths relative to the folder of the data set; None for sets without files
  damaged: Collection[str] = ()  # files that cannot be read; it may grow while pictures are decoded

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def in_memory(self) -> bool:
    """Whether the images are an array. Otherwise each use decodes them."""
    return isinstance(self.images, np.ndarray)

  @functools.cached_property
  def bytes_each(self) -> int:
    """Bytes of an image with its canvas."""
    return self.images[np.arange(1)].nbytes

  def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the examples at `indices` as one batch.

    Args:
      indices: int `[n]`.

    Returns:
      `image` uint8 `[n, H, W, C]`, `label` int32 `[n]`, and for images of many sizes `size` int32 `[n, 2]`.
    """
    if self.in_memory:
      images, sizes = self.images[indices], None if self.sizes is None else self.sizes[indices]
    else:
      begin = time.perf_counter()
      images, sizes = self.images.fetch(indices)
      self.images.pace.add(len(images), time.perf_counter() - begin)
    return {'image': images, 'label': self.labels[indices], **({} if sizes is None else {'size': sizes})}

  def picture(self, index: int) -> np.ndarray:
    """Returns one image without its canvas, uint8 `[h, w, C]`."""
    return pictures(self.batch(np.array([index])))[0]

  def name_of(self, index: int) -> str:
    """Returns the file of an image, or its place such as `#7` in a set without files."""
    return f'#{index}' if self.files is None else str(self.files[index])

  def count_damaged(self) -> int:
    """Returns how many pictures could not be read so far. In a test a black picture takes the place of each."""
    return sum(file in self.damaged for file in self.files) if self.damaged else 0

  def fingerprint(self) -> dict[str, int]:
    """Returns the number of images, and checksums of the labels and of file names, or of images in memory."""
    found = {'images': len(self), 'checksum of labels': zlib.crc32(np.ascontiguousarray(self.labels))}
    if self.files is not None:
      names = '\0'.join(self.files).encode(errors='surrogateescape')
      found['checksum of file names'] = zlib.crc32(names)
    elif self.in_memory:
      found['checksum of images'] = zlib.crc32(np.ascontiguousarray(self.images).reshape(-1)[:MOST_BYTES])
    return found

  def take(self, indices: np.ndarray) -> 'Split':
    """Returns a split with the examples at `indices`."""
    images = self.images[indices] if self.in_memory else self.images.take(indices)
    sizes, files = (None if array is None else array[indices] for array in (self.sizes, self.files))
    return Split(images, self.labels[indices], sizes, files, self.damaged)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A classification data set; `validation` is None if nothing was held out."""

  name: str
  train: Split
  validation: Split | None
  test: Split
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]  # H, W, C
  skipped: tuple[tuple[str, str], ...] = ()  # file and class of pictures in no split, for they cannot be read

  def rows(self) -> list[tuple[str, str, str]]:
    """Returns file, class and split of every picture; empty for a set without files."""
    found = []
    for name in SPLITS:
      split = getattr(self, name)
      if split is not None and split.files is not None:
        found += [(file, self.class_names[i], name) for file, i in zip(split.files, split.labels, strict=True)]
    return found + [(file, of, SKIPPED) for file, of in self.skipped]

  def fingerprint(self) -> dict[str, Any]:
    """Returns what must be the same in all processes that train on this data set, by its name; see `Split`."""
    classes = '\0'.join(self.class_names).encode(errors='surrogateescape')
    found = {'shape of images': list(self.image_shape), 'classes': len(self.class_names)}
    found['checksum of class names'] = zlib.crc32(classes)
    for name in SPLITS:
      split = getattr(self, name)
      parts = {'images': 0} if split is None else split.fingerprint()
      found |= {f'{name} {what}': value for what, value in parts.items()}
    return found


class Pace:
  """Counts images and the seconds that threads took to decode them."""

  def __init__(self):
    """Begins at zero."""
    self._lock, self._count, self._seconds = threading.Lock(), 0, 0.0

  def add(self, count: int, seconds: float) -> None:
    """Adds what one thread did."""
    with self._lock:
      self._count, self._seconds = self._count + count, self._seconds + seconds

  def take(self) -> float | None:
    """Returns the images a second of one thread since the last call; None if none was decoded."""
    with self._lock:
      count, seconds, self._count, self._seconds = self._count, self._seconds, 0, 0.0
    return count / seconds if count else None


@contextlib.contextmanager
def damage_as_user_error(folder: str | os.PathLike) -> Iterator[None]:
  """Turns the errors of array_record and of decoders, which have many types, into a UserError with the folder."""
  try:
    yield
  except MemoryError:
    raise
  except Exception as error:
    why = next(iter(str(error).splitlines()), type(error).__name__)
    raise UserError(f'{os.fspath(folder)} is damaged ({why}): delete that folder and run again') from error


class RecordImages:
  """Images of a TFDS data source that is too large for memory. They are indexed like an array and decoded on demand."""

  def __init__(self, source: Any, indices: np.ndarray, folder: str | os.PathLike, canvas: int | None = None):
    """Makes a view of `source[indices]`.

    Args:
      source: TFDS data source; its records have an `image`.
      indices: int `[N]`, records of the view.
      folder: where the records are, for what is said of damaged ones.
      canvas: side of the canvas in pixels for images of many sizes; None for images of one size.
    """
    self._source, self._indices, self._folder, self._canvas, self.pace = source, indices, folder, canvas, Pace()

  def fetch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns uint8 `[n, H, W, C]`, and heights and widths int32 `[n, 2]` for images of many sizes, otherwise None."""
    with damage_as_user_error(self._folder):
      images = [record['image'] for record in self._source.__getitems__([int(i) for i in self._indices[indices]])]
    return (np.stack(images), None) if self._canvas is None else on_canvas(images, self._canvas)

  def __getitem__(self, indices: np.ndarray) -> np.ndarray:
    return self.fetch(indices)[0]

  def take(self, indices: np.ndarray) -> 'RecordImages':
    """Returns a view of the images at `indices`."""
    return RecordImages(self._source, self._indices[indices], self._folder, self._canvas)


def pictures(batch: dict[str, np.ndarray]) -> list[np.ndarray]:
  """Returns the images of a batch without their canvas, uint8 `[h, w, C]` each."""
  if 'size' not in batch:
    return list(batch['image'])
  return [image[:height, :width] for image, (height, width) in zip(batch['image'], batch['size'], strict=True)]


def on_canvas(images: list[np.ndarray], side: int) -> tuple[np.ndarray, np.ndarray]:
  """Copies images of many sizes into the upper left of squares. Larger images are resized to fit.

  Args:
    images: uint8 `[h, w, C]` each.
    side: side of the squares in pixels.

  Returns:
    uint8 `[n, side, side, C]`, and heights and widths int32 `[n, 2]`.
  """
  canvas = np.zeros((len(images), side, side, images[0].shape[-1]), np.uint8)
  sizes = np.empty((len(images), 2), np.int32)
  for i, image in enumerate(images):
    if max(image.shape[:2]) > side:
      small = np.asarray(shrunk(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), side))
      image = small.reshape(*small.shape[:2], -1)
    height, width = image.shape[:2]
    canvas[i, :height, :width], sizes[i] = image, (height, width)
  return canvas, sizes
