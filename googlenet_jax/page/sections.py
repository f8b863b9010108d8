"""Sections of the report that are words and numbers: the run, its curves, members, classes, layers, recipe."""

import math
import pathlib
import statistics
from typing import Any

import jax

from googlenet_jax import __version__, recipe
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import crops
from googlenet_jax.data.splits import SPLITS
from googlenet_jax.evaluation import report
from googlenet_jax.evaluation.drawing import plural
from googlenet_jax.page import charts, markup, results
from googlenet_jax.page.charts import Line
from googlenet_jax.page.subject import Subject

EVALUATIONS = 50  # rows of figures below the curves
CLASSES = 1000  # rows of the table of classes
LISTED = 40  # up to this many classes, they are in the order of their labels; more are sorted, the worst first
PATHS = ('data.source_dir', 'data.data_dir', 'init_from')


def percent(share: float | None) -> str:
  """Writes a share with two decimals; nothing for None."""
  return '' if share is None else f'{100 * share:.2f}\u00a0%'


def seconds(duration: float) -> str:
  """Writes a duration in a unit that fits."""
  unit, size = next(((u, s) for u, s in (('hours', 3600), ('minutes', 60)) if duration >= 1.5 * s), ('seconds', 1))
  return f'{duration / size:.3g} {unit}'


# The run -------------------------------------------------------------------------------------------------------------


def tiles(subject: Subject) -> str:
  """Returns the few figures that everybody asks for."""
  layers, config = results.layer_rows(subject.classifier), subject.classifier.recipe
  side, channels = config.image_size, subject.run.image_shape[-1]
  found = []
  if subject.accuracy:
    found.append(('accuracy', percent(subject.accuracy[0]), subject.accuracy[1]))
  if subject.loss is not None:
    found.append(('loss', f'{subject.loss:.4f}', 'mean cross-entropy in nats'))
  if subject.results and len(subject.run.classes) == 2:
    evaluation = subject.results.evaluation
    area = report.roc(evaluation.labels == 1, report.two_classes(evaluation)).area
    found.append(('area under ROC', f'{area:.4f}', 'of the two classes'))
  of_each = ' of each network' if len(subject.folders) > 1 else ''
  found.append(('parameters', layers[-1][-2], f'all weights{of_each}'))
  work = int(layers[-1][-1].replace(',', ''))
  unit, size = ('G', 1e9) if work >= 1e9 else ('M', 1e6)
  found.append(('multiply-adds', f'{work / size:.3g} {unit}', f'for one image of {side}x{side}x{channels}'))
  if all(type(subject.summary.get(key)) in (int, float) for key in ('epochs', 'steps', 'train_seconds')):
    took = seconds(subject.summary['train_seconds'])
    found.append(
      ('trained', f'{subject.summary["epochs"]:.4g} epochs', f'{subject.summary["steps"]:,} steps in {took}')
    )
  cells = (
    f'<div><dt>{name}</dt><dd><b>{value}</b><small>{markup.text(note)}</small></dd></div>'
    for name, value, note in found
  )
  return f'<dl class=tiles>{"".join(cells)}</dl>'


def run(subject: Subject, made: str) -> str:
  """Returns the run in a few lines; `made` is the date of the report, and empty elsewhere."""
  config = subject.classifier.recipe
  facts = {
    'recipe': markup.name(config.name or subject.name),
    'data': _data(subject),
    'images': _words(subject.content.get('preparation')),
    'network': _network(config),
    'training': _training(subject),
    'checkpoint': steps(subject.classifier),
    'hardware': _hardware(subject.run.machine),
    'versions': _versions(subject),
    'report': f'made on {made} by googlenet_jax {__version__} with jax {jax.__version__}' if made else '',
  }
  lines = ''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in facts.items() if value)
  return markup.section('run', 'The run', f'<dl class=facts>{lines}</dl>', _crops(subject))


def _words(value: Any) -> str:
  return markup.text(value) if value else ''


def _hardware(machine: dict[str, Any]) -> str:
  if not {'device', 'devices', 'cpu_cores'} <= set(machine):
    return ''  # an old run
  return _words(f'{machine["device"]}: {machine["devices"]} used; {machine["cpu_cores"]} CPU cores')


def _data(subject: Subject) -> str:
  parts = [markup.name(subject.data), f'{len(subject.run.classes):,} classes']
  if subject.results:
    counts = subject.results.counts
    parts.append(f'{", ".join(f"{counts[name]:,} {name}" for name in SPLITS if name in counts)} images')
  return ', '.join(parts)


