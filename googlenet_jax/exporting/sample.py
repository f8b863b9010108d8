"""Chooses the real images that an export is checked on, and compares its answers with ours."""

import os
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np

from googlenet_jax.classifier import Classifier
from googlenet_jax.data.splits import Split
from googlenet_jax.evaluation import sources
from googlenet_jax.host import console
from googlenet_jax.host.errors import UserError

COUNT = 16  # images in sample.npz
CANDIDATES = 64  # images to choose from


def of_split(split: Split) -> tuple[list[np.ndarray], list[str]]:
  """Returns images of a split, spread evenly over it, and where each comes from."""
  places = _spread(len(split), CANDIDATES)
  images = [split.picture(i) for i in places]
  kept = [i for i, place in enumerate(places) if split.name_of(place) not in split.damaged]
  return [images[i] for i in kept], [split.name_of(places[i]) for i in kept]


def of_paths(paths: Sequence[str], classifier: Classifier) -> tuple[list[np.ndarray], list[str]]:
  """Reads pictures that the user names; those that cannot be read are named in notes.

  Raises:
    UserError: there is not one picture, or the network takes none.
  """
  if classifier.channels not in (1, 3):
    raise UserError(f'the network takes images of {classifier.channels} channels, and picture files have 1 or 3')
  found = sources.find(paths, classifier.classes)
  chosen = [found[i] for i in _spread(len(found), CANDIDATES)]
  read = list(sources.read_ahead(chosen, classifier.channels, classifier.recipe.data.canvas))
  for one in read:
    if one.error:
      console.complain(f'note: {one.error}')
  read = [one for one in read if not one.error]
  return [one.pixels for one in read], [os.path.basename(one.found.name) for one in read]


def _spread(count: int, most: int) -> list[int]:
  """Returns up to `most` of the numbers below `count`, evenly spread: the images of a class often stand together."""
  return [int(i) for i in np.linspace(0, count - 1, min(count, most)).round()]


def choose(images: list[np.ndarray], names: list[str]) -> tuple[list[np.ndarray], list[str], str]:
  """Chooses COUNT images, cuts them to one size if they have several, and adds one image of another size.

  One size makes one batch, which is easy to use. A second size shows that images of any size can be given. Some
  programs compile for each size, so more sizes would take minutes. The size is near the median, so the images are
  enlarged or shrunk as most images are.

  Args:
    images: uint8 `[h, w, C]` each.
    names: where they come from.

  Returns:
    The images, their names, and in words how they were cut: the fields `sample`, `names` and `cut` of `Pictures`.

  Raises:
    UserError: there are fewer than COUNT images.
  """
  if len(images) < COUNT:
    raise UserError(
      f'an export is checked on {COUNT} real images, and there are {len(images)}: name at least {COUNT} pictures, or a '
      'folder of them, after the flags'
    )
  sizes = np.array([image.shape[:2] for image in images])
  [((height, width), count)] = Counter(map(tuple, sizes.tolist())).most_common(1)
  if count >= COUNT:
    fitting, cut = np.flatnonzero((sizes == (height, width)).all(1)), ''
  else:
    size = np.median(sizes, axis=0)
    while (sizes >= size.astype(int)).all(1).sum() < COUNT:
      size = np.maximum(size * 0.97, 1)
    height, width = map(int, size)
    fitting = np.flatnonzero((sizes >= (height, width)).all(1))
    cut = f'the middle {height}x{width} pixels of each'
  order = [int(fitting[i]) for i in _spread(len(fitting), COUNT)]
  sample = [_middle(images[i], height, width) for i in order]
  other = next((i for i, image in enumerate(images) if image.shape[:2] != (height, width)), None)
  if other is None:
    other, extra = 0, _middle(images[0], height, max(1, width * 3 // 4))
  else:
    extra = images[other]
  return [*sample, extra], [names[i] for i in [*order, other]], cut


def _middle(image: np.ndarray, height: int, width: int) -> np.ndarray:
  top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
  return image[top : top + height, left : left + width]


def answers(run: Callable[[np.ndarray], np.ndarray], images: Sequence[np.ndarray]) -> np.ndarray:
  """Returns what `run` says about images of several sizes: all images of one size are one batch."""
  found, shapes = [None] * len(images), dict.fromkeys(image.shape for image in images)
  for shape in shapes:
    places = [i for i, image in enumerate(images) if image.shape == shape]
    for place, row in zip(places, run(np.stack([images[i] for i in places])), strict=True):
      found[place] = row
  return np.stack(found)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
  """Returns the largest difference of a probability; infinite for another shape, and NaN if there are NaNs."""
  return float(np.abs(found - expected).max()) if found.shape == expected.shape else float('inf')


def ours(classifier: Classifier, images: Sequence[np.ndarray]) -> np.ndarray:
  """Returns our probabilities, computed in float32 whatever the recipe and the device."""
  if classifier.recipe.dtype != 'float32':
    config = classifier.recipe.copy_and_resolve_references()
    config.dtype = 'float32'
    classifier = classifier.with_recipe(config)
  with jax.default_matmul_precision('highest'):
    return answers(classifier.probabilities, images)
