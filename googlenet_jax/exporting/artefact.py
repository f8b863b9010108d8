"""What the formats and `export.py` tell each other.

Each format is a module with `write(classifier, folder) -> Artefact`. It writes its files into the folder. `export.py`
then runs them over real images, compares, and adds what is the same for all formats.

Every artefact takes `images`, uint8 `[N, H, W, C]` of any H and W and N of at least 1, and returns `probabilities`,
float32 `[N, num_classes]`. The preparation of images is part of it. In `sample.npz` the arrays have these names too.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from googlenet_jax.data.splits import Split
from googlenet_jax.host.errors import UserError

TOLERANCE = 1e-4  # largest difference of a probability, for what computes in float32
LARGEST = 2**31 - 2**26  # bytes of weights: a file of StableHLO or ONNX ends at 2 GiB, and the program needs a few


class Pictures(NamedTuple):
  """Real images for an export."""

  sample: list[np.ndarray]  # at least 16 images, uint8 [H, W, C], and one of another size
  names: list[str]  # where each comes from: a path, or its position in the split
  cut: str  # how those of one size were cut, such as 'the middle 60x76 pixels of each'; empty if they are whole
  test: Split | None = None  # the test split; None if the run's data is not here
  calibration: Split | None = None  # validation images, or else training images; never test images


class Artefact(NamedTuple):
  """Written files, and how to run them."""

  files: dict[str, str]  # name in the folder: what it is, for a reader
  run: Callable[[np.ndarray], np.ndarray]  # uint8 [N, H, W, C] -> float32 probabilities [N, num_classes]
  tolerance: float | None  # largest difference from our probabilities; None where the format checks its answers itself
  example: str  # source of example.py: reads sample.npz, prints the largest difference; needs the target's package only
  needs: tuple[str, ...]  # packages that run the files, with tested versions, such as 'onnxruntime==1.32.0'
  # The format's own entries of card.json, which JSON can hold. `limits` may be a list of sentences for README.md.
  facts: dict[str, Any]


def pinned(*packages: str) -> tuple[str, ...]:
  """Returns packages with the versions that are installed here, such as `jax==0.10.2`."""
  versions = (importlib.metadata.version(name).split('+')[0] for name in packages)  # 2.13.0 for a build 2.13.0+cpu
  return tuple(f'{name}=={version}' for name, version in zip(packages, versions, strict=True))


def check_size(nbytes: int, what: str) -> None:
  """Refuses weights that one file of a format cannot hold.

  Args:
    nbytes: bytes of the weights.
    what: name of the format, for the message.

  Raises:
    UserError: they are too many.
  """
  if nbytes > LARGEST:
    raise UserError(
      f'the {what} file would have {nbytes / 2**30:.1f} GiB, and the format ends at 2: export the members of the '
      'ensemble one by one, or give --to=torch'
    )
