"""Sections of the report with pictures: the confusion matrix whose cells open, mistakes, right answers."""

import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from googlenet_jax.evaluation import heat_maps
from googlenet_jax.evaluation.drawing import percent, plural
from googlenet_jax.page import markup, results
from googlenet_jax.page.markup import Room
from googlenet_jax.page.results import Answer, Results
from googlenet_jax.page.subject import Subject

MATRIX = 20  # most classes of the matrix
PER_CELL = 12  # most pictures of a cell
MISTAKES, RIGHT = 36, 24  # most pictures of these sections
PART = 32  # pictures whose maps are drawn at once
SIDE, SHOWN = 128, 104  # pixels of a picture in a cell, and its length on the page
LARGE, LARGE_SHOWN = 176, 122  # the same of a picture beside its map
MATRIX_ROOM, GALLERY_ROOM = 4_500_000, 1_200_000  # bytes of the file for the pictures of a section
KEY = (
  '<p class=key>Rows are true classes, columns are answers. <i style="background:var(--right)"></i>right '
  '<i style="background:var(--wrong)"></i>wrong; a stronger colour is a larger share of the row.</p>'
)


# The confusion matrix -------------------------------------------------------------------------------------------------


def matrix(subject: Subject) -> str:
  """Returns the confusion matrix; each cell opens its pictures. Empty if nobody knows the matrix.

  The browser opens them (the HTML attribute `popover`), so the file needs no script.
  """
  counts = subject.confusion
  if counts is None:
    return ''
  labels = results.most_confused(counts, MATRIX)
  room = Room(MATRIX_ROOM)
  found = _cell_pictures(subject.results, counts, labels, room) if subject.results else {}
  popovers = [popover(subject.run.classes, cell, int(counts[cell]), pictures) for cell, pictures in found.items()]
  opens = lambda cell: f'popovertarget="{_anchor(cell)}"' if cell in found else ''
  table = matrix_table(subject.run.classes, counts, labels, opens)
  about = about_matrix(subject, counts, labels)
  if subject.results:
    about += f' A click on a cell, or the Enter key, opens its pictures: up to {PER_CELL}, the surest answers first.'
    about += f' {room.left_out:,} of these had no room in the file.' if room.left_out else ''
  return markup.section('matrix', 'Confusion matrix', markup.paragraph(about, 'soft'), KEY, table, *popovers)


def about_matrix(subject: Subject, counts: np.ndarray, labels: Sequence[int]) -> str:
  """Says how many mistakes there are, and which classes the matrix shows."""
  wrong = counts - np.diag(np.diag(counts))
  source = '' if subject.results else f' From evaluation.json, step {subject.evaluation["step"]}.'
  if len(labels) == len(counts):
    return f'{plural(int(wrong.sum()), "mistake")} in {int(counts.sum()):,} images.{source}'
  inside = int(wrong[np.ix_(labels, labels)].sum())
  return (
    f'The {len(labels)} of {len(counts):,} classes that are confused most: {inside:,} of all {int(wrong.sum()):,} '
    f'mistakes are in these cells.{source}'
  )


