"""`--mode=evaluate`: a run, or an ensemble of runs, by 1, 10 and 144 crops: the paper's table 3."""

import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from googlenet_jax import recipe
from googlenet_jax.data import crops, datasets
from googlenet_jax.evaluation import evaluate
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.host import checkpoints, console, sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.training import ensemble
from googlenet_jax.training.state import create_state, for_prediction, restore

TOP = 5
HEAD = ('models', 'crops', 'cost', 'top-1 error', f'top-{TOP} error', 'gain in top-1', f'gain in top-{TOP}')


def _check(members: Sequence[tuple[Any, pathlib.Path]]) -> None:
  """Raises UserError where a member was not trained, or by another recipe."""
  for config, folder in members:
    if not (folder / 'checkpoints').is_dir():
      hint = ''
      if (folder / 'member_0').is_dir():
        hint = '; the members of an ensemble are in it: give --config.ensemble.members, or the --workdir of one of them'
      raise UserError(f'{folder} holds no checkpoints: train first, or give the --workdir of a run{hint}')
    several = ('seed', 'ensemble.member', 'ensemble.initial_weights') if len(members) > 1 else ()
    recipe.check_same(config, folder, recipe.FOR_EVALUATION + several)
    if several and not ensemble.ended(ConfigDict(json.loads((folder / 'config.json').read_text())), folder):
      console.say(f'note: the training in {folder} has not ended')
  if len(members) > 1:
    recipe.check_alike([folder for _, folder in members])


def _variables(workdir: pathlib.Path, state: Any, step: int | None) -> tuple[Any, int]:
  """What a member predicts with, and the step it is of."""
  saved = checkpoints.Checkpoints(workdir, read_only=True)
  restored = restore(saved, state, step, only='network')
  saved.close()
  if restored is None:
    raise UserError(f'{workdir} holds no checkpoint yet: train first')
  state, _ = restored
  return for_prediction(state), int(state.step)


