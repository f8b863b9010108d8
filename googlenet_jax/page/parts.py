"""The parts of the page that show a run, as HTML. Most are those of the report."""

import pathlib

from googlenet_jax import runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.page import galleries, markup, results, sections
from googlenet_jax.page.results import Results
from googlenet_jax.page.subject import Subject

SAMPLES = 12  # test images to click on
PICTURES = 60  # most pictures behind a cell of the matrix
SIDE, SHOWN = 144, 72  # pixels of a sample, and its length on the page


def render(subject: Subject) -> dict[str, str]:
  """Returns the parts that change with the checkpoint, by name. A part that nobody knows is empty."""
  return {
    'samples': samples(subject),
    'summary': sections.tiles(subject) + sections.run(subject, ''),
    'matrix': matrix(subject),
    'mistakes': galleries.mistakes(subject),
    'members': sections.members(subject),
    'classes': sections.classes(subject),
    'layers': sections.layers(subject),
  }


def heading(name: str, classifier: Classifier | None, subject: Subject | None, note: str) -> str:
  """Returns the heading of the page: what the run is, and what is missing or under way."""
  about = []
  if classifier:
    count = len(classifier.networks)
    about.append(f'{f"{count} GoogLeNets together" if count > 1 else "GoogLeNet"}, {len(classifier.classes):,} classes')
    if classifier.steps:
      about.append(sections.steps(classifier))
  if subject and subject.results and subject.accuracy:
    about.append(f'{sections.percent(subject.accuracy[0])} of {len(subject.results.split):,} test images right')
  missing = f'<p class=note role=status>{markup.text(note)}</p>' if note else ''
  return f'<h1>{markup.name(name)}</h1>{markup.paragraph(", ".join(about), "lede")}{missing}'


def title(name: str, classifier: Classifier | None) -> str:
  """Returns a heading for the answer of one of several runs."""
  step = f', {sections.steps(classifier)}' if classifier and classifier.steps else ''
  return f'<h2>{markup.name(name)}{step}</h2>'


def samples(subject: Subject) -> str:
  """Returns test images as buttons."""
  found, buttons = subject.results, []
  if found is None:
    return ''
  for index in found.samples(SAMPLES, only_right=False).tolist():
    alt = f'Test image {markup.short(found.name(index))}, {markup.short(found.answer(index).true)}'
    picture = markup.picture(found.thumbnail(index, SIDE, enlarge=False), alt, SHOWN)
    buttons.append(f'<button type=button data-place={index}>{picture}</button>')
  return f'<h2>Or take a test image</h2><div class=grid>{"".join(buttons)}</div>'


def size_of_records(workdir: pathlib.Path) -> int:
  """Returns a number that changes when a run has written a record."""
  paths = [folder / runs.METRICS for folder in (workdir, *workdir.glob('member_*'))]
  return sum(path.stat().st_size for path in paths if path.exists())


# The confusion matrix -------------------------------------------------------------------------------------------------


def matrix(subject: Subject) -> str:
  """Returns the confusion matrix. Its cells are buttons, if the images are here."""
  counts = subject.confusion
  if counts is None:
    return ''
  labels = results.most_confused(counts, galleries.MATRIX)
  opens = lambda cell: f'data-place="{cell[0]},{cell[1]}"' if subject.results else ''
  table = galleries.matrix_table(subject.run.classes, counts, labels, opens)
  about = galleries.about_matrix(subject, counts, labels)
  if subject.results:
    about += ' A click on a cell, or the Enter key, opens its images.'
  return markup.section('matrix', 'Confusion matrix', markup.paragraph(about, 'soft'), galleries.KEY, table)


def cell(found: Results, place: str) -> str:
  """Returns a dialog with the images behind a cell of the matrix, the surest answers first.

  Args:
    found: the answers.
    place: labels of the true class and of the answer, such as '3,5'.
  """
  places = place.split(',')
  if len(places) != 2 or not all(is_label(one, len(found.classes)) for one in places):
    return ''
  labels = [int(one) for one in places]
  indices = found.cell(*labels)
  figures = [galleries.cell_figure(found, index) for index in indices[:PICTURES].tolist()]
  return galleries.popover(found.classes, tuple(labels), len(indices), figures)


def is_label(text: str, count: int) -> bool:
  """Returns whether a text is a number below `count`; it may be anything that somebody sent."""
  return text.isdecimal() and len(text) < 10 and int(text) < count
