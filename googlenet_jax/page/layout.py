"""The parts of the page and what happens between them, with Gradio. Texts and pictures are in other modules."""

import functools
import itertools
import pathlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import gradio
import numpy as np

from googlenet_jax.classifier import Classifier
from googlenet_jax.page import answers, page_style, parts, sections
from googlenet_jax.page.live import LiveRun
from googlenet_jax.page.uploads import Uploads

REFRESH_SECONDS = 3.0  # between looks at what has changed; an unchanged part is not sent again
HEAD = f'<style>{page_style.CSS}</style>'
# A click on a button inside a part of the page, with what the button carries.
ON_CLICK = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-place]');
  if (button) trigger('select', {place: button.dataset.place});
});
"""
# A screen reader says a new answer.
ON_ANSWER = "element.setAttribute('aria-live', 'polite');"
# On a phone the first answer stands below the pictures: the page moves there.
ON_FIRST_ANSWER = f"""{ON_ANSWER}
watch('value', () => {{
  const answer = element.querySelector('.answer:has(.best, .trouble)');
  if (answer && answer.getBoundingClientRect().top > 0.7 * innerHeight) answer.scrollIntoView();
}});
"""
# A dialog opens as soon as it has come.
ON_CELL = "watch('value', () => element.querySelector('[popover]')?.showPopover());"
# A table that somebody has opened stays open when newer figures come.
ON_CURVES = """
let open = false;
element.addEventListener('toggle', event => { open = event.target.open; }, true);
watch('value', () => element.querySelectorAll('details').forEach(details => { details.open = open; }));
"""


class Panel(NamedTuple):
  """A part of the page that follows a run."""

  component: gradio.HTML
  version: Callable[[], Hashable]  # changes with what is shown, which is then sent anew
  html: Callable[[], str]


def build(found: Sequence[LiveRun], sent: Uploads) -> gradio.Blocks:
  """Makes the page.

  Args:
    found: the run, and perhaps another one to compare with.
    sent: where the pictures of users lie.
  """
  with gradio.Blocks(title=f'{found[0].name}: GoogLeNet', analytics_enabled=False) as blocks:
    panels = [_panel(found[0], LiveRun.heading, 'heading')]
    with gradio.Tabs():
      with gradio.Tab('Try it'):
        panels.append(_try_tab(found, sent))
      for run, title in zip(found, ('The run', 'The other run'), strict=False):
        if run.is_run:
          with gradio.Tab(title):
            panels += [_panel(run, LiveRun.heading, 'heading')] if run is not found[0] else []
            panels += _run_tab(run)
    _keep_fresh(blocks, found, panels)
  blocks.preprocess_data = _without_tracebacks(blocks.preprocess_data)
  return blocks


def _without_tracebacks(preprocess: Callable) -> Callable:
  """Refuses what somebody wrote by hand and Gradio cannot read, without pages of text in the terminal."""

  async def read(*arguments: Any, **options: Any) -> Any:
    try:
      return await preprocess(*arguments, **options)
    except gradio.Error:
      raise
    except Exception as error:
      raise gradio.Error('This page cannot read that request.', print_exception=False) from error

  return read


def _html(kind: str, value: str = '', **options: Any) -> gradio.HTML:
  return gradio.HTML(value, elem_classes=['ours', kind], apply_default_css=False, padding=False, **options)


def _panel(run: LiveRun, html: Callable[[LiveRun], str], kind: str, js: str | None = None) -> Panel:
  return Panel(_html(kind, js_on_load=js), lambda: run.known.number, lambda: html(run))


def _part(run: LiveRun, name: str, js: str | None = None) -> Panel:
  return _panel(run, lambda run: run.known.parts.get(name, ''), f'part-{name}', js)


# Try it ---------------------------------------------------------------------------------------------------------------


def _try_tab(found: Sequence[LiveRun], sent: Uploads) -> Panel:
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
    for place, run in enumerate(found):
      with gradio.Column(scale=2 if several else 3, min_width=280):
        first = run.answer(None, '', several)
        shown.append(_html('answer-place', first, js_on_load=ON_ANSWER if place else ON_FIRST_ANSWER))

  def of_all(read: Callable[[Classifier], np.ndarray] | None, true: str | None = None) -> list[str]:
    return [run.answer(read, f'classes {place}', several, true) for place, run in enumerate(found)]

  def of_upload(file: Any) -> list[str] | str:
    said = of_all(None if file is None else functools.partial(_read, sent, file))
    return said if several else said[0]  # as Gradio takes values for several outputs, and for one

  def of_sample(event: gradio.EventData) -> list[str | None]:
    subject, place = found[0].known.subject, _place(event)
    results = subject and subject.results
    if not results or not parts.is_label(place, len(results.split)):
      return [None, *of_all(None)]
    picture, true = results.split.picture(int(place)), results.classes[results.split.labels[int(place)]]
    return [None, *of_all(functools.partial(answers.recoloured, picture), true)]

  # One answer at a time: the others wait in the order in which they came.
  options = {'concurrency_limit': 1, 'concurrency_id': 'network', 'api_visibility': 'undocumented'}
  # Without preprocessing: Gradio would decode the picture itself, without our checks.
  upload.input(of_upload, upload, shown, preprocess=False, api_name='answer', **options)
  upload.clear(lambda: of_upload(None), None, shown, queue=False, api_visibility='private')
  samples.component.select(of_sample, None, [upload, *shown], api_name='sample', **options)  # takes the upload away
  return samples


def _read(sent: Uploads, file: Any, classifier: Classifier) -> np.ndarray:
  return answers.read(*sent.find(file), classifier)


def _place(event: gradio.EventData) -> str:
  """Returns what a click carries; empty for a request that was written by hand."""
  try:
    return str(event.place)
  except (AttributeError, TypeError):
    return ''


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
  curves = _html('part-curves', js_on_load=ON_CURVES)
  matrix = _part(run, 'matrix', ON_CLICK)
  dialog = _html('dialog', js_on_load=ON_CELL)
  numbers = itertools.count()
  others = [_part(run, name) for name in ('mistakes', 'members', 'classes', 'layers')]

  def open_cell(event: gradio.EventData) -> str:
    found = run.known.subject.results
    # The number makes the same dialog a new value, or a cell could be opened only once in a row.
    return f'{parts.cell(found, _place(event))}<!-- {next(numbers)} -->' if found else ''

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
