"""Draws class activation maps over images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from googlenet_jax.classifier import Classifier
from googlenet_jax.data import splits
from googlenet_jax.evaluation.own_matplotlib import LinearSegmentedColormap

# Purple and orange: people with every kind of colour blindness can tell them apart, and one is darker.
COLOURS = LinearSegmentedColormap.from_list('for_and_against', ['#4B2A99', '#999999', '#FF8A00'])
LEAST, MOST = 160, 512  # pixels: small pictures are enlarged to show a smooth map, large ones shrunk
STRONGEST = 0.8  # share of the colour where the map is strongest; the rest is the picture in grey
UNSEEN = 0.75  # share of white where the network did not look


def meaning(shown: str) -> str:
  """Says what the colours of a map mean; `shown` says whose map it is, such as 'the answer'."""
  return f'orange speaks for {shown}, purple against it; pale parts were cut off before the network saw the picture'


def of_said(classifier: Classifier, batch: dict[str, np.ndarray], labels: Sequence[int]) -> list[np.ndarray]:
  """Returns each image of a batch under the map of one class, each on its own scale; see `overlay`.

  Args:
    classifier: the network.
    batch: images, see `Split.batch`.
    labels: the class of each image whose map is drawn.
  """
  maps, _ = classifier.class_maps({name: batch[name] for name in ('image', 'size') if name in batch})
  drawn = []
  for picture, own, label in zip(splits.pictures(batch), maps, labels, strict=True):
    chosen = own[..., label]
    drawn.append(overlay(picture, chosen, classifier.box(*picture.shape[:2]), np.abs(chosen).max()))
  return drawn


def overlay(picture: np.ndarray, heat: np.ndarray, box: tuple[float, float, float, float], scale: float) -> np.ndarray:
  """Returns a picture in grey under a map in colours; what the network did not see is pale.

  Args:
    picture: `[H, W, C]`, uint8 or floating point in [0, 1].
    heat: float `[h, w]`.
    box: top, left, height and width of what the map covers, in pixels of the picture; it may reach beyond it.
    scale: value of the strongest colour.

  Returns:
    float `[H', W', 3]` in [0, 1]; the longer side has LEAST to MOST pixels, or a little more.
  """
  grey, factor = _resized_grey(picture)
  top, left, bottom, right = (round(factor * n) for n in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
  rows, columns = slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0))
  seen = grey[rows, columns]
  size = max(right - left, 1), max(bottom - top, 1)
  values = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
  values = values[rows.start - top :, columns.start - left :][: seen.shape[0], : seen.shape[1]]
  out = np.repeat(UNSEEN + (1 - UNSEEN) * grey[..., None], 3, axis=2)
  out[rows, columns] = blended(seen, np.clip(values / (scale or 1), -1, 1))
  return out


def blended(grey: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Returns `[h, w, 3]`: grey `[h, w]` in [0, 1] under the colours of values `[h, w]` in [-1, 1]."""
  share = STRONGEST * np.abs(values)[..., None]
  return (1 - share) * grey[..., None] + share * COLOURS((values + 1) / 2)[..., :3]


def _resized_grey(picture: np.ndarray) -> tuple[np.ndarray, float]:
  """Returns the picture in grey, float `[H', W']` in [0, 1], and by how much it was enlarged."""
  pixels = picture if picture.dtype == np.uint8 else np.round(255 * picture).astype(np.uint8)
  image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert('L')
  longest = max(image.size)
  factor = -(-LEAST // longest) if longest < LEAST else min(1.0, MOST / longest)
  if factor != 1:
    size = [max(1, round(factor * side)) for side in image.size]
    image = image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
  return np.asarray(image) / 255, factor