def matrix_table(
  classes: Sequence[str], counts: np.ndarray, labels: Sequence[int], opens: Callable[[tuple[int, int]], str]
) -> str:
  """Returns the confusion matrix as a table.

  Args:
    classes: names of all classes.
    counts: int `[num_classes, num_classes]`.
    labels: the classes that are shown.
    opens: returns the attribute by which the button of a cell opens something; empty for a cell without a button.
  """
  totals = counts.sum(axis=1)
  shares = counts / np.maximum(totals, 1)[:, None]
  highest = max(np.max(shares, where=~np.eye(len(counts), dtype=bool), initial=0.0), 0.01)
  turned = ' class=turned' if max(len(classes[label]) for label in labels) > 3 else ''
  head = ''.join(f'<th scope=col{turned}><span>{markup.name(classes[label], 20)}</span></th>' for label in labels)
  lines = [f'<tr><th class=corner scope=col>true</th>{head}<th scope=col class=n>recall</th></tr>']
  for true in labels:
    cells = []
    for said in labels:
      count, share = int(counts[true, said]), float(shares[true, said])
      strength = share if said == true else (share / highest) ** 0.5
      kind = 'r' if said == true else 'w'
      attribute = opens((true, said)) if count else ''
      inside = _button(classes, (true, said), count, attribute) if attribute else f'{count:,}'
      cells.append(f'<td class="c {kind}" style="--s:{strength:.3f}">{inside}</td>' if count else '<td class=c></td>')
    recall = f'{100 * shares[true, true]:.1f}\u00a0%' if totals[true] else 'no images'
    name = markup.name(classes[true], 28)
    lines.append(f'<tr><th scope=row>{name}</th>{"".join(cells)}<td class=n>{recall}</td></tr>')
  top, *below = lines
  body = '\n'.join(below)
  table = f'<table class=matrix>\n<thead>{top}</thead>\n<tbody>\n{body}\n</tbody></table>'
  return markup.scrolled(table, 'Confusion matrix')


def _button(classes: Sequence[str], cell: tuple[int, int], count: int, attribute: str) -> str:
  label = markup.text(f'{plural(count, "image")} of {markup.short(classes[cell[0]])}: {_verdict(classes, cell)}')
  return f'<button type=button {attribute} aria-label="{label}">{count:,}</button>'


def _verdict(classes: Sequence[str], cell: tuple[int, int]) -> str:
  return 'right' if cell[0] == cell[1] else f'taken for {markup.short(classes[cell[1]])}'


def _cell_pictures(
  found: Results, counts: np.ndarray, labels: Sequence[int], room: Room
) -> dict[tuple[int, int], list[str]]:
  """Returns the pictures of each cell as HTML. First each cell gets one, mistakes first; then each a second one."""
  cells = [cell for cell in itertools.product(labels, labels) if counts[cell]]
  cells.sort(key=lambda cell: (cell[0] == cell[1], -counts[cell]))
  inside = {cell: found.cell(*cell)[:PER_CELL] for cell in cells}
  pictures = {cell: [] for cell in cells}
  for place in range(PER_CELL):
    for cell, indices in inside.items():
      if place < len(indices) and room.left > 0:
        figure = cell_figure(found, int(indices[place]))
        if room.take(figure):
          pictures[cell].append(figure)
        else:
          room.left = 0  # what follows is no more important than what was left out
      elif place < len(indices):
        room.left_out += 1
  return pictures


def cell_figure(found: Results, index: int) -> str:
  """Returns an image of a cell with the probability of its answer."""
  answer = found.answer(index)
  picture = markup.picture(found.thumbnail(index, SIDE, enlarge=False), f'image {markup.short(answer.name)}', SHOWN)
  return markup.figure([picture], f'{percent(answer.probability)}<span class=file>{file_of(answer)}</span>')


def _anchor(cell: tuple[int, int]) -> str:
  return f'cell-{cell[0]}-{cell[1]}'


def popover(classes: Sequence[str], cell: tuple[int, int], count: int, pictures: Sequence[str]) -> str:
  """Returns the dialog of a cell: some of its `count` images, as HTML."""
  anchor = _anchor(cell)
  verdict = 'right' if cell[0] == cell[1] else f'taken for {markup.name(classes[cell[1]])}'
  shown = f'{len(pictures)} of {count:,} images' if len(pictures) < count else plural(count, 'image')
  close = f'<button class=close popovertarget="{anchor}" popovertargetaction=hide autofocus>Close</button>'
  top = f'<div><h3 id="{anchor}-h">{markup.name(classes[cell[0]])}: {verdict}</h3><p>{shown}</p></div>{close}'
  body = markup.gallery(pictures)
  return (
    f'<div popover role=dialog id="{anchor}" aria-labelledby="{anchor}-h"><div class=bar-top>{top}</div>{body}</div>'
  )


# Mistakes and right answers -------------------------------------------------------------------------------------------


