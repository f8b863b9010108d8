"""Writes a network as StableHLO: one file that JAX alone runs, on a CPU, an NVIDIA GPU or a TPU."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from googlenet_jax.classifier import Classifier
from googlenet_jax.data import augment
from googlenet_jax.exporting.artefact import TOLERANCE, Artefact, check_size, pinned
from googlenet_jax.host import backend

FILE = 'googlenet.stablehlo'
PLATFORMS = ('cpu', 'cuda', 'tpu')
BFLOAT16_TOLERANCE = 0.05  # bfloat16 has three digits, and the comparison is with float32

EXAMPLE = """import json
import pathlib

import jax
import numpy as np
from jax import export

folder = pathlib.Path(__file__).parent
network = export.deserialize(bytearray((folder / 'googlenet.stablehlo').read_bytes()))
sample, classes = np.load(folder / 'sample.npz'), json.loads((folder / 'card.json').read_text())['classes']
found = np.asarray(jax.jit(network.call)(sample['images']))  # uint8 [N, H, W, C] -> float32 [N, classes]
print(f'first image: {classes[found[0].argmax()]!r}')
print('largest difference:', abs(found - sample['probabilities']).max())
"""


def write(classifier: Classifier, folder: pathlib.Path) -> Artefact:
  """Writes the file, and reads it back to run it.

  Args:
    classifier: the network, or an ensemble.
    folder: where the file goes.

  Raises:
    UserError: the weights are too large for one file.
  """
  path = folder / FILE
  path.write_bytes(exported(classifier).serialize())
  found = export.deserialize(bytearray(path.read_bytes()))
  run = jax.jit(found.call)
  full = classifier.recipe.dtype == 'float32'
  facts = {
    'platforms': list(found.platforms),
    'arithmetic': 'float32, at full precision on every platform' if full else classifier.recipe.dtype,
    'calling_convention_version': found.calling_convention_version,
    'readable_by': f'jax {jax.__version__}, versions up to 3 weeks older, and versions up to 6 months newer: this is '
    "jax.export's guarantee; newer versions can work",
    'limits': [
      'JAX compiles it for each new number and size of images, which takes seconds: keep to few of them.',
      'Give at least one image.',
      'On a CPU, some convolutions are slower than in the program that made the file: their fastest form needs a '
      'number of images that is known when the file is written.',
      f'It runs on {", ".join(PLATFORMS)}. On other platforms, such as rocm, JAX refuses it.',
    ],
  }
  return Artefact(
    files={FILE: 'the preparation of images, the network, and softmax, for each platform'},
    run=lambda images: np.asarray(run(images)),
    tolerance=TOLERANCE if full else BFLOAT16_TOLERANCE,
    example=EXAMPLE,
    needs=pinned('jax', 'flatbuffers', 'numpy'),
    facts=facts,
  )


def exported(classifier: Classifier) -> export.Exported:
  """Traces the network once, for every platform and for images of any size; its weights become constants.

  Raises:
    UserError: the weights are too large for one file.
  """
  classifier = _without_auxiliary(classifier)
  check_size(sum(leaf.nbytes for leaf in jax.tree.leaves(classifier.networks)), 'stablehlo')
  batch, height, width = export.symbolic_shape('N, H, W')
  images = jax.ShapeDtypeStruct((batch, height, width, classifier.channels), jnp.uint8)
  # Without this, a GPU or TPU computes float32 with fewer digits, and a setting of this machine would decide it.
  precision = 'highest' if classifier.recipe.dtype == 'float32' else None
  with backend.our_settings(), jax.default_matmul_precision(precision), _without_places():
    return export.export(jax.jit(_probabilities(classifier)), platforms=PLATFORMS)(images)


def _probabilities(classifier: Classifier) -> Callable[[jax.Array], jax.Array]:
  """Returns the function that is exported: uint8 `[N, H, W, C]` to float32 `[N, num_classes]`."""
  size, options = classifier.recipe.image_size, classifier.recipe.augment
  networks = jax.tree.map(np.asarray, classifier.networks)

  def probabilities(images):
    prepared = augment.prepare(images, size, options.padding, resize=options.resize)
    of_member = lambda variables: jax.nn.softmax(nnx.merge(classifier.graphdef, *variables)(prepared))
    if len(networks) == 1:
      return of_member(networks[0])
    # A loop, or an ensemble of seven would be a program seven times as long.
    return jax.lax.map(of_member, jax.tree.map(lambda *leaves: np.stack(leaves), *networks)).mean(0)

  return probabilities


def _without_auxiliary(classifier: Classifier) -> Classifier:
  """Leaves out the auxiliary classifiers, which help to train: their weights would be constants of the program."""
  if classifier.recipe.model.auxiliary == 'none':
    return classifier
  config = classifier.recipe.copy_and_resolve_references()
  config.model.auxiliary = 'none'
  kept = lambda tree: {name: part for name, part in tree.items() if not name.startswith('aux_')}
  networks = [tuple(map(kept, network)) for network in classifier.networks]
  return classifier.with_recipe(config, networks)


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
  """Inside the block, programs do not note from which files of this machine they come."""
  name = 'jax_traceback_in_locations_limit'
  before = getattr(jax.config, name)
  jax.config.update(name, 0)
  try:
    yield
  finally:
    jax.config.update(name, before)
