"""`--mode=report`: a run as one file, report.html, with its pictures inside. It needs no server and no network."""

import datetime
import pathlib
from collections.abc import Mapping

from googlenet_jax.evaluation.output import Output
from googlenet_jax.host import backend, console, files, processes
from googlenet_jax.host.errors import UserError, one_line
from googlenet_jax.page import comparison, galleries, markup, sections, subject
from googlenet_jax.page.style import CSS
from googlenet_jax.page.subject import Subject

FILE = 'report.html'
MOST_BYTES = 10_000_000  # the rooms of all pictures together leave enough for the tables
# Nothing is fetched and no script runs, whatever the names of classes and files are.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(
  workdir: pathlib.Path,
  step: int | str | None = None,
  output: pathlib.Path | None = None,
  compare: pathlib.Path | None = None,
  data: Mapping[str, str] | None = None,
) -> None:
  """Writes report.html, and prints where it is and how large.

  Of several processes only the first one works.

  Args:
    workdir: folder of a run or an ensemble.
    step: step of the checkpoint, 'best', or None for the newest.
    output: folder to write to; by default the workdir.
    compare: folder of another run, whose newest checkpoint is compared.
    data: where the images of the run are now, as for `loading.load`; of the other one too, if they are the same.

  Raises:
    UserError: there is no such run or checkpoint, or the report cannot be written.
  """
  backend.start()  # in all processes: they meet there
  processes.of_first(_write(workdir, step, output, compare, data) if processes.is_first() else None)


def _write(
  workdir: pathlib.Path,
  step: int | str | None,
  output: pathlib.Path | None,
  compare: pathlib.Path | None,
  data: Mapping[str, str] | None,
) -> None:
  for folder in (workdir, compare) if compare else (workdir,):
    subject.run_in(folder)
  path = _place(workdir, output) / FILE  # before the work, which may take minutes
  one = subject.read(workdir, step, data)
  other = None if compare is None else subject.read(compare, None, subject.of_both(data, workdir, compare))
  text = page(one, other, datetime.date.today().isoformat())
  try:
    files.write_text(path, text)
  except OSError as error:
    raise _unwritable(path, output, error.strerror or str(error)) from error
  size = len(text.encode())
  shown = f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.0f} kB'
  console.say(f'written to {one_line(path)}: {shown}, all in one file')


def _place(workdir: pathlib.Path, output: pathlib.Path | None) -> pathlib.Path:
  try:
    return Output(output or workdir, given=True).folder
  except UserError as error:
    if output is not None:
      raise
    raise _unwritable(workdir, output, str(error).rpartition(': ')[2]) from error


def _unwritable(path: pathlib.Path, output: pathlib.Path | None, why: str) -> UserError:
  advice = 'make room there, or name another folder' if output else 'name another folder'
  return UserError(f'{one_line(path)} cannot be written ({why}): {advice} with --output=DIR')


def page(one: Subject, other: Subject | None, made: str) -> str:
  """Returns the report as HTML.

  Args:
    one: the run.
    other: the run that it is compared with, if any.
    made: today's date, as text.
  """
  found = _parts(one, other, made)
  anchor = lambda part: part.split('"', 2)[1]
  links = ' '.join(f'<a href="#{anchor(part)}">{title}</a>' for title, part in found.items())
  title = f'{markup.text(markup.short(one.name))}: report of a GoogLeNet'
  notes = ''.join(markup.paragraph(markup.text(note), 'note') for note in one.notes)
  body = '\n'.join(found.values())
  return f"""<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="{POLICY}">
<meta name=viewport content="width=device-width,initial-scale=1">
<meta name=color-scheme content="light dark">
<meta name=referrer content=no-referrer>
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<p class=kicker>Report of a run</p>
<h1>{markup.name(one.name)}</h1>
<p class=lede>{_in_words(one)}</p>
{notes}
{sections.tiles(one)}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{body}
</main>
<footer>One file without scripts; it loads nothing. GoogLeNet: Szegedy et al.,
<a href="https://arxiv.org/abs/1409.4842" rel=noreferrer>Going Deeper with Convolutions</a>, 2015. Maps: Zhou et al.,
<a href="https://arxiv.org/abs/1512.04150" rel=noreferrer>Learning Deep Features for Discriminative Localization</a>,
2016.</footer>
</body>
</html>
"""


def _parts(one: Subject, other: Subject | None, made: str) -> dict[str, str]:
  """Returns the sections by title, in their order, without those that have nothing to show."""
  parts = {
    'The run': sections.run(one, made),
    'Curves': sections.curves(one),
    'Comparison': comparison.section(one, other) if other else '',
    'Confusion matrix': galleries.matrix(one),
    'Mistakes': galleries.mistakes(one),
    'Right answers': galleries.samples(one),
    'Members': sections.members(one),
    'Classes': sections.classes(one),
    'Layers': sections.layers(one),
    'Recipe': sections.recipe_table(one),
  }
  return {title: part for title, part in parts.items() if part}


def _in_words(one: Subject) -> str:
  """Says what the run is, in one line."""
  networks = len(one.folders)
  who = f'{networks} GoogLeNets together' if networks > 1 else 'GoogLeNet'
  return f'{who} on {markup.name(one.data)}, {len(one.run.classes):,} classes'
