"""Training from the first step to the pictures at the end. Read it from top to bottom."""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from googlenet_jax import runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import datasets, dividing, pipeline
from googlenet_jax.data.splits import Dataset
from googlenet_jax.evaluation import statistics
from googlenet_jax.evaluation.evaluate import Evaluation, damage, evaluate
from googlenet_jax.host import checkpoints, console, files, sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.host.signals import StopRequest
from googlenet_jax.training import feed, finetune, optimizers, summary
from googlenet_jax.training.log import MetricsLog
from googlenet_jax.training.loss import weights_of_classes
from googlenet_jax.training.metrics import Metrics
from googlenet_jax.training.state import TrainState, create_state, items, networks, restore, with_statistics
from googlenet_jax.training.step import make_train_step, make_train_steps


@dataclasses.dataclass(frozen=True)
class Plan:
  """What does not change during a training."""

  config: ConfigDict
  workdir: pathlib.Path
  dataset: Dataset
  mesh: Mesh
  classifier: Classifier  # the compiled evaluation; it holds no weights
  statistics_step: Callable[..., Any] | None  # None without batch normalisation, see evaluation/statistics.py
  steps_per_epoch: int
  last_step: int
  learning_rate_fn: optax.Schedule
  tx: optax.GradientTransformation


def train(
  config: ConfigDict,
  workdir: pathlib.Path,
  stop: StopRequest,
  devices: Sequence[jax.Device] | None = None,
  dataset: Dataset | None = None,
) -> None:
  """Trains the recipe `config` in `workdir`, or continues the run that is there.

  Args:
    config: the recipe.
    workdir: folder of the run.
    stop: when its signal comes, the run is saved and this function returns.
    devices: devices to train on, if other runs train on the others; by default all.
    dataset: the data set of the recipe, if it is loaded already.

  Raises:
    UserError: something that the user can correct.
  """
  runs.check_resumable(config, workdir)
  plan = make_plan(config, workdir, sharding.make_mesh(devices), dataset)
  classifier = plan.classifier

  # Where to begin: resume, else initialise from weights, else from scratch -------------------------------------------
  _, state = create_state(config, len(classifier.classes), classifier.channels, plan.tx, plan.mesh)
  accuracies = runs.validation_accuracies(workdir)
  saved = checkpoints.Checkpoints(workdir, accuracies, one_at_a_time=devices is not None)
  console.say(summary.introduction(config, workdir, plan.dataset, classifier, plan.mesh))
  begun = restore(saved, state)
  if begun is None and config.init_from:
    state = finetune.initialise(state, config, classifier)
  state, meta = begun or (state, new_meta(config))
  step = int(state.step)
  for line in summary.where_it_stands(config, classifier, step, plan.last_step, meta['epochs']):
    console.say(line)
  if step < plan.last_step:  # a run that has ended keeps the recipe that trained it
    runs.write(workdir, runs.Run(config, classifier.classes, plan.dataset.image_shape))
    if rows := plan.dataset.rows():
      dividing.write(workdir, rows)

  # Train -------------------------------------------------------------------------------------------------------------
  with contextlib.closing(MetricsLog(workdir, step)) as log:
    evaluations = {}
    if step < plan.last_step:
      state, evaluations = train_steps(plan, state, meta, saved, accuracies, log, stop)
    saved.close()
    step = int(state.step)
    if step < plan.last_step:
      console.say(f'stopped at step {step} of {plan.last_step}, saved')
      return
    if not evaluations:  # the run had ended before: make its pictures and summary again
      evaluations = evaluate_and_log(plan, state, log)
      say_damage(plan)
      summary.draw_curves(config, log.records, workdir, plan.dataset)

  # What a run leaves behind ------------------------------------------------------------------------------------------
  last_epoch = Metrics(**meta['epoch_sums']).mean()
  found = summary.summary(config, meta, last_epoch, evaluations, step, plan.steps_per_epoch, classifier, plan.mesh)
  trained = classifier.with_networks(networks(state)[:1])
  summary.draw_answers(config, evaluations['test'], workdir, plan.dataset, step, trained)
  files.write_json(workdir / 'summary.json', found)  # last: a run with it counts as ended
  console.say(summary.last_lines(found, workdir, plan.mesh))