def _network(config: Any) -> str:
  differing = [f'{key}={value}' for key, value in config.model.items() if value != recipe.KEYS[f'model.{key}'].default]
  return _words(f'GoogLeNet{" with " if differing else ""}{", ".join(differing)}; computes in {config.dtype}')


def _training(subject: Subject) -> str:
  config = subject.run.config
  parts = [f'batches of {config.batch_size}', f'learning rate {config.learning_rate:g}, {config.schedule} schedule']
  if config.init_from:
    parts.append(f'began with the weights of {_last(config.init_from)}')
  if config.freeze:
    parts.append(f'{config.freeze} and all before it frozen')
  if isinstance(pace := subject.summary.get('train_examples_per_second'), float):
    parts.append(f'{pace:,.0f} images a second')
  return _words('; '.join(parts))


def steps(classifier: Classifier) -> str:
  """Returns the steps of the checkpoints of a run or an ensemble."""
  found = classifier.steps
  if len(set(found)) > 1:
    return f'steps {min(found):,} to {max(found):,}'
  return f'step {found[0]:,}' if found else 'none yet'


def _versions(subject: Subject) -> str:
  versions = subject.content.get('versions')
  if not isinstance(versions, dict):
    return ''
  return _words(', '.join(f'{package} {version}' for package, version in versions.items()))


def _crops(subject: Subject) -> str:
  """Returns the table of crops against error, if somebody evaluated the run."""
  rows = []
  try:
    for row in subject.evaluation.get('table', []):
      errors = percent(row['top1_error']), percent(row['top5_error'])
      views = plural(row['models'], 'network'), crops.label(row['crops'])
      rows.append([*map(markup.text, views), *errors])
  except (KeyError, TypeError, ValueError):  # a damaged file
    return ''
  at = f', step {subject.evaluation.get("step")}'
  head = 'networks', 'crops', 'top-1 error', 'top-5 error'
  return markup.table(head, rows, f'Several crops of each image, from evaluation.json{at}') if rows else ''


def _last(path: str) -> str:
  """Returns the last part of a path: a report goes to others, and the folders of a machine are nobody's business."""
  last = pathlib.PurePath(path).name
  return last if last == path else f'…/{last}'


# Curves --------------------------------------------------------------------------------------------------------------


def curves(subject: Subject) -> str:
  """Returns loss, accuracy and learning rate against epochs; a line for each member of an ensemble."""
  members = [results.curves(folder) for folder in subject.folders]
  kinds = [name for name in SPLITS if any(name in member for member in members)]
  if not kinds:
    gone = 'The folder of this run is not there any more.'
    why = 'metrics.jsonl holds no figures yet.' if subject.workdir.is_dir() else gone
    return markup.section('curves', 'Curves', markup.paragraph(why, 'soft'))

  def lines(key: str) -> list[Line]:
    points = lambda records: [(record['epoch'], record[key]) for record in records]
    return [Line(name, points(member[name])) for name in kinds for member in members if name in member]

  rates = [Line('rate', [(r['epoch'], r['learning_rate']) for r in members[0].get('train', [])], 'learning rate')]
  drawn = [
    charts.chart('loss (nats)', lines('loss'), log=True),
    charts.chart('accuracy (share right)', lines('accuracy'), most=1.0),
    charts.chart('learning rate', rates),
  ]
  body = f'<div class=charts>{"".join(drawn)}</div>'
  each = f'A line for each of {len(members)} networks.' if members[1:] else ''
  figures = '' if members[1:] else _figures(members[0], kinds)
  return markup.section('curves', 'Curves', body, charts.legend(kinds), markup.paragraph(each, 'soft'), figures)


def _figures(records: dict[str, list[dict[str, Any]]], kinds: list[str]) -> str:
  """Returns the figures of each evaluation as a table."""
  found = {name: {record['step']: record for record in records[name]} for name in kinds}
  steps = sorted(set(found.get('test', {})) | set(found.get('validation', {})))
  if not steps:
    return ''
  rows = []
  for step in steps[-EVALUATIONS:]:
    own = {name: found[name][step] for name in kinds if step in found[name]}
    epoch = next(iter(own.values()))['epoch']
    row = [f'{epoch:.4g}', f'{step:,}']
    for name in kinds:
      row += [f'{own[name]["loss"]:.4f}', f'{own[name]["accuracy"]:.4f}'] if name in own else ['', '']
    rows.append(row)
  head = ['epoch', 'step', *(f'{name} {key}' for name in kinds for key in ('loss', 'accuracy'))]
  last = f'the last {EVALUATIONS} ' if len(steps) > EVALUATIONS else ''
  return markup.details(f'The figures of {last}{plural(len(rows), "evaluation")}', markup.table(head, rows, 'Figures'))


