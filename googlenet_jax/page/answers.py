"""What the page says of one picture: likeliest classes, where the network finds them, and what it sees."""

import os
from typing import NamedTuple

import numpy as np
from PIL import Image

from googlenet_jax.classifier import Classifier
from googlenet_jax.data import inputs, pictures, splits
from googlenet_jax.host.errors import UserError, one_line
from googlenet_jax.page import markup

TOP = 5  # classes that are shown
SIDE = 300  # pixels: the longer side of a picture on the page


class Answer(NamedTuple):
  """The answer of a network to one picture; likeliest class first."""

  names: tuple[str, ...]
  probabilities: np.ndarray  # float32 [TOP]
  prepared: np.ndarray  # float32 [S, S, C] in [0, 1]: the picture as the network takes it
  maps: tuple[np.ndarray, ...]  # float [H, W, 3] in [0, 1]: the picture under the map of each class; empty without maps
  why: str  # why there are no maps


def read(path: str | os.PathLike, name: str, classifier: Classifier) -> np.ndarray:
  """Reads an upload for a network, uint8 `[h, w, C]`.

  Args:
    path: the file.
    name: its name on the user's machine; errors have this one, not the path here.
    classifier: the network that gets the picture.

  Raises:
    UserError: as `pictures.read`.
  """
  try:
    return pictures.read(path, classifier.channels, classifier.recipe.data.canvas)
  except UserError as error:
    raise UserError(str(error).replace(one_line(path), name or 'the picture')) from error


def recoloured(picture: np.ndarray, classifier: Classifier) -> np.ndarray:
  """Returns a picture of another run's data set, uint8 `[h, w, 1 or 3]`, with the channels that a network takes."""
  if picture.shape[-1] == classifier.channels:
    return picture
  if classifier.channels == 3:
    return np.repeat(picture, 3, axis=-1)
  return np.asarray(Image.fromarray(picture).convert('L'))[..., None]


def answer(classifier: Classifier, picture: np.ndarray) -> Answer:
  """Answers one picture.

  Args:
    classifier: a network or an ensemble.
    picture: uint8 `[h, w, C]`, of any size.
  """
  from googlenet_jax.evaluation import heat_maps  # matplotlib takes a second to import

  batch = inputs.on_canvas([picture], classifier.recipe.data.canvas)
  why, maps = _why_no_maps(classifier), ()
  if why:
    (probabilities,) = classifier.batch_probabilities(batch)
  else:
    (heat,), (probabilities,) = classifier.class_maps(batch)
  labels = np.argsort(-probabilities, kind='stable')[:TOP]
  if not why:
    (seen,) = splits.pictures(batch)  # shrunk, if it is large
    heat, box = heat[..., labels], classifier.box(*seen.shape[:2])
    scale = float(np.abs(heat).max())  # one for all classes, so they can be compared
    maps = tuple(heat_maps.overlay(seen, heat[..., place], box, scale) for place in range(len(labels)))
  names = tuple(classifier.classes[label] for label in labels)
  return Answer(names, probabilities[labels], classifier.batch_prepared(batch)[0], maps, why)


def _why_no_maps(classifier: Classifier) -> str:
  if classifier.tells_places:
    return ''
  if classifier.recipe.model.head != 'average_pool':
    return 'This network has a fully connected head, so no map shows where it finds a class.'
  size = classifier.recipe.image_size
  return f'Images of {size}x{size} pixels end in a single cell, so no map shows where this network finds a class.'


# HTML -----------------------------------------------------------------------------------------------------------------


def html_of(found: Answer, group: str, true: str | None = None) -> str:
  """Returns an answer as HTML. A class that is chosen, by mouse or arrow keys, shows its map without asking the server.

  Args:
    found: the answer.
    group: name of the choice; other answers on the page have other names.
    true: the class of the picture, where it is known.
  """
  from googlenet_jax.evaluation.drawing import percent
  from googlenet_jax.evaluation.heat_maps import meaning

  rows, maps = [], []
  for place, (name, probability) in enumerate(zip(found.names, found.probabilities, strict=True)):
    inside = (
      f'<span class=class>{markup.name(name)}</span><span class=share>{percent(float(probability))}</span>'
      f'<span class=track style="--s:{probability:.4f}"></span>'
    )
    if found.maps:
      choice = f'<input type=radio name="{group}" value="{place}"{" checked" * (place == 0)}>'
      rows.append(f'<label class="said k{place}">{choice}{inside}</label>')
      where = f'Where the network finds what speaks for {name}'
      picture = markup.picture(as_image(found.maps[place]), where, SIDE)
      maps.append(
        f'<figure class="map k{place}">{picture}<figcaption>What speaks for {markup.name(name)}</figcaption></figure>'
      )
    else:
      rows.append(f'<div class="said k{place}">{inside}</div>')
  kind, explained = 'fieldset', '<legend>Likeliest classes. Choose one to see where it is found:</legend>'
  if not maps:
    kind, explained = 'div', ''
  mark = ''
  if true is not None:
    verdict = 'right' if true == found.names[0] else 'wrong'
    mark = f'<p class=truth>It is {markup.name(true)}: the answer is <b>{verdict}</b>.</p>'
  about = found.why or f'{meaning("the chosen class").capitalize()}.'
  size = 'x'.join(map(str, found.prepared.shape[:2]))
  seen = markup.picture(as_image(found.prepared), f'The picture as the network sees it, {size} pixels', SIDE)
  seen = f'<figure>{seen}<figcaption>As the network sees it: {size} pixels</figcaption></figure>'
  return (
    f'<p class=best>{markup.name(found.names[0])}</p>{mark}'
    f'<{kind} class=classes>{explained}{"".join(rows)}</{kind}>'
    f'<div class=views>{"".join(maps)}{seen}</div>'
    f'<p class=soft>{markup.text(about)}</p>'
  )


def trouble(text: str) -> str:
  """Returns what is wrong with a picture as HTML."""
  return f'<p class=trouble role=alert>{markup.text(text)}</p>'


def as_image(pixels: np.ndarray) -> Image.Image:
  """Returns float `[h, w, C]` in [0, 1] as a picture."""
  return Image.fromarray(np.round(255 * (pixels[..., 0] if pixels.shape[-1] == 1 else pixels)).astype(np.uint8))