def train_steps(
  plan: Plan,
  state: TrainState,
  meta: dict[str, Any],
  saved: checkpoints.Checkpoints,
  accuracies: dict[int, float],
  log: MetricsLog,
  stop: StopRequest,
) -> tuple[TrainState, dict[str, Evaluation]]:
  """Runs the loop: steps, log points, evaluations and checkpoints, until the last step or a signal."""
  config, first_step = plan.config, int(state.step)
  calls = compile_train_step(plan, state, meta)
  epoch, recent, evaluations, ahead = Metrics(**meta['epoch_sums']), [], {}, sharding.steps_ahead()
  can_evaluate = False  # evaluation is compiled at its first use, so the first step does not wait for it
  progress, watch = console.Progress(first_step, plan.last_step, plan.steps_per_epoch), console.Stopwatch()
  with contextlib.closing(progress):
    watch.start()
    for step, train_step, arguments in calls:  # often one step a call; `step` is the last one, see feed.py
      state, metrics = train_step(state, *arguments)
      recent.append(metrics)
      if len(recent) > ahead:
        recent[-1 - ahead].count.block_until_ready()
      progress.advance(step)
      ends_epoch = step % plan.steps_per_epoch == 0 or step == plan.last_step
      evaluate_now = step % (config.evaluate_every_epochs * plan.steps_per_epoch) == 0 or step == plan.last_step
      save_now = config.checkpoint_every_steps and step % config.checkpoint_every_steps == 0
      stop_now = stop.signal  # read once: a signal that comes later is answered after the next step
      if not (ends_epoch or save_now or stop_now or step % config.log_every_steps == 0):
        continue

      # Log the mean over the steps since the last log point
      seconds = watch.stop()
      interval, epoch = add_up(plan, Metrics.by_step(recent), step, epoch, saved)
      recent.clear()
      count_up(meta, seconds, interval, epoch)
      record = make_record(plan, step, 'train', interval.mean(), interval.count / seconds)
      record |= feed.decoding_speed(plan.dataset.train, config.batch_size)
      log.write(record)

      # Evaluate, with batch statistics that fit the weights
      save = evaluate_now or save_now or stop_now
      if (evaluate_now or save_now) and not can_evaluate:
        state, can_evaluate = compile_evaluation(plan, state, meta), True
      elif save and can_evaluate:  # if a signal comes before that, there is no time to compile
        state = fit_statistics(plan, state)
      fresh = can_evaluate or plan.statistics_step is None
      try:
        evaluations = evaluate_and_log(plan, state, log) if evaluate_now else {}
      except UserError as error:  # too many damaged pictures: what was trained is worth keeping
        saved.save(step, items(state), meta, fresh=fresh)
        raise UserError(f'{error}. {saved.newest()}; the same command continues there') from error

      # Save before printing, because printing fails if the terminal or pipe is closed
      if save:
        if validation := evaluations.get('validation'):
          accuracies[step] = validation.accuracy
        saved.save(step, items(state), meta, fresh)

      # Show
      progress.show(record)
      if ends_epoch:
        console.say(epoch_line(step / plan.steps_per_epoch, epoch.mean(), evaluations, feed.bottleneck(record)))
      if evaluate_now:
        say_damage(plan)
        summary.draw_curves(config, log.records, plan.workdir, plan.dataset)
      if stop_now:
        break
      watch.start()
  return state, evaluations


# Functions that the loop calls, in the order of the calls ------------------------------------------------------------


def make_plan(config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, dataset: Dataset | None) -> Plan:
  """Loads the data set, and works out the length of the run, its learning rate and its optimizer."""
  sharding.check_divides(config.batch_size, mesh, config.micro_batches)
  dataset = dataset or datasets.load(**config.data, **runs.data_of([workdir]))
  steps_per_epoch = pipeline.steps_per_epoch(len(dataset.train), config.batch_size)
  last_step = config.epochs * steps_per_epoch
  learning_rate_fn = optimizers.learning_rate_schedule(config, steps_per_epoch)
  classifier = Classifier(config, dataset.class_names, dataset.image_shape[-1], [], mesh)
  has_statistics = config.model.norm == 'batch'
  return Plan(
    config,
    workdir,
    dataset,
    mesh,
    classifier,
    statistics.make_statistics_step(classifier.graphdef, config, mesh) if has_statistics else None,
    steps_per_epoch,
    min(last_step, config.max_steps) if config.max_steps else last_step,
    learning_rate_fn,
    optimizers.make_optimizer(config, learning_rate_fn),
  )


def new_meta(config: ConfigDict) -> dict[str, Any]:
  """Returns the counts of a run that has not begun. They are saved with every checkpoint."""
  counts = {'train_seconds': 0.0, 'train_examples': 0, 'compile_seconds': 0.0}
  return {**counts, 'epoch_sums': Metrics.zero().to_json(), 'epochs': config.epochs}


