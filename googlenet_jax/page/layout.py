"""The parts of the page and what happens between them, with Gradio. Texts and pictures are in other modules."""

import functools
import pathlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import gradio
import numpy as np

from googlenet_jax.classifier import Classifier
from googlenet_jax.page import answers, page_style, parts, sections
from googlenet_jax.page.live import LiveRun

REFRESH_SECONDS = 3.0  # between looks at what has changed; an unchanged part is not sent again
HEAD = f'<style>{page_style.CSS}</style>'
# A click on a button inside a part of the page, with what the button carries.
ON_CLICK = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-place]');
  if (button) trigger('select', {place: button.dataset.place});
});
"""
# A screen reader says a new answer. On a phone it stands below the pictures: the page moves there.
ON_ANSWER = """
element.setAttribute('aria-live', 'polite');
watch('value', () => {
  const answer = element.querySelector('.answer');
  if (answer.getBoundingClientRect().top > 0.7 * innerHeight) answer.scrollIntoView();
});
"""
# A dialog opens as soon as it has come.
ON_CELL = "watch('value', () => element.querySelector('[popover]')?.showPopover());"


class Panel(NamedTuple):
  """A part of the page that follows a run."""

  component: gradio.HTML
  version: Callable[[], Hashable]  # of what it shows; it is sent anew if that changes
  html: Callable[[], str]


def build(found: Sequence[LiveRun], kept_seconds: int) -> gradio.Blocks:
  """Makes the page.

  Args:
    found: the run, and perhaps another one to compare with.
    kept_seconds: how long a picture that was sent stays on the disk.
  """
  with gradio.Blocks(
    title=f'{found[0].name}: GoogLeNet', analytics_enabled=False, delete_cache=(kept_seconds // 4, kept_seconds)
  ) as blocks:
    panels = [_panel(found[0], LiveRun.heading, 'heading')]
    with gradio.Tabs():
      with gradio.Tab('Try it'):
        panels.append(_try_tab(found))
      for run, title in zip(found, ('The run', 'The other run'), strict=False):
        if run.is_run:
          with gradio.Tab(title):
            panels += [_panel(run, LiveRun.heading, 'heading')] if run is not found[0] else []
            panels += _run_tab(run)
    _keep_fresh(blocks, found, panels)
  return blocks


def _html(kind: str, value: str = '', **options: Any) -> gradio.HTML:
  return gradio.HTML(value, elem_classes=['ours', kind], apply_default_css=False, padding=False, **options)


def _panel(run: LiveRun, html: Callable[[LiveRun], str], kind: str, js: str | None = None) -> Panel:
  return Panel(_html(kind, js_on_load=js), lambda: run.known.number, lambda: html(run))


def _part(run: LiveRun, name: str, js: str | None = None) -> Panel:
  return _panel(run, lambda run: run.known.parts.get(name, ''), f'part-{name}', js)


# Try it ---------------------------------------------------------------------------------------------------------------


def _try_tab(found: Sequence[LiveRun]) -> Panel:
  """Makes the tab that answers pictures, and returns the test images in there, which follow the run."""
  several, shown = len(found) > 1, []
  with gradio.Row(elem_classes='try'):
    with gradio.Column(scale=2, min_width=280):
      upload = gradio.Image(
        type='filepath',
        sources=['upload', 'webcam', 'clipboard'],
        label='Your picture',
        buttons=[],
        height=300,
        webcam_options=gradio.WebcamOptions(mirror=False),
      )
      upload.async_move_resource_to_block_cache = _only_files(upload.async_move_resource_to_block_cache)
      samples = _part(found[0], 'samples', ON_CLICK)
    for _ in found:
      with gradio.Column(scale=2 if several else 3, min_width=280):
        shown.append(_html('answer-place', js_on_load=ON_ANSWER))

  def of_all(read: Callable[[Classifier], np.ndarray] | None, true: str | None = None) -> list[str] | str:
    said = [run.answer(read, f'classes {place}', several, true) for place, run in enumerate(found)]
    return said if several else said[0]  # as Gradio takes values for several outputs, and for one

  def of_upload(file: dict[str, Any] | None) -> list[str] | str:
    if file is None:
      return of_all(None)
    return of_all(functools.partial(answers.read, file['path'], file.get('orig_name')))

  def of_sample(event: gradio.EventData) -> list[str] | str:
    subject, place = found[0].known.subject, str(event.place)
    results = subject and subject.results
    if not results or not place.isdecimal() or int(place) >= len(results.split):
      return of_all(None)
    picture, true = results.split.picture(int(place)), results.classes[results.split.labels[int(place)]]
    return of_all(functools.partial(answers.recoloured, picture), true)

  # One answer at a time: the others wait in the order in which they came.
  options = {'outputs': shown, 'concurrency_limit': 1, 'concurrency_id': 'network', 'api_visibility': 'undocumented'}
  # Without preprocessing: Gradio would decode the picture itself, without our checks.
  upload.input(of_upload, upload, preprocess=False, api_name='answer', **options)
  upload.clear(lambda: of_all(None), None, shown, queue=False, api_visibility='private')
  samples.component.select(of_sample, None, api_name='sample', **options)
  return samples


def _only_files(move: Callable) -> Callable:
  """Keeps Gradio from fetching a picture whose address somebody sends in place of a file."""

  async def move_file(place: str | pathlib.Path | None) -> str | None:
    if place is not None and '://' in str(place):
      raise gradio.Error('Give a file: this page fetches nothing from other hosts.', print_exception=False)
    return await move(place)

  return move_file


# The run --------------------------------------------------------------------------------------------------------------


def _run_tab(run: LiveRun) -> list[Panel]:
  """Makes the tab on a run, and returns its parts."""
  summary = _part(run, 'summary')
  curves = _html('part-curves')
  matrix = _part(run, 'matrix', ON_CLICK)
  dialog = _html('dialog', js_on_load=ON_CELL)
  others = [_part(run, name) for name in ('mistakes', 'members', 'classes', 'layers')]

  def open_cell(event: gradio.EventData) -> str:
    found = run.known.subject.results
    return parts.cell(found, str(event.place)) if found else ''

  matrix.component.select(
    open_cell, None, dialog, show_progress='hidden', api_name='cell', api_visibility='undocumented'
  )
  records = lambda: parts.size_of_records(run.workdir)
  return [summary, Panel(curves, records, lambda: sections.curves(run.known.subject)), matrix, *others]


# Freshness ------------------------------------------------------------------------------------------------------------


def _keep_fresh(blocks: gradio.Blocks, found: Sequence[LiveRun], panels: Sequence[Panel]) -> None:
  """Fills all panels when the page is opened, and those that have changed every few seconds."""

  def refresh(seen: tuple[Hashable, ...]) -> list[Any]:
    now = tuple(panel.version() for panel in panels)
    changed = (seen[place : place + 1] != now[place : place + 1] for place in range(len(panels)))
    sent = [panel.html() if new else gradio.skip() for panel, new in zip(panels, changed, strict=True)]
    return [now, *sent]

  def opened() -> list[Any]:
    for run in found:
      run.look()
    return refresh(())

  seen = gradio.State(())
  options = {'outputs': [seen, *(panel.component for panel in panels)], 'show_progress': 'hidden', 'queue': False}
  blocks.load(opened, None, api_visibility='private', **options)
  gradio.Timer(REFRESH_SECONDS).tick(refresh, seen, api_visibility='private', **options)
