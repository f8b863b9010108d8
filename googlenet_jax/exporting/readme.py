"""README.md of an export, for somebody who never heard of this program."""

import textwrap
from collections.abc import Sequence
from typing import Any

from googlenet_jax.data import crops
from googlenet_jax.exporting.artefact import Artefact
from googlenet_jax.exporting.card import CARD, EXAMPLE, SAMPLE
from googlenet_jax.host.errors import one_line

SHOWN = 100  # classes in README.md; card.json has all


def text(card: dict[str, Any], artefact: Artefact) -> str:
  """Returns the text: parts with their headings."""
  parts = {
    'Run it': _use(card, artefact),
    'Classes': _classes(card['classes']),
    'Accuracy': _accuracy(card['accuracy']),
    'Images': _images(card),
    'Limits': _limits(card, artefact),
    'Files': _files(artefact),
    'Licence': _filled(card['licence']),
  }
  return _title(card) + ''.join(f'\n## {heading}\n\n{part}\n' for heading, part in parts.items())


def _title(card: dict[str, Any]) -> str:
  count = len(card['classes'])
  members = f'It is an ensemble of {card["networks"]}, whose probabilities are averaged. Each'
  return f"""# {one_line(card['name'])}: a GoogLeNet for {count} classes

A neural network that says what a picture shows: it gives each of {count} classes a probability. The network is
GoogLeNet (Inception v1; Szegedy et al., "Going deeper with convolutions", 2015, arXiv:1409.4842).
{members if card['networks'] > 1 else 'It'} has {card['parameters']:,} parameters. Data set: {one_line(card['data'])}.
Format: {card['format']}, for {card['runs_on']}.
Made by {card['made']['by']} on {card['made']['date']}. `{CARD}` says all this for programs.
"""


def _kind(card: dict[str, Any]) -> str:
  channels = card['input']['shape'][-1]
  return {1: 'grey images', 3: 'RGB images'}.get(channels, f'images of {channels} channels')


def _use(card: dict[str, Any], artefact: Artefact) -> str:
  sample, channels = card['sample'], card['input']['shape'][-1]
  cut = f' ({sample["cut"]})' if sample['cut'] else ''
  about = (
    f'`{EXAMPLE}` runs the network on the {len(sample["from"])} real images of `{SAMPLE}`{cut}, and prints the largest '
    f'difference from the probabilities that are stored there. Here it was '
    f'{card["check"]["largest_difference_in_sample"]:.1e}. Read it to see how the network is used: it is short. Other '
    'versions of these packages can work too.'
  )
  return f"""    pip install {' '.join(artefact.needs)}
    python {EXAMPLE}

{_filled(about)}

| | name | type | shape |
|---|---|---|---|
| input | `images` | uint8 | `[N, H, W, {channels}]`: {_kind(card)}, one or more, of any size |
| output | `probabilities` | float32 | `[N, {len(card['classes'])}]`: in the order of the classes; a row sums to 1 |"""


def _filled(text: str, indent: str = '') -> str:
  return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _classes(names: Sequence[str]) -> str:
  shown = ', '.join(f'`{one_line(name)}`' for name in names[:SHOWN])
  return shown + (f', and {len(names) - SHOWN} more: see `classes` in {CARD}' if names[SHOWN:] else '')


def _accuracy(found: Sequence[dict[str, Any]]) -> str:
  if not found:
    return 'It was not measured for these weights.'
  lines = ['| of | images | crops per image | accuracy |', '|---|---|---|---|']
  for one in found:
    images = f'{one["images"]} of ' if 'images' in one else ''
    accuracy = f'{100 * one["accuracy"]:.2f} %'
    lines.append(f'| {one["of"]} | {images}{one["split"]} | {crops.label(one["crops"])} | {accuracy} |')
  lines += ['', 'This export looks at one crop: the middle of the image.']
  if any(one['split'] == 'validation' for one in found):
    lines.append('Validation images may have been used to choose these weights.')
  return '\n'.join(lines)


def _images(card: dict[str, Any]) -> str:
  return _filled(
    f"Give pixels from 0 to 255, {_kind(card)}, turned upright as the file's EXIF says. The network prepares them "
    f'itself: {card["preparation"]}. This preparation is {card["preparation_is"]}.'
  )


def _limits(card: dict[str, Any], artefact: Artefact) -> str:
  limits = [
    'It always answers with its own classes, also when a picture shows something else.',
    'A high probability is no proof: pictures unlike those of the training can be named wrongly and with confidence.',
  ]
  if side := card.get('largest_side'):
    limits.append(
      f'In training, pictures with a side of more than {side} pixels were first shrunk to {side}, in proportion. '
      'Shrink them likewise, or probabilities differ a little.'
    )
  limits += ['All images of one call have one size.', *artefact.facts.get('limits', ())]
  return '\n'.join(_filled(f'- {limit}', '  ') for limit in limits)


def _files(artefact: Artefact) -> str:
  others = {
    EXAMPLE: 'runs the network',
    SAMPLE: 'real images, and the probabilities of the original network',
    CARD: 'facts for programs, and the sha256 of every file',
  }
  return '\n'.join(f'- `{name}`: {what}' for name, what in (artefact.files | others).items())