def compile_train_step(plan: Plan, state: TrainState, meta: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
  """Compiles the training step before the clock starts, and draws `augmentations.png` at the same time.

  Returns:
    The calls that train, see `feed.calls`.
  """
  meta['epochs'] = plan.config.epochs
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    samples = None
    if int(state.step) == 0:
      samples = pool.submit(summary.draw_samples, plan.config, plan.workdir, plan.dataset, int(state.seed))
    with console.waiting('compiling the training step', 'once; later about 10 s') as waiting:
      weights = weights_of_classes(plan.dataset.train.labels, len(plan.classifier.classes), plan.config.class_weights)
      makers = (plan.classifier.graphdef, plan.tx, plan.config, plan.mesh, plan.steps_per_epoch, weights)
      calls = feed.calls(plan, state, make_train_step(*makers), make_train_steps(*makers))
    meta['compile_seconds'] += waiting.seconds
    if samples is not None:
      samples.result()
  return calls


def add_up(
  plan: Plan, recent: Sequence[Metrics], step: int, epoch: Metrics, saved: checkpoints.Checkpoints
) -> tuple[Metrics, Metrics]:
  """Adds the metrics of the newest steps, on the host.

  Args:
    plan: what does not change during training.
    recent: metrics of each step since the last log point.
    step: steps taken.
    epoch: sums since the epoch began, without `recent`.
    saved: checkpoints; the error message names the newest one.

  Returns:
    Sums over these steps, and sums since the epoch began. The second sums start at zero in each epoch.

  Raises:
    UserError: the loss of a step was not finite.
  """
  interval = Metrics.zero()
  for number, metrics in enumerate(recent, start=step - len(recent)):
    if not metrics.is_finite():
      raise UserError(
        f'step {number + 1}: the loss is not finite, at a learning rate of {float(plan.learning_rate_fn(number)):g}. '
        f'Lower --config.learning_rate, or set --config.clip_norm=1, in a new --workdir. {saved.newest()}'
      )
    epoch = (Metrics.zero() if number % plan.steps_per_epoch == 0 else epoch).add(metrics)
    interval = interval.add(metrics)
  return interval, epoch


def count_up(meta: dict[str, Any], seconds: float, interval: Metrics, epoch: Metrics) -> None:
  """Adds an interval to the counts of the whole run."""
  meta['train_seconds'] += seconds
  meta['train_examples'] += interval.count
  meta['epoch_sums'] = epoch.to_json()


def make_record(plan: Plan, step: int, split: str, means: dict[str, float], speed: float) -> dict[str, Any]:
  """Makes a line of `metrics.jsonl`, see `runs.RECORD`."""
  loss, accuracy, *_ = means.values()
  return {
    'step': step,
    'epoch': step / plan.steps_per_epoch,
    'split': split,
    'loss': loss,
    'accuracy': accuracy,
    'learning_rate': float(plan.learning_rate_fn(step - 1)),  # the rate of the last step
    'examples_per_second': speed,
    **{name: value for name, value in means.items() if name.startswith('loss_')},
  }


def compile_evaluation(plan: Plan, state: TrainState, meta: dict[str, Any]) -> TrainState:
  """Compiles batch statistics and evaluation, by a first use; returns the state of `fit_statistics`."""
  with console.waiting('compiling the evaluation', 'once') as waiting:
    state = fit_statistics(plan, state)
    # The test has batches of the same form, and may have too many damaged pictures: then the step is saved first.
    batch = next(pipeline.eval_batches(plan.dataset.train, plan.config.batch_size, plan.mesh))
    jax.block_until_ready(plan.classifier.predict_step(1)(networks(state)[0], batch))
  meta['compile_seconds'] += waiting.seconds
  return state


def fit_statistics(plan: Plan, state: TrainState) -> TrainState:
  """Returns the state with batch statistics that fit its weights, for the raw and for the averaged ones."""
  if plan.statistics_step is None:
    return state
  found = statistics.recompute(
    plan.statistics_step,
    networks(state),
    plan.dataset.train,
    plan.config,
    int(state.seed),
    int(state.step),
    plan.mesh,
  )
  return with_statistics(state, found, plan.mesh)


def evaluate_and_log(plan: Plan, state: TrainState, log: MetricsLog) -> dict[str, Evaluation]:
  """Evaluates on the validation and test images and writes the records.

  Returns:
    The evaluations by name. If weights are averaged, 'test' has the averaged weights and 'test_raw' the raw weights;
    the same for 'validation' and 'validation_raw'.
  """
  classifier, evaluations = plan.classifier.with_networks(networks(state)), {}
  for name, split in (('validation', plan.dataset.validation), ('test', plan.dataset.test)):
    if split is None:
      continue
    begin = time.perf_counter()
    results = evaluate(classifier, split)
    speed = len(results) * len(split) / (time.perf_counter() - begin)
    for result, which in zip(results, (name, f'{name}_raw'), strict=False):
      evaluations[which] = result
      means = {'loss': result.loss, 'accuracy': result.accuracy}
      log.write(make_record(plan, int(state.step), which, means, speed))
  return evaluations


def say_damage(plan: Plan) -> None:
  """Says after an evaluation how many of its pictures could not be read, if there are any."""
  if note := damage({'validation': plan.dataset.validation, 'test': plan.dataset.test}):
    console.say(note)


def epoch_line(epoch: float, train: dict[str, float], evaluations: dict[str, Evaluation], bottleneck: str = '') -> str:
  """Says how an epoch went."""
  parts = [f'train loss {train["loss"]:.3f}, acc {train["accuracy"]:.4f}']
  for name, found in evaluations.items():
    if name.endswith('_raw'):
      parts[-1] += f' (raw weights {found.accuracy:.4f})'
    else:
      parts.append(f'{name} loss {found.loss:.3f}, acc {found.accuracy:.4f}')
  return f'epoch {epoch:.4g}: ' + '; '.join([*parts, bottleneck] if bottleneck else parts)
