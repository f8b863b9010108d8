"""What a data set is to the rest of the program: splits of images and labels, in memory or on disk."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Split:
  """Images and labels; `images[indices]` gives uint8 `[n, H, W, C]` whether they lie in memory or on disk."""

  images: Any
  labels: np.ndarray  # int32 [N]

  def __len__(self) -> int:
    return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A classification data set; `validation` is None where nothing was held out."""

  name: str
  train: Split
  validation: Split | None
  test: Split
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]  # H, W, C


class RecordImages:
  """Images of a TFDS data source too large for memory: indexed like an array, decoded when asked for."""

  def __init__(self, source: Any, indices: np.ndarray):
    """Views `source[indices]`."""
    self._source, self._indices = source, indices

  def __getitem__(self, indices: np.ndarray) -> np.ndarray:
    records = self._source.__getitems__([int(i) for i in self._indices[indices]])
    return np.stack([record['image'] for record in records])
