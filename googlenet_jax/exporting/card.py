"""card.json and README.md of an export: what the network is, for programs and for people."""

import datetime
import hashlib
import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax

from googlenet_jax import __version__, recipe, runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import crops
from googlenet_jax.exporting.artefact import Artefact
from googlenet_jax.host.errors import one_line

CARD, README, SAMPLE, EXAMPLE = 'card.json', 'README.md', 'sample.npz', 'example.py'
FORMATS = {  # name in flags: (what it is, what runs it)
  'stablehlo': ('StableHLO, written by jax.export', 'JAX'),
  'onnx': ('ONNX', 'ONNX Runtime, and other programs that read ONNX'),
  'torch': ('weights, and the network as a Python file', 'PyTorch'),
}
SHOWN = 100  # classes in README.md; card.json has all
LICENCE = (
  'The code in this folder belongs to googlenet_jax and has the Apache License 2.0. The weights belong to whoever '
  'trained them. The images in sample.npz keep the terms of their data set.'
)


def make(
  classifier: Classifier,
  workdir: pathlib.Path,
  to: str,
  artefact: Artefact,
  check: dict[str, Any],
  sample_names: Sequence[str],
) -> dict[str, Any]:
  """Returns the card, without its files.

  Args:
    classifier: what was exported.
    workdir: folder of the run, or a file of weights.
    to: one of FORMATS.
    artefact: what was written.
    check: how it was compared with our probabilities.
    sample_names: where the images of sample.npz come from.
  """
  config, count = classifier.recipe, len(classifier.classes)
  kept = recipe.to_json(config)
  for name in ('source_dir', 'data_dir'):
    kept['data'][name] = ''  # places on the machine of whoever trained
  kept['init_from'] = pathlib.PurePath(kept['init_from']).name
  trained = [part for name, part in classifier.params_shape.items() if not name.startswith('aux_')]
  is_run, data = workdir.is_dir(), config.data.name
  if data == 'folder':
    data = f'{pathlib.PurePath(config.data.source_dir).name}, a folder of pictures'
  return {
    'name': workdir.resolve().name if is_run else workdir.stem,
    'network': 'GoogLeNet (Inception v1), Szegedy et al. 2015, arXiv:1409.4842',
    'task': 'image classification',
    'format': FORMATS[to][0],
    'made': {'by': f'googlenet_jax {__version__}', 'date': datetime.date.today().isoformat()},
    'data': data if is_run else 'unknown: the network came as a file of weights',
    'classes': list(classifier.classes),
    'accuracy': accuracies(classifier, workdir) if is_run else [],
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(trained)),
    'networks': len(classifier.networks),
    'steps': list(classifier.steps),
    'input': {'name': 'images', 'type': 'uint8', 'shape': ['N', 'H', 'W', classifier.channels]},
    'output': {'name': 'probabilities', 'type': 'float32', 'shape': ['N', count]},
    'preparation': runs.preparation(config, classifier.channels),
    'largest_side': config.data.canvas,
    'check': check,
    'sample': {'file': SAMPLE, 'arrays': ['images', 'probabilities'], 'from': list(sample_names)},
    'artefact': artefact.facts,
    'needs': list(artefact.needs),
    'versions': {'python': platform.python_version(), 'jax': jax.__version__},
    'trained_with': _versions(workdir),
    'recipe': kept,
    'licence': LICENCE,
  }


