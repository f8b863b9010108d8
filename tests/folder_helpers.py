"""Folders of pictures for tests."""

import os
import zlib

import numpy as np
from PIL import Image

from googlenet_jax.data.splits import SPLITS


def save(path, height=6, width=8, colour=True, seed=None):
  """Writes a picture with pixels of its own."""
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(zlib.crc32(os.fsencode(path)) if seed is None else seed)
  Image.fromarray(rng.integers(0, 256, (height, width, 3) if colour else (height, width), np.uint8)).save(path)
  return path


def make(root, counts, **options):
  """Writes PNG files: `{'rose': 3}` gives rose/0.png to rose/2.png."""
  for name, count in counts.items():
    for i in range(count):
      save(root / name / f'{i}.png', **options)
  return root


def truncate(path):
  """Damages the pixels of a picture and leaves its header."""
  path.write_bytes(path.read_bytes()[:-60])


def files_of(dataset):
  return {name: list(getattr(dataset, name).files) for name in SPLITS if getattr(dataset, name) is not None}
