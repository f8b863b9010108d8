"""The section of the report that compares two runs: their figures, their recipes, images that only one gets right."""

import numpy as np

from googlenet_jax import recipe
from googlenet_jax.evaluation.drawing import percent, plural
from googlenet_jax.page import galleries, markup, results, sections
from googlenet_jax.page.markup import Room
from googlenet_jax.page.results import Results
from googlenet_jax.page.subject import Subject

SHOWN = 18  # most images of each kind
ROOM = 500_000  # bytes of the file for each kind


def section(one: Subject, other: Subject) -> str:
  """Returns the comparison of two runs."""
  names = names_of(one, other)
  head = ['', *map(markup.name, names)]
  recipes = _recipes(one, other, head)
  caption = 'Figures of both runs' if recipes else 'Figures of both runs, whose recipes are the same'
  tables = [markup.table(head, _figures(one, other), caption), recipes]
  if why := _not_comparable(one, other):
    parts = [markup.paragraph(f'Their answers are not compared image by image: {why}.', 'note')]
  else:
    table, *parts = _answers(one.results, other.results, names)
    tables.append(table)
  beside = f'<div class=tables>{"".join(tables)}</div>'
  return markup.section('compared', f'Compared with {head[2]}', beside, *parts)


def names_of(one: Subject, other: Subject) -> list[str]:
  """Returns two names: those of both folders, with the folders that hold them if they are the same."""
  names = [one.name, other.name]
  if names[0] == names[1]:
    names = [f'{subject.workdir.resolve().parent.name}/{subject.name}' for subject in (one, other)]
  return names if names[0] != names[1] else [f'{name} ({place})' for name, place in zip(names, ('1', '2'), strict=True)]


def _not_comparable(one: Subject, other: Subject) -> str:
  """Says why two runs did not answer the same images; empty if they did."""
  if not one.results or not other.results:
    return 'there are no answers of both'
  if one.run.classes != other.run.classes:
    return 'they have different classes'
  if one.results.split.fingerprint() != other.results.split.fingerprint():
    return 'their test images differ'
  return ''


def _figures(one: Subject, other: Subject) -> list[list[str]]:
  def rows(subject: Subject) -> dict[str, str]:
    layers, run = results.layer_rows(subject.classifier), subject.summary
    number = lambda key, form: form.format(run[key]) if type(run.get(key)) in (int, float) else ''
    return {
      'accuracy': sections.percent(subject.accuracy[0]) if subject.accuracy else '',
      'loss': '' if subject.loss is None else f'{subject.loss:.4f}',
      'test images': f'{len(subject.results.split):,}' if subject.results else '',
      'classes': f'{len(subject.run.classes):,}',
      'networks': f'{len(subject.folders)}',
      'parameters': layers[-1][-2],
      'multiply-adds': layers[-1][-1],
      'side of the input': f'{subject.classifier.recipe.image_size}',
      'epochs': number('epochs', '{:.4g}'),
      'steps': number('steps', '{:,}'),
      'seconds of training': number('train_seconds', '{:,.0f}'),
    }

  both = rows(one), rows(other)
  return [[name, both[0][name], both[1][name]] for name in both[0] if both[0][name] or both[1][name]]


def _recipes(one: Subject, other: Subject, head: list[str]) -> str:
  """Returns the keys of the recipes that differ; empty if none does."""
  there, here = (recipe.flatten(subject.run.config) for subject in (one, other))
  keys = [key for key in there if there[key] != here[key] and key not in ('name', 'ensemble.member', *sections.PATHS)]
  if not keys:
    return ''
  rows = [[sections.key_name(key), sections.shown(there[key]), sections.shown(here[key])] for key in keys]
  return markup.table(['key', *head[1:]], rows, 'Keys of the recipe that differ', words=3)


def _answers(one: Results, other: Results, names: list[str]) -> list[str]:
  """Returns a table of how often which run is right, and galleries of images on which they differ."""
  labels, said = one.evaluation.labels, (one.evaluation.predictions, other.evaluation.predictions)
  right = [answers == labels for answers in said]
  kinds = {
    f'only {names[0]} is right': right[0] & ~right[1],
    f'only {names[1]} is right': ~right[0] & right[1],
    'both are wrong, with different answers': ~right[0] & ~right[1] & (said[0] != said[1]),
  }
  counts = {
    'both are right': right[0] & right[1],
    **kinds,
    'both are wrong, with the same answer': ~right[0] & (said[0] == said[1]),
  }
  rows = [
    [markup.name(kind), f'{int(chosen.sum()):,}', sections.percent(chosen.mean())] for kind, chosen in counts.items()
  ]
  parts = [markup.table(('answers', 'images', 'share'), rows, f'Answers to the same {len(labels):,} images')]
  sure = np.maximum(one.evaluation.confidences, other.evaluation.confidences)
  for kind, chosen in kinds.items():
    indices = np.flatnonzero(chosen)
    indices = indices[np.argsort(-sure[indices], kind='stable')][:SHOWN]
    if len(indices):
      parts.append(_gallery(one, other, names, kind, indices, int(chosen.sum())))
  return parts


def _gallery(one: Results, other: Results, names: list[str], kind: str, indices: np.ndarray, total: int) -> str:
  room, figures, most = Room(ROOM), [], 0
  explained = [run for run in (one, other) if run.classifier.tells_places]
  for index, maps in galleries.with_maps(explained, indices):
    answers = [run.answer(index) for run in (one, other)]
    pictures = [galleries.image_of(one, index, galleries.LARGE_SHOWN)]
    for run, drawn in zip(explained, maps, strict=True):
      pictures.append(galleries.map_of(drawn, run.answer(index).said, galleries.LARGE_SHOWN))
    lines = [
      f'{markup.name(name)}: <b>{markup.name(answer.said)}</b> {percent(answer.probability)}'
      for name, answer in zip(names, answers, strict=True)
    ]
    caption = f'is <b>{markup.name(answers[0].true)}</b><br>{"<br>".join(lines)}'
    figure = markup.figure(pictures, f'{caption}<span class=file>{galleries.file_of(answers[0])}</span>')
    if not room.take(figure):
      break
    figures.append(figure)
    most = max(most, len(pictures))
  shown = f'{len(figures)} of {total:,} images' if len(figures) < total else plural(total, 'image')
  columns = {2: 'pairs', 3: 'threes'}.get(most, '')
  maps = ' Beside each image: where the networks found what they said.' if most > 1 else ''
  about = markup.paragraph(f'{shown}, the surest answers first.{maps}', 'soft')
  return f'<h3>{markup.name(kind[0].upper() + kind[1:])}</h3>{about}{markup.gallery(figures, columns)}'
