"""card.json of an export: what the network is, for programs. `readme.py` says it for people."""

import datetime
import pathlib
import platform
from typing import Any

import jax

from googlenet_jax import __version__, recipe, runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.evaluation import stored
from googlenet_jax.exporting import place
from googlenet_jax.exporting.artefact import Artefact, Pictures
from googlenet_jax.exporting.formats import FORMATS
from googlenet_jax.exporting.sample import COUNT
from googlenet_jax.host import files

CARD, README, SAMPLE, EXAMPLE = place.CARD, 'README.md', 'sample.npz', 'example.py'
ASSUMED = (
  'assumed, as for the networks of the paper and of torchvision: a file of weights does not say how the images of its '
  'training were prepared. An export from the folder of the run knows it'
)
LICENCE = (
  'The code in this folder belongs to googlenet_jax and has the Apache License 2.0. The weights belong to whoever '
  'trained them. The images in sample.npz keep the terms of their data set.'
)


def make(
  classifier: Classifier, workdir: pathlib.Path, to: str, artefact: Artefact, check: dict[str, Any], pictures: Pictures
) -> dict[str, Any]:
  """Returns the card, without its files.

  Args:
    classifier: what was exported.
    workdir: folder of the run, or a file of weights.
    to: one of FORMATS.
    artefact: what was written.
    check: how it was compared with our probabilities.
    pictures: on what it was compared.
  """
  config = classifier.recipe
  trained = [part for name, part in classifier.params_shape.items() if not name.startswith('aux_')]
  return {
    'network': 'GoogLeNet (Inception v1), Szegedy et al. 2015, arXiv:1409.4842',
    'task': 'image classification',
    'format': FORMATS[to].what,
    'runs_on': FORMATS[to].runs_on,
    'made': {'by': f'googlenet_jax {__version__}', 'date': datetime.date.today().isoformat()},
    'classes': list(classifier.classes),
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(trained)),
    'networks': len(classifier.networks),
    'steps': list(classifier.steps),
    'input': {'name': 'images', 'type': 'uint8', 'shape': ['N', 'H', 'W', classifier.channels]},
    'output': {'name': 'probabilities', 'type': 'float32', 'shape': ['N', len(classifier.classes)]},
    'preparation': runs.preparation(config, classifier.channels),
    **(_of_run(classifier, workdir, artefact) if workdir.is_dir() else _of_weights(workdir)),
    'check': check,
    'sample': {
      'file': SAMPLE, 'arrays': ['images', 'probabilities'], 'from': pictures.names[:COUNT], 'cut': pictures.cut,
    },
    'artefact': artefact.facts,
    'needs': list(artefact.needs),
    'versions': {'python': platform.python_version(), 'jax': jax.__version__},
    'licence': LICENCE,
  }  # fmt: skip


def _of_run(classifier: Classifier, workdir: pathlib.Path, artefact: Artefact) -> dict[str, Any]:
  """Returns what is known of a run."""
  config = classifier.recipe
  kept, data = recipe.to_json(config), config.data.name
  for name in ('source_dir', 'data_dir'):
    kept['data'][name] = ''  # places on the machine of whoever trained
  kept['init_from'] = pathlib.PurePath(kept['init_from']).name
  if data == 'folder':
    trained_on = runs.recipe_of(workdir).data.source_dir  # the pictures may have moved
    data = f'{pathlib.PurePath(trained_on).name}, a folder of pictures'
  return {
    'name': workdir.resolve().name,
    'data': data,
    'preparation_is': 'that of the training',
    'largest_side': config.data.canvas,
    'accuracy': accuracies(classifier, workdir, artefact),
    'trained_with': files.read_json(runs.first_member(workdir) / runs.FILE).get('versions', {}),
    'recipe': kept,
  }


def _of_weights(path: pathlib.Path) -> dict[str, Any]:
  """Returns what is known of a file of weights: how it was trained is not."""
  data = 'unknown: the network came as a file of weights'
  return {'name': path.stem, 'data': data, 'preparation_is': ASSUMED, 'accuracy': []}


def accuracies(classifier: Classifier, workdir: pathlib.Path, artefact: Artefact) -> list[dict[str, Any]]:
  """Returns the accuracies of exactly these weights, with what was measured, split and crops; the export comes first.

  Args:
    classifier: the network.
    workdir: folder of its run.
    artefact: what was written; its fact `accuracy` is what was measured of the file itself.
  """
  last, members = max(classifier.steps), len(classifier.networks)
  whose, found = 'this network', []
  if own := artefact.facts.get('accuracy'):
    precision, whose = artefact.facts['precision'], f'the network in {classifier.recipe.dtype}'
    row = {'of': f'this file, in {precision}', 'split': 'test', 'images': own['images'], 'crops': 1}
    found.append(row | {'accuracy': own[precision]})
  evaluation = stored.read(workdir, len(classifier.classes))
  same = (evaluation.get('step'), evaluation.get('models')) == (last, members) and len(set(classifier.steps)) == 1
  measured = {}
  for row in evaluation['table'] if same else ():
    if row['models'] == members:
      error, images = row['top1_error'], evaluation['examples']
      measured['test', row['crops']] = {'images': images, 'crops': row['crops'], 'accuracy': round(1 - error, 6)}
  for record in runs.records(workdir) if members == 1 else ():
    # Not 'test_raw': those are other weights than the averaged ones.
    if record['step'] == last and record['split'] in ('validation', 'test'):
      measured.setdefault((record['split'], 1), {'crops': 1, 'accuracy': round(record['accuracy'], 6)})
  return found + [{'of': whose, 'split': split, **row} for (split, _), row in measured.items()]