def row(evaluations: Sequence[Evaluation], models: int, crop_count: int, base: dict[str, Any] | None) -> dict[str, Any]:
  """A line of the table.

  Args:
    evaluations: one a model. For one model of several: each of them alone, and the line is their mean.
    models: 1, or their number: then they answer together.
    crop_count: crops of an image.
    base: the line that gains are over; None for the base itself.

  Returns:
    `models`, `crops` and `cost`, their product; top-1 and top-5 errors and gains as shares; `top1_errors`, one a model
    or one of all together.
  """
  answers = [evaluate.together(evaluations)] if models > 1 else evaluations
  errors = {key: [answer.error(top) for answer in answers] for key, top in (('top1_error', 1), ('top5_error', TOP))}
  found = {'models': models, 'crops': crop_count, 'cost': models * crop_count}
  found |= {key: statistics.fmean(values) for key, values in errors.items()}
  found['top1_errors'] = errors['top1_error']
  for key in ('top1', 'top5'):
    found[f'{key}_gain'] = base[f'{key}_error'] - found[f'{key}_error'] if base else 0.0
  return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
  """The table as Markdown."""
  lines = [HEAD, ['---'] * len(HEAD)]
  for r in rows:
    gains = [100 * r[key] for key in ('top1_gain', 'top5_gain')]
    gains = ['base' if r is rows[0] else f'{round(gain, 2) + 0.0:+.2f} %' for gain in gains]  # no -0.00
    errors = [f'{100 * r[key]:.2f} %' for key in ('top1_error', 'top5_error')]
    if len(r['top1_errors']) > 1:  # of several members by themselves: their mean, and how far they are apart
      errors[0] += f' ({100 * min(r["top1_errors"]):.2f} to {100 * max(r["top1_errors"]):.2f})'
    lines.append([str(r['models']), str(r['crops']), str(r['cost']), *errors, *gains])
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def evaluate_checkpoint(
  config: Any, workdir: pathlib.Path, step: int | None, split_name: str, crop_counts: Sequence[int] = crops.COUNTS
) -> None:
  """Evaluates the checkpoints of a run, prints the result, and writes it into the workdir.

  `evaluation.json` holds everything, `table.md` and `table.png` the table.

  Args:
    config: the recipe of the run.
    workdir: folder of the run.
    step: of the checkpoint; None for the newest, the only choice with several members.
    split_name: 'train', 'validation' or 'test'.
    crop_counts: of `crops.COUNTS`, ascending.

  Raises:
    UserError: no such checkpoint or split, or another recipe.
  """
  members = ensemble.members(config, workdir)
  if step is not None and len(members) > 1:
    raise UserError('--step is for a single run: the members of an ensemble are evaluated at their newest checkpoints')
  _check(members)
  mesh = sharding.make_mesh()
  sharding.check_divides(config.batch_size, mesh)
  dataset = datasets.load(**config.data)
  split = getattr(dataset, split_name)
  if split is None:
    raise UserError('--split=validation: this recipe holds no images out (config.data.validation_examples=0)')
  graphdef, state = create_state(config, len(dataset.class_names), dataset.image_shape[-1], optax.identity(), mesh)
  found = [_variables(folder, state, step) for _, folder in members]
  steps = sorted({step for _, step in found})
  at = f'step {steps[0]}' if len(steps) == 1 else f'steps {steps[0]} to {steps[-1]}'
  title = f'{workdir}, {at}, {len(split)} {split_name} images'
  console.say(title)
  square = crops.all_square(split.batch(np.array([0])), config.augment)
  rows, first, pace = [], None, 0.0
  for count in crop_counts:
    work = crops.distinct(count, config.image_size, square)
    if pace * work > 10:
      console.say(f'{_crops(count)} of every image take about {pace * work:.0f} s ...')
    begin = time.perf_counter()
    eval_step = evaluate.make_eval_step(graphdef, config, mesh, count)
    batch = crops.batch_size(config.batch_size, count, mesh.size)
    results = evaluate.evaluate(eval_step, [variables for variables, _ in found], split, batch, mesh)
    if first is None:
      first = evaluate.together(results)
      _show(first, dataset.class_names, len(results), count)
    for models in sorted({1, len(results)}):
      rows.append(row(results, models, count, rows[0] if rows else None))
    error, seconds = rows[-1]['top1_error'], time.perf_counter() - begin
    pace = seconds / work
    console.say(f'{_crops(count)} of every image: {seconds:.1f} s, top-1 error {100 * error:.2f} %')
    rows.sort(key=lambda r: (r['models'], r['crops']))
    if jax.process_index() == 0:  # each time: many crops take long, and may be interrupted
      _write(workdir, rows, first, dataset.class_names, split_name, steps[-1], title)
  console.say('\n' + markdown(rows))
  if len(found) > 1:
    console.say('one model: the mean over the members, each by itself, with the lowest and the highest')
  console.say(f'written to {workdir}: evaluation.json, table.md, table.png')


def _crops(count: int) -> str:
  return f'{count} crop{"s" * (count > 1)}'


def _show(result: Evaluation, class_names: tuple[str, ...], models: int, crop_count: int) -> None:
  width = max(map(len, class_names))
  console.say('accuracy by class, and the confusion matrix (rows: true class, columns: prediction)')
  for name, accuracy, counts in zip(class_names, result.per_class_accuracy, result.confusion, strict=True):
    console.say(f'  {name:>{width}}  {accuracy:6.4f}  ' + ' '.join(f'{count:5d}' for count in counts))
  right = int((result.predictions == result.labels).sum())
  who = f'{models} models together, ' if models > 1 else ''
  view = f'{_crops(crop_count)}, ' if crop_count > 1 else ''
  console.say(f'{who}{view}accuracy {result.accuracy:.4f} ({right} of {len(result.labels)}), loss {result.loss:.4f}')


def _write(workdir, rows, first, class_names, split_name, step, title) -> None:
  from googlenet_jax.evaluation import plots

  checkpoints.write_json(
    workdir / 'evaluation.json',
    {
      'split': split_name,
      'step': step,
      'examples': len(first.labels),
      'models': rows[-1]['models'],  # together, by so many crops, in what follows
      'crops': rows[0]['crops'],
      'accuracy': first.accuracy,
      'loss': first.loss,
      'per_class_accuracy': {  # JSON knows no NaN
        name: None if np.isnan(accuracy) else accuracy
        for name, accuracy in zip(class_names, first.per_class_accuracy.tolist(), strict=True)
      },
      'confusion_matrix': first.confusion.tolist(),
      'table': rows,
    },
  )
  checkpoints.write_text(workdir / 'table.md', f'{title}\n\n{markdown(rows)}')
  plots.protocol(rows, workdir / 'table.png')
