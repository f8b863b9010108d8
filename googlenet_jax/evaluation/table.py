"""`--mode=evaluate`: evaluates a run or an ensemble with several numbers of crops, as in the paper's table 3."""

import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from googlenet_jax import loading, runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import crops, datasets
from googlenet_jax.data.splits import Dataset, Split
from googlenet_jax.evaluation import evaluate, report
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.evaluation.output import Output
from googlenet_jax.evaluation.sources import columns
from googlenet_jax.host import console, files, processes, sharding
from googlenet_jax.host.errors import UserError

TOP = 5
PRINTED = 20  # most classes whose accuracy and confusions are printed
PAIRS = 5  # confused pairs that are printed
PAIRS_KEPT = 20  # those in evaluation.json
HEAD = ('models', 'crops', 'cost', 'top-1 error', f'top-{TOP} error', 'gain in top-1', f'gain in top-{TOP}')
LONG_SECONDS = 10.0


def evaluate_run(
  config: ConfigDict,
  workdir: pathlib.Path,
  step: int | str | None = None,
  split_name: str = 'test',
  crop_counts: Sequence[int] = crops.COUNTS,
  output: pathlib.Path | None = None,
) -> None:
  """Evaluates a run, or all members of an ensemble; prints the result and writes it into the workdir.

  `evaluation.json` holds everything, `table.md` and `table.png` the table, and `report.write` writes the rest. For
  another split than the test the names have it: `evaluation_train.json`.

  Args:
    config: the recipe of the run; batch size and paths may differ.
    workdir: folder of the run.
    step: step of the checkpoint, 'best', or None for the newest.
    split_name: 'train', 'validation' or 'test'.
    crop_counts: numbers from `crops.COUNTS`, ascending.
    output: folder to write to; by default the workdir. If that cannot be written, nothing is.

  Raises:
    UserError: there is no such run, checkpoint or split, the data set has other classes than the run, or `output`
      cannot be written.
  """
  mesh = sharding.make_mesh()
  sharding.check_divides(config.batch_size, mesh)
  classifier = loading.load(workdir, step, mesh)
  processes.agree('checkpoints', {'step': classifier.steps})
  place = Output(output or workdir, output is not None, '' if split_name == 'test' else f'_{split_name}')
  classifier.batch_size = config.batch_size
  folders = runs.members(workdir)
  for folder in folders if len(folders) > 1 else ():
    if not runs.ended(runs.read(folder).config, folder):
      console.say(f'note: the training in {folder} has not ended')
  dataset, split = _data_of(folders, config, split_name)
  first, last = min(classifier.steps), max(classifier.steps)
  at = f'step {first}' if first == last else f'steps {first} to {last}'
  title = f'{workdir}, {at}, {len(split)} {split_name} images'
  console.say(title)

  maps = classifier.of_this_process() if processes.is_first() else None  # the others do not draw

  def write(rows: Sequence[dict[str, Any]], result: Evaluation) -> None:
    _write(place, classifier.recipe.name or workdir.name, rows, result, dataset, split_name, last, title)
    if len(rows) == len({1, len(classifier.networks)}):  # the first number of crops: later ones change nothing here
      report.write(result, split, dataset.class_names, place, title, split_name, maps)

  rows = evaluate_crops(classifier, dataset, split, crop_counts, write)
  if note := evaluate.damage({split_name: split}):
    console.say(note)
  console.say('\n' + markdown(rows))
  if len(classifier.networks) > 1:
    console.say('The rows for one model are the mean over the members, with the lowest and the highest in brackets.')
  place.say()


def _data_of(folders: Sequence[pathlib.Path], config: ConfigDict, split_name: str) -> tuple[Dataset, Split]:
  """Loads the data set of a run, and returns it with one of its splits, which must be there."""
  dataset = datasets.load(**config.data, **runs.data_of(folders), used=(split_name,))
  split = getattr(dataset, split_name)
  if split is None:
    raise UserError(
      '--split=validation: the recipe holds out no images (see config.data.validation_examples and _share)'
    )
  processes.agree('data', split.fingerprint())
  return dataset, split


def evaluate_crops(
  classifier: Classifier,
  dataset: Dataset,
  split: Split,
  crop_counts: Sequence[int],
  write: Callable[[Sequence[dict[str, Any]], Evaluation], None],
) -> list[dict[str, Any]]:
  """Evaluates with each number of crops in turn, and prints progress.

  Args:
    classifier: the networks.
    dataset: the data set of the split.
    split: images and labels.
    crop_counts: numbers from `crops.COUNTS`, ascending.
    write: called after each number of crops, because many crops take long and may be interrupted. It gets the rows so
      far, and the answers of all networks together with the first number of crops.

  Returns:
    The rows of the table, sorted by models and crops.
  """
  square = crops.all_square(split.batch(np.array([0])), classifier.recipe.augment)
  rows, first, pace = [], None, 0.0
  for count in crop_counts:
    work = crops.distinct(count, classifier.recipe.image_size, square)
    if pace * work > LONG_SECONDS:
      console.say(f'{crops.NAMES[count]} of every image take about {pace * work:.0f} s ...')
    begin = time.perf_counter()
    results = evaluate.evaluate(classifier, split, count)
    if first is None:
      first = evaluate.together(results)
      console.say(answers(first, dataset.class_names, len(results), count))
    for models in sorted({1, len(results)}):
      rows.append(row(results, models, count, rows[0] if rows else None))
    error, seconds = rows[-1]['top1_error'], time.perf_counter() - begin
    pace = seconds / work
    console.say(f'{crops.NAMES[count]} of every image: {seconds:.1f} s, top-1 error {100 * error:.2f} %')
    rows.sort(key=lambda r: (r['models'], r['crops']))
    write(rows, first)
  return rows


