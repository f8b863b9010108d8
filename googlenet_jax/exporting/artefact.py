"""What the formats and `export.py` tell each other.

Each format is a module with `write(classifier, folder, pictures) -> Artefact`. It writes its files into the folder.
`export.py` then runs them over real images, compares, and adds what is the same for all formats.

Every artefact takes `images`, uint8 `[N, H, W, C]` of any N, H and W, and returns `probabilities`, float32
`[N, num_classes]`. The preparation of images is part of it. In `sample.npz` the arrays have these names too.
"""

import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from googlenet_jax.data.splits import Split

TOLERANCE = 1e-4  # largest difference of a probability, for what computes in float32


class Pictures(NamedTuple):
  """Real images for an export."""

  sample: list[np.ndarray]  # at least 16 images, uint8 [H, W, C]; their sizes may differ
  names: list[str]  # where each comes from: a path, or its position in the split
  test: Split | None  # the test split; None if the run's data is not here
  calibration: Split | None  # validation images, or else training images; never test images


class Artefact(NamedTuple):
  """Written files, and how to run them."""

  files: tuple[str, ...]  # names in the folder
  run: Callable[[np.ndarray], np.ndarray]  # uint8 [N, H, W, C] -> float32 probabilities [N, num_classes]
  tolerance: float  # largest difference from our probabilities that is accepted
  example: str  # source of example.py: reads sample.npz, prints the largest difference; needs the target's package only
  needs: tuple[str, ...]  # packages that run the files, with tested versions, such as 'onnxruntime==1.32.0'
  # The format's own entries of card.json, which JSON can hold. `limits` may be a list of sentences for README.md.
  facts: dict[str, object]


def pinned(*packages: str) -> tuple[str, ...]:
  """Returns packages with the versions that are installed here, such as `jax==0.10.2`."""
  versions = (importlib.metadata.version(name).split('+')[0] for name in packages)  # 2.13.0 for a build 2.13.0+cpu
  return tuple(f'{name}=={version}' for name, version in zip(packages, versions, strict=True))