def mistakes(subject: Subject) -> str:
  """Returns the most confident mistakes, each with the map of what the network said; empty without answers."""
  found = subject.results
  if not found:
    return ''
  if not len(found.mistakes):
    text = f'No mistakes in {plural(len(found.split), f"{found.split_name} image")}.'
    return markup.section('mistakes', 'Mistakes', markup.paragraph(text))
  room = Room(GALLERY_ROOM)
  figures, has_maps = _figures(found, found.mistakes[:MISTAKES], room)
  total = len(found.mistakes)
  text = f'{plural(total, "mistake")}, the most confident first.'
  if len(figures) < total:
    text = f'The {len(figures)} most confident of {total:,} mistakes; --mode=evaluate lists all in mistakes.csv.'
  return _gallery_section('mistakes', 'Mistakes', text, figures, has_maps)


def samples(subject: Subject) -> str:
  """Returns some right answers, spread evenly over the classes; empty without answers."""
  found = subject.results
  if not found or not len(indices := found.samples(RIGHT)):
    return ''
  figures, has_maps = _figures(found, indices, Room(GALLERY_ROOM))
  right = int(np.trace(found.confusion))
  text = f'{len(figures)} of {right:,} right answers, spread evenly over the classes.'
  return _gallery_section('right', 'Right answers', text, figures, has_maps)


def _gallery_section(anchor: str, title: str, text: str, figures: Sequence[str], has_maps: bool) -> str:
  if has_maps:
    colours = heat_maps.meaning('the answer').capitalize()
    text = f'{text} Beside each image: where the network found what it said. {colours}.'
  gallery = markup.gallery(figures, 'pairs' if has_maps else '')
  return markup.section(anchor, title, markup.paragraph(text, 'soft'), gallery)


def _figures(found: Results, indices: Sequence[int], room: Room) -> tuple[list[str], bool]:
  """Returns images with their answers as HTML, as many as there is room for, and whether they have maps."""
  figures, has_maps = [], False
  for index, maps in with_maps([found], indices):
    figure, has_maps = _answer_figure(found, index, maps), bool(maps)
    if not room.take(figure):
      break
    figures.append(figure)
  return figures, has_maps


def _answer_figure(found: Results, index: int, maps: Sequence[Image.Image]) -> str:
  answer = found.answer(index)
  said = f'<b>{markup.name(answer.said)}</b> {percent(answer.probability)}'
  caption = said if answer.is_right else f'said {said}, is <b>{markup.name(answer.true)}</b>'
  shown = LARGE_SHOWN if maps else SHOWN
  pictures = [image_of(found, index, shown)]
  pictures += [map_of(one, answer.said, shown) for one in maps]
  return markup.figure(pictures, f'{caption}<span class=file>{file_of(answer)}</span>')


def with_maps(runs: Sequence[Results], indices: Sequence[int]) -> Iterator[tuple[int, list[Image.Image]]]:
  """Yields each index and the maps of the runs for what they said; runs without maps have none."""
  for start in range(0, len(indices), PART):
    part = indices[start : start + PART]
    maps = [drawn for run in runs if (drawn := run.heat_maps(part, side=LARGE))]
    for place, index in enumerate(part):
      yield int(index), [drawn[place] for drawn in maps]


def file_of(answer: Answer) -> str:
  """Returns the name of a file without its folders, as HTML; or the place of an image in a set without files."""
  return markup.name(pathlib.PurePath(answer.name).name).replace('_', '_<wbr>')  # where a long name may be broken


def image_of(found: Results, index: int, shown: int) -> str:
  """Returns an image of the split as HTML, `shown` CSS pixels long."""
  alt = f'image {markup.short(found.name(index))}, {markup.short(found.answer(index).true)}'
  return markup.picture(found.thumbnail(index, LARGE, enlarge=False), alt, shown)


def map_of(drawn: Image.Image, said: str, shown: int) -> str:
  """Returns a class activation map as HTML."""
  return markup.picture(drawn, f'where it speaks for {markup.short(said)}', shown)