# Members, classes, layers, recipe ------------------------------------------------------------------------------------


def members(subject: Subject) -> str:
  """Returns each member of an ensemble, their mean, and all together; empty for a single run."""
  if not subject.results or not subject.results.evaluations[1:]:
    return ''
  found = subject.results.evaluations
  named = zip(subject.folders, subject.classifier.steps, found, strict=True)
  rows = [[markup.name(folder.name), f'{step:,}', percent(e.accuracy), f'{e.loss:.4f}'] for folder, step, e in named]
  accuracies = [e.accuracy for e in found]
  mean = [percent(statistics.fmean(accuracies)), f'{statistics.fmean(e.loss for e in found):.4f}']
  together = subject.results.evaluation
  rows.append(['mean of them', '', *mean])
  rows.append(['all together', '', percent(together.accuracy), f'{together.loss:.4f}'])
  caption = f'{len(accuracies)} networks; together: the mean of their probabilities'
  return markup.section(
    'members', 'Members', markup.table(('network', 'step', 'accuracy', 'loss'), rows, caption, has_sum=True)
  )


def classes(subject: Subject) -> str:
  """Returns precision, recall, F1 and support of each class; empty if nobody knows them."""
  rows, source = subject.per_class()
  if not rows:
    return ''
  order = ''
  if len(rows) > LISTED:
    worst = lambda row: (row.f1 is None, row.f1 or 0.0, row.name)
    rows, order = sorted(rows, key=worst), '; lowest F1 first'
    if len(rows) > CLASSES:
      rows, order = rows[:CLASSES], f'; the {CLASSES:,} of {len(rows):,} with the lowest F1'
  score = lambda value: '' if value is None else f'{value:.3f}'
  bar = lambda value: '' if value is None else f'{value:.3f}<span class=bar style="--s:{value:.3f}"></span>'
  cells = [
    [markup.name(row.name), score(row.precision), score(row.recall), bar(row.f1), f'{row.support:,}'] for row in rows
  ]
  lacking = '; an empty cell: nothing to divide by' if any(None in row for row in rows) else ''
  caption = f'{source}{order}{lacking}'
  table = markup.table(('class', 'precision', 'recall', 'F1', 'images'), cells, caption)
  if len(rows) > LISTED:
    table = markup.details(f'{len(rows):,} classes', table)
  return markup.section('classes', 'Classes', table)


def layers(subject: Subject) -> str:
  """Returns the layers as in the paper's table 1."""
  head, *rows = ([markup.text(cell) for cell in row] for row in results.layer_rows(subject.classifier))
  side = subject.classifier.recipe.image_size
  caption = f'As in table 1 of the paper, for one image of {side}x{side}x{subject.run.image_shape[-1]}'
  return markup.section('layers', 'Layers', markup.table(head, rows, caption, words=2, has_sum=True))


def recipe_table(subject: Subject) -> str:
  """Returns the keys of the recipe that are not at their default."""
  rows, given = [], recipe.flatten(subject.run.config)
  for key, value in given.items():
    if value != recipe.KEYS[key].default and key not in ('name', 'ensemble.member'):
      value = _last(value) if key in PATHS else value
      cells = [key_name(key), shown(value), shown(recipe.KEYS[key].default)]
      rows.append([*cells, markup.text(recipe.KEYS[key].meaning)])
  if not rows:
    return markup.section('recipe', 'Recipe', markup.paragraph('Every key has its default.', 'soft'))
  caption = f'{len(rows)} keys are not at their default; the other {len(given) - len(rows)} are'
  table = markup.table(('key', 'value', 'default', 'meaning'), rows, caption, words=4)
  return markup.section('recipe', 'Recipe', table)


def key_name(key: str) -> str:
  """Returns the name of a key of a recipe."""
  return f'<code>{markup.text(key)}</code>'


def shown(value: Any) -> str:
  """Returns the value of a key of a recipe."""
  if isinstance(value, float) and math.isfinite(value):
    return f'{value:.6g}'
  return markup.name(value) if value != '' else '<span class=soft>(empty)</span>'