def row(evaluations: Sequence[Evaluation], models: int, crop_count: int, base: dict[str, Any] | None) -> dict[str, Any]:
  """Makes a row of the table.

  Args:
    evaluations: one per model.
    models: 1 for the mean over the models, each evaluated alone; the number of models for all of them together.
    crop_count: crops per image.
    base: the row that gains refer to; None for the base itself.

  Returns:
    `models`, `crops` and `cost`, their product; top-1 and top-5 errors and gains as shares; `top1_errors`, one per
    model, or one for all together.
  """
  found = [evaluate.together(evaluations)] if models > 1 else evaluations
  errors = {key: [one.error(top) for one in found] for key, top in (('top1_error', 1), ('top5_error', TOP))}
  out = {'models': models, 'crops': crop_count, 'cost': models * crop_count}
  out |= {key: statistics.fmean(values) for key, values in errors.items()}
  out['top1_errors'] = errors['top1_error']
  for key in ('top1', 'top5'):
    out[f'{key}_gain'] = base[f'{key}_error'] - out[f'{key}_error'] if base else 0.0
  return out


def markdown(rows: Sequence[dict[str, Any]]) -> str:
  """Returns the table as Markdown, and below it what the views are if there are any."""
  lines = [HEAD, ['---'] * len(HEAD)]
  for r in rows:
    gains = [100 * r[key] for key in ('top1_gain', 'top5_gain')]
    gains = ['base' if r is rows[0] else f'{round(gain, 2) + 0.0:+.2f} %' for gain in gains]  # no -0.00
    errors = [f'{100 * r[key]:.2f} %' for key in ('top1_error', 'top5_error')]
    if len(r['top1_errors']) > 1:  # several members, each alone: also the lowest and the highest
      errors[0] += f' ({100 * min(r["top1_errors"]):.2f} to {100 * max(r["top1_errors"]):.2f})'
    lines.append([str(r['models']), crops.label(r['crops']), str(r['cost']), *errors, *gains])
  notes = [f'\n{crops.NOTES[count]}' for count in crops.NOTES if any(r['crops'] == count for r in rows)]
  return '\n'.join(['| ' + ' | '.join(line) + ' |' for line in lines] + notes) + '\n'


def answers(result: Evaluation, class_names: Sequence[str], models: int, crop_count: int) -> str:
  """Returns accuracy by class, the confusion matrix and the accuracy over all, as text.

  With many classes only those with the lowest accuracy are in it, and no matrix.
  """
  accuracies, confusion, lines = result.per_class_accuracy, result.confusion, []
  shown = range(len(class_names))
  if len(class_names) > PRINTED:
    shown = np.argsort(accuracies, kind='stable')[: PRINTED // 2]  # NaN comes last
    lines.append(f'accuracy of the {len(shown)} worst of {len(class_names)} classes; per_class.csv has all')
  else:
    lines.append('accuracy by class, and the confusion matrix (rows: true class, columns: prediction)')
  width = max(columns(class_names[label]) for label in shown)
  for label in shown:
    cells = (
      f'of {confusion[label].sum()}' if len(class_names) > PRINTED else ' '.join(f'{n:5d}' for n in confusion[label])
    )
    name = ' ' * (width - columns(class_names[label])) + class_names[label]
    lines.append(f'  {name}  {accuracies[label]:6.4f}  {cells}')
  if pairs := result.confused_pairs(PAIRS):
    texts = [
      f'{class_names[a]} taken for {class_names[b]} ({confusion[a, b]} of {confusion[a].sum()})' for a, b in pairs
    ]
    lines.append(f'most confused: {"; ".join(texts)}')
  if len(class_names) == 2:
    area = report.roc(result.labels == 1, report.two_classes(result)).area
    lines.append(f'area under the ROC curve {area:.4f}')
  right = int((result.predictions == result.labels).sum())
  who = f'{models} models together, ' if models > 1 else ''
  view = f'{crops.NAMES[crop_count]}, ' if crop_count > 1 else ''
  lines.append(f'{who}{view}accuracy {result.accuracy:.4f} ({right} of {len(result.labels)}), loss {result.loss:.4f}')
  return '\n'.join(lines)


def _write(
  output: Output,
  name: str,
  rows: Sequence[dict[str, Any]],
  first: Evaluation,
  dataset: Dataset,
  split_name: str,
  step: int,
  title: str,
) -> None:
  per_class = zip(dataset.class_names, first.per_class_accuracy.tolist(), strict=True)
  found = {
    'split': split_name,
    'step': step,
    'examples': len(first.labels),
    'models': rows[-1]['models'],  # the values below: this many models together, this many crops
    'crops': rows[0]['crops'],
    'accuracy': first.accuracy,
    'loss': first.loss,
    'per_class_accuracy': {name: None if np.isnan(a) else a for name, a in per_class},  # JSON has no NaN
    'confusion_matrix': first.confusion.tolist(),
    'most_confused': [
      {
        'true': dataset.class_names[true],
        'said': dataset.class_names[said],
        'images': int(first.confusion[true, said]),
      }
      for true, said in first.confused_pairs(PAIRS_KEPT)
    ],
    'table': rows,
  }

  def draw(path: pathlib.Path) -> None:
    from googlenet_jax.evaluation import plots

    plots.table(rows, path, f'recipe {name}, {dataset.name} {split_name} images')

  output.write('evaluation.json', lambda path: files.write_json(path, found))
  output.write('table.md', lambda path: files.write_text(path, f'{title}\n\n{markdown(rows)}'))
  output.write('table.png', draw)
