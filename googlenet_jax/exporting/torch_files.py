"""Writes a network for PyTorch: weights as `.pth` and `.safetensors`, and googlenet.py, which PyTorch alone runs."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from googlenet_jax.classifier import Classifier
from googlenet_jax.exporting.artefact import TOLERANCE, Artefact, pinned
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet, torch_weights, weight_files
from googlenet_jax.model.options import Options, numbers

MODULE = 'googlenet.py'
SUFFIXES = {'.pth': '', '.safetensors': ' (the same, for the package safetensors)'}  # and what README.md says of them

EXAMPLE = """import json
import pathlib

import googlenet
import numpy as np
import torch

folder = pathlib.Path(__file__).parent
classifier = googlenet.load(folder)  # or googlenet.load(folder, '.safetensors')
sample, classes = np.load(folder / 'sample.npz'), json.loads((folder / 'card.json').read_text())['classes']
with torch.inference_mode():
  found = classifier(torch.from_numpy(sample['images'])).numpy()  # uint8 [N, H, W, C] -> float32 [N, classes]
print(f'first image: {classes[found[0].argmax()]!r}')
print('largest difference:', abs(found - sample['probabilities']).max())
"""


def write(classifier: Classifier, folder: pathlib.Path) -> Artefact:
  """Writes the files, and reads them back to run them.

  With the options of torchvision's `googlenet`, files whose names begin with `torchvision` have its names.

  Args:
    classifier: the network, or an ensemble, which gets a file for each member.
    folder: where the files go.

  Raises:
    UserError: a package is missing.
  """
  stems, files = _write_weights(classifier, folder)
  source = pathlib.Path(__file__).with_name('torch_network.py')
  (folder / MODULE).write_bytes(source.read_bytes())
  facts = {
    'arithmetic': 'float32',
    'network': network_arguments(classifier),
    'preparation': preparation_arguments(classifier),
    'weights': stems['own'],
    'limits': [
      'On a GPU, PyTorch by default rounds the inputs of convolutions to TF32, and probabilities differ more; '
      '`torch.backends.cudnn.allow_tf32 = False` prevents that.'
    ],
  }
  if 'torchvision' in stems:
    facts['torchvision'] = _for_torchvision(classifier, stems['torchvision'])
  return Artefact(
    files={MODULE: 'the network and the preparation of images, in plain PyTorch'} | files,
    run=_reader(folder, facts),
    tolerance=TOLERANCE,
    example=EXAMPLE,
    needs=pinned('torch', 'numpy'),
    facts=facts,
  )


def _write_weights(classifier: Classifier, folder: pathlib.Path) -> tuple[dict[str, list[str]], dict[str, str]]:
  """Writes the weights of each member; returns the names without suffixes by naming, and what each file is."""
  count = len(classifier.networks)
  names = {'own': 'googlenet'} | ({'torchvision': 'torchvision'} if is_torchvisions(classifier) else {})
  stems = {naming: [f'{name}_{i}' if count > 1 else name for i in range(count)] for naming, name in names.items()}
  files = {}
  for naming, members in stems.items():
    for i, (stem, network) in enumerate(zip(members, classifier.networks, strict=True)):
      step = classifier.steps[i] if classifier.steps else 0
      tensors = torch_weights.to_torch(*jax.tree.map(np.asarray, network), counters=step, naming=naming)
      what = f'weights of member {i}' if count > 1 else 'weights'
      what += ", under the names of torchvision's googlenet" if naming == 'torchvision' else f', for {MODULE}'
      for suffix, kind in SUFFIXES.items():
        weight_files.write(folder / f'{stem}{suffix}', tensors)
        files[f'{stem}{suffix}'] = what + kind
  return stems, files


def _for_torchvision(classifier: Classifier, weights: list[str]) -> dict[str, Any]:
  """Returns what a reader needs to use the files in torchvision."""
  auxiliary, arguments = classifier.recipe.model.auxiliary != 'none', network_arguments(classifier)
  return {
    'weights': weights,
    'network': f'torchvision.models.googlenet(num_classes={len(classifier.classes)}, aux_logits={auxiliary}, '
    'init_weights=False, transform_input=False)',
    'note': 'torchvision does not prepare images: they must be as `prepare` of googlenet.py returns them, minus '
    f'{arguments["input_mean"] or [0]}, divided by {arguments["input_std"] or [1]}',
  }


def is_torchvisions(classifier: Classifier) -> bool:
  """Returns whether torchvision's `googlenet` is the same network, except for what it does to its input."""
  options, theirs = Options(**classifier.recipe.model), torch_weights.TORCHVISION
  same = ('inception', 'head', 'stem', 'norm', 'pool', 'ch5x5_kernel')
  ours = [getattr(options, name) for name in same]
  return (
    ours == [getattr(theirs, name) for name in same]
    and options.auxiliary in ('none', theirs.auxiliary)
    and classifier.channels == 3
  )


def network_arguments(classifier: Classifier) -> dict[str, Any]:
  """Returns the arguments of `torch_network.GoogLeNet`, as JSON can hold them."""
  options = dict(classifier.recipe.model)
  for name in ('input_mean', 'input_std'):
    options[name] = list(numbers(name, options[name], classifier.channels))
  return {
    'num_classes': len(classifier.classes),
    'channels': classifier.channels,
    **options,
    'image_size': classifier.recipe.image_size,
    'table': {name: list(widths) for name, widths in googlenet.TABLE.items()},
  }


def preparation_arguments(classifier: Classifier) -> dict[str, Any]:
  """Returns the arguments of `torch_network.prepare`."""
  config = classifier.recipe
  return {
    'image_size': config.image_size,
    'padding': config.augment.padding,
    'resize': float(config.augment.resize),
  }


def _reader(folder: pathlib.Path, facts: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function that runs what the folder holds.

  Raises:
    UserError: the two kinds of files differ.
  """
  import torch

  from googlenet_jax.exporting import torch_network  # what googlenet.py in the folder is

  classifier, other = (torch_network.assemble(folder, facts, suffix) for suffix in SUFFIXES)
  same = other.state_dict()
  for name, tensor in classifier.state_dict().items():
    if not torch.equal(tensor, same[name]):
      raise UserError(f'{folder}: {name} was read back differently from {" and ".join(SUFFIXES)}: look at the disk')

  def run(images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
      return classifier(torch.from_numpy(np.ascontiguousarray(images))).numpy()

  return run