def accuracies(classifier: Classifier, workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns what the run measured of exactly these weights: split, crops, accuracy. Empty if it measured nothing."""
  last, members = max(classifier.steps), len(classifier.networks)
  evaluation = _read(workdir / 'evaluation.json')
  same = (evaluation.get('step'), evaluation.get('models')) == (last, members) and len(set(classifier.steps)) == 1
  found = [
    {
      'split': evaluation['split'],
      'images': evaluation['examples'],
      'crops': row['crops'],
      'accuracy': round(1 - row['top1_error'], 6),
    }
    for row in (evaluation['table'] if same else ())
    if row['models'] == members
  ]
  there = {(one['split'], one['crops']) for one in found}
  for record in runs.records(workdir) if members == 1 else ():
    if record['step'] == last and record['split'] != 'train' and (record['split'], 1) not in there:
      found.append({'split': record['split'], 'crops': 1, 'accuracy': round(record['accuracy'], 6)})
      there.add((record['split'], 1))
  return found


def _versions(workdir: pathlib.Path) -> dict[str, str]:
  return _read(runs.first_member(workdir) / runs.FILE).get('versions', {})


def _read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; an empty one if it is missing or damaged, for none of this is needed."""
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def files_of(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns size and sha256 of each file of a folder, by name."""
  found = {}
  for path in sorted(folder.iterdir()):
    with path.open('rb') as file:
      found[path.name] = {'bytes': path.stat().st_size, 'sha256': hashlib.file_digest(file, 'sha256').hexdigest()}
  return found


# README.md -----------------------------------------------------------------------------------------------------------


def readme(card: dict[str, Any], to: str, artefact: Artefact) -> str:
  """Returns README.md, for somebody who never heard of this program."""
  what, runs_on = FORMATS[to]
  count, channels = len(card['classes']), card['input']['shape'][-1]
  together = (
    f'It is an ensemble of {card["networks"]}, whose probabilities are averaged. Each' if card['networks'] > 1 else 'It'
  )
  kind = {1: 'grey images', 3: 'RGB images'}.get(channels, f'images of {channels} channels')
  return f"""# {one_line(card['name'])}: a GoogLeNet for {count} classes

A neural network that says what a picture shows: it gives each of {count} classes a probability. The network is
GoogLeNet (Inception v1; Szegedy et al., "Going deeper with convolutions", 2015, arXiv:1409.4842).
{together} has {card['parameters']:,} parameters. Data set: {one_line(card['data'])}. Format: {what}, for {runs_on}.
Made by {card['made']['by']} on {card['made']['date']}. `card.json` says all this for programs.

## Run it

    pip install {' '.join(artefact.needs)}
    python {EXAMPLE}

`{EXAMPLE}` runs the network on the {len(card['sample']['from'])} real images of `{SAMPLE}`, and prints the largest
difference from the probabilities that are stored there. Here it was {card['check']['largest_difference']:.1e}, over
{card['check']['images']} images. Read it to see how the network is used: it is short. Other versions of these packages
can work too.

| | name | type | shape |
|---|---|---|---|
| input | `images` | uint8 | `[N, H, W, {channels}]`: {kind}, any number and any size |
| output | `probabilities` | float32 | `[N, {count}]`: in the order of the classes; each row sums to 1 |

## Classes

{_classes(card['classes'])}

## Accuracy

{_accuracy(card['accuracy'])}

## Images

Give pixels from 0 to 255, {kind}, turned upright as the file's EXIF says. The network prepares them itself:
{card['preparation']}.

## Limits

{_limits(card, artefact)}

## Files

{_files(artefact)}

## Licence

{card['licence']}
"""


def _classes(names: Sequence[str]) -> str:
  shown = ', '.join(f'`{one_line(name)}`' for name in names[:SHOWN])
  return shown + (f', and {len(names) - SHOWN} more: see `classes` in card.json' if names[SHOWN:] else '')


def _accuracy(found: Sequence[dict[str, Any]]) -> str:
  if not found:
    return 'It was not measured for these weights.'
  lines = ['| images | crops per image | accuracy |', '|---|---|---|']
  for one in found:
    images = f'{one["images"]} of ' if 'images' in one else ''
    lines.append(f'| {images}{one["split"]} | {crops.label(one["crops"])} | {100 * one["accuracy"]:.2f} % |')
  text = '\n'.join(lines) + '\n\nThis export looks at one crop: the middle of the image.'
  if any(one['split'] == 'validation' for one in found):
    text += ' Validation images may have been used to choose these weights.'
  return text


def _limits(card: dict[str, Any], artefact: Artefact) -> str:
  side = card['largest_side']
  limits = [
    'It always answers with its own classes, also when a picture shows something else.',
    'A high probability is no proof: pictures unlike those of the training can be named wrongly and with confidence.',
    f'In training, pictures with a side of more than {side} pixels were first shrunk to {side}, in proportion. Shrink '
    'them likewise, or probabilities differ a little.',
    'All images of one call have one size.',
    *artefact.facts.get('limits', ()),
  ]
  return '\n'.join(f'- {limit}' for limit in limits)


def _files(artefact: Artefact) -> str:
  own = {name: 'the network' for name in artefact.files}
  others = {
    EXAMPLE: 'runs the network',
    SAMPLE: 'real images, and the probabilities of the original network',
    CARD: 'facts for programs, and the sha256 of every file',
  }
  return '\n'.join(f'- `{name}`: {what}' for name, what in {**own, **others}.items())
