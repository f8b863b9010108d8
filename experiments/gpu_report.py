"""The tables of gpu.py, made from its records."""

import json
import os
import pathlib
import statistics
from typing import Any

from experiments import profile_step, tables
from experiments.tables import OURS, Case, number
from experiments.worker import TINY

FILES = ('results.json', 'speed.md', 'profile.md', 'accuracy.md', 'log.txt')


def write(records: list[dict[str, Any]], folder: pathlib.Path) -> None:
  """Writes all files; see gpu.py for what they hold.

  Args:
    records: one for each stage, in the order of the stages; see `gpu.run`.
    folder: where to write.
  """
  (folder / FILES[0]).write_text(json.dumps(records, indent=1) + '\n')
  logs = [f'{r["name"]}, {who}:\n{log}\n' for r in records for who, log in r.get('logs', {}).items()]
  texts = (
    speed([r for r in records if r['kind'] not in ('accuracy', 'ensemble', 'profile')]),
    profiles([r for r in records if r['kind'] == 'profile']),
    accuracies([r for r in records if r['kind'] in ('accuracy', 'ensemble')]),
    '\n'.join(logs),
  )
  for name, text in zip(FILES[1:], texts, strict=True):
    if text:
      (folder / name).write_text(text.rstrip() + '\n')


def heading(records: list[dict[str, Any]]) -> str:
  """The machine, versions and commit of the records; a line for each combination."""
  lines = {}
  for record in records:
    versions = ', '.join(f'{name} {version}' for name, version in record['versions'].items())
    line = f'{record["device"]}, {versions}, commit {record["commit"] or "unknown"}'
    lines.setdefault(line, []).append(record['name'])
  told = [f'{line}: {", ".join(names)}' if len(lines) > 1 else line for line, names in lines.items()]
  tiny = ['In miniature on a CPU: these figures mean nothing.'] if os.environ.get(TINY) else []
  return '\n'.join([tables.written_by(), *(f'- {line}' for line in told), *tiny, ''])


def speed(records: list[dict[str, Any]]) -> str:
  """The summary, all contenders, forms, and notes."""
  by_case: dict[Case, list[dict[str, Any]]] = {}
  other_forms = [r for r in records if r['kind'] == 'forms']
  for record in (r for r in records if r['kind'] == 'turns'):
    rows = by_case.setdefault(Case(*record['arguments']['case']), [])
    names = {row['contender'] for row in rows}  # a case may have two stages, and then ours is there twice
    rows += [row for row in record['rows'] if row['contender'] not in names]
  shown = dict(by_case)
  for record in other_forms:
    case = Case(*record['arguments']['case'])
    ours = [case.batch_size / statistics.median(row['seconds']) for row in record['rows'] if row['form'] == OURS]
    if ours and case not in by_case:  # PyTorch has no twin of this network
      case = case._replace(mode=f'{case.mode}, `{record["arguments"]["config"]}`')
      shown.setdefault(case, [{'contender': OURS, 'images_per_second': ours[0], 'ratio': None}])
  parts = ['# Speed on a GPU\n', heading(records)]
  if by_case:
    parts += ['Images per second (milliseconds a step). A ratio is the median over turns.\n', tables.summary(shown)]
    parts += ['## All contenders\n', tables.details(by_case)]
  parts += [forms_table(record) for record in other_forms]
  for record in (r for r in records if r['kind'] == 'products'):
    lines = [[name, *(number(rate / 1e12) for rate in rates.values())] for name, rates in record['products'].items()]
    head = [f'{record["size"]}x{record["size"]} matrix product, TFLOP/s', *record['arguments']['dtypes']]
    parts.append(tables.table(head, lines))
  if notes := [f'- {record["name"]}: {note}' for record in records for note in record['notes']]:
    parts += ['## What is missing\n', '\n'.join(notes)]
  return '\n'.join(parts)


def forms_table(record: dict[str, Any]) -> str:
  """Ours beside other forms of it."""
  case, lines = Case(*record['arguments']['case']), []
  ours = next((statistics.median(row['seconds']) for row in record['rows'] if row['form'] == OURS), None)
  for row in record['rows']:
    seconds = statistics.median(row['seconds'])
    spread = f'{1e3 * min(row["seconds"]):.3g} to {1e3 * max(row["seconds"]):.3g}'
    lines.append(
      [row['form'], number(case.batch_size / seconds), number(1e3 * seconds), spread, number(ours and seconds / ours)]
      + [row['runs_on'], number(row['start_seconds'])]
    )
  head = ['form', 'images/s', 'ms a step', 'blocks, ms', 'of the time of ours', 'runs on', 'start, s']
  return f'## Forms: {case}, `{record["arguments"]["config"]}`\n\n{tables.table(head, lines)}'


def profiles(records: list[dict[str, Any]]) -> str:
  """Every profile; empty if there is none."""
  if not records:
    return ''
  parts = ['# Profiles on a GPU\n', heading(records)]
  for record in records:
    arguments, found = record['arguments'], record['found']
    case, mode, form = Case(*arguments['case']), arguments.get('compile_mode'), arguments.get('form')
    what = f'PyTorch, {mode}' if mode else f'`{arguments["config"]}`{f", {form}" if form else ""}'
    parts.append(f'## {case}, {what}\n')
    parts.append(profile_step.torch_section(found, 'PyTorch') if mode else profile_step.jax_section(found))
  return '\n'.join(parts)


def accuracies(records: list[dict[str, Any]]) -> str:
  """Accuracy and seconds of every run; empty if there is none."""
  if not records:
    return ''
  lines = []
  for record in records:
    config, singles = pathlib.Path(record['arguments']['config']).stem, [r for r in record['runs'] if 'summary' in r]
    for run in record['runs']:
      shown = run.get('summary', {})
      alone = [f'{shown["test_accuracy"]:.4f}', number(shown['epochs'])] if shown else ['-', '-']
      lines.append([config, run['run'], *alone, number(run['seconds']), _views(run.get('views', {}))])
    if len(singles) > 1:
      found = [run['summary']['test_accuracy'] for run in singles]
      times = statistics.fmean(run['seconds'] for run in singles)
      lines.append([config, f'mean of {len(found)}', f'{statistics.fmean(found):.4f}', '-', number(times), ''])
  head = ['recipe', 'run', 'test accuracy', 'epochs', 'seconds', 'accuracy by models and crops or views']
  note = 'Seconds are from the command to the result; for a member, of its training alone.\n'
  notes = [f'- {record["name"]}: {note}' for record in records for note in record['notes']]
  return '\n'.join(['# Accuracy on a GPU\n', heading(records), note, tables.table(head, lines), *notes])


def _views(views: dict[str, dict[str, float]]) -> str:
  return '; '.join(
    f'{models} x {crops}: {value:.4f}' for models, by_crops in views.items() for crops, value in by_crops.items()
  )
