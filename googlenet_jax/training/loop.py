"""Training from the first step to the pictures at the end. Read it from top to bottom."""

import concurrent.futures
import contextlib
import pathlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from googlenet_jax import runs
from googlenet_jax.data import dividing
from googlenet_jax.data.splits import Dataset
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.host import checkpoints, console, distributed, files, processes, progress, sharding
from googlenet_jax.host.errors import UserError, reason, trouble
from googlenet_jax.host.signals import StopRequest
from googlenet_jax.training import feed, finetune, summary
from googlenet_jax.training.evaluator import Evaluator
from googlenet_jax.training.log import MetricsLog
from googlenet_jax.training.loss import weights_of_classes
from googlenet_jax.training.plan import Plan, make_plan
from googlenet_jax.training.state import TrainState, create_state, items, networks, restore
from googlenet_jax.training.step import make_train_step, make_train_steps
from googlenet_jax.training.tally import DIVERGED, Tally, epoch_line, new_meta

MEMORY = 'try a smaller --config.batch_size or --config.image_size, or a larger --config.micro_batches'


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
  processes.agree('data', plan.dataset.fingerprint())
  classifier = plan.classifier

  # Where to begin: resume, else initialise from weights, else from scratch -------------------------------------------
  _, state = create_state(config, len(classifier.classes), classifier.channels, plan.tx, plan.mesh)
  accuracies = dict(map(tuple, processes.of_first([*runs.validation_accuracies(workdir).items()])))
  saved = checkpoints.Checkpoints(workdir, accuracies)
  console.say(summary.introduction(config, workdir, plan.dataset, classifier, plan.mesh))
  begun = restore(saved, state)
  if begun is None and config.init_from:
    state = finetune.initialise(state, config, classifier)
  state, meta = begun or (state, new_meta(config))
  step = int(state.step)
  for later in [number for number in accuracies if number > step]:  # their checkpoints are damaged
    del accuracies[later]
  ended = step >= plan.last_step or plan.stops_early(accuracies)
  for line in summary.where_it_stands(config, classifier, step, plan.last_step, meta['epochs'], ended):
    console.say(line)
  if not ended:  # a run that has ended keeps the recipe that trained it
    note_beginning(plan, state, begun is not None, saved)

  # No process may save, evaluate or stop by its own signal while others go on: it would wait for them forever. With
  # several processes this request gets a signal when all of them have agreed to stop.
  agreed = stop if processes.count() == 1 else StopRequest()

  # Train -------------------------------------------------------------------------------------------------------------
  with contextlib.closing(MetricsLog(workdir, step)) as log:
    tally = Tally(plan, meta, int(state.seed), saved.newest)
    counted = dict(meta) if ended else meta  # the summary of a run stays as it is when its pictures are made again
    evaluator = Evaluator(plan, counted, accuracies, log, agreed, lambda: asked_to_stop(stop, agreed))
    evaluations: dict[str, Evaluation] = {}
    known = processes.of_first(log.has(step, plan.evaluated()))
    due = ended or (begun is not None and plan.evaluates(step) and not known)
    if due:
      state, evaluations = evaluate_again(plan, state, tally, evaluator, saved, log)
      ended = bool(evaluations) and (ended or plan.stops_early(accuracies))
    if not (ended or agreed.signal):
      state, evaluations = train_steps(plan, state, tally, evaluator, saved, log, stop, agreed)
      step = int(state.step)
      ended = bool(evaluations) and (step == plan.last_step or plan.stops_early(accuracies))
    saved.close()
    if not ended or agreed.signal:  # the same command makes the pictures of a run that has ended
      console.say(f'stopped at step {step} of {plan.last_step}{", saved" if step else ""}')
      return

  # What a run leaves behind ------------------------------------------------------------------------------------------
  leave_results(plan, state, tally, evaluations, accuracies)


def train_steps(
  plan: Plan,
  state: TrainState,
  tally: Tally,
  evaluator: Evaluator,
  saved: checkpoints.Checkpoints,
  log: MetricsLog,
  stop: StopRequest,
  agreed: StopRequest,
) -> tuple[TrainState, dict[str, Evaluation]]:
  """Runs the loop: steps, log points, checkpoints and evaluations, until the last step or a signal.

  `agreed` is `stop` if this is the only process; otherwise it has a signal when all processes stop.

  Returns:
    The state, and the evaluations after its step; none if a signal came first.
  """
  config, first_step, evaluations = plan.config, int(state.step), {}
  calls = compile_train_step(plan, state, tally.meta)
  bar = progress.Progress(first_step, plan.last_step, plan.steps_per_epoch)
  with contextlib.closing(bar), stop.holding(), saving_what_was_trained(lambda: state, tally, saved, log):
    tally.watch.start()
    for step, train_step, arguments in calls:  # often one step a call; `step` is the last one, see feed.py
      state, metrics = train_step(state, *arguments)
      tally.add(metrics)
      bar.advance(step)
      due = plan.ends_epoch(step) or plan.saves(step) or step % config.log_every_steps == 0
      stop_now = asked_to_stop(stop, agreed)  # read once: a signal that comes later is answered after the next step
      if not (due or stop_now):
        continue

      if agreed is not stop and saved.failed():
        saved.wait()  # raises: with several processes nothing is tried again

      # Log the mean over the steps since the last log point
      record = tally.log_point(step)
      if record is not None:
        with feed.between_steps():
          log.write(record)

      # Save, before anything that takes long or may fail; and again where saving failed in the background
      if plan.saves(step) or stop_now or (agreed is stop and saved.failed()):
        tally.check_weights(step, [params for params, _ in networks(state)])
        state, fresh = evaluator.fit_statistics(state)
        saved.save(step, items(state), tally.meta, fresh)

      # Evaluate and show; a signal ends that, and the same command does it
      if record is not None:
        bar.show(record)
      evaluations = evaluator.evaluate(state) if plan.evaluates(step) and not (stop_now or agreed.signal) else {}
      if plan.ends_epoch(step):
        speed = feed.bottleneck(record or {})
        console.say(epoch_line(step / plan.steps_per_epoch, tally.epoch, evaluations, speed))
      if evaluations:
        summary.draw_curves(config, log.records, plan.workdir, plan.dataset)
      early = evaluations and plan.stops_early(evaluator.accuracies)
      if stop_now or early or (agreed.signal and plan.evaluates(step)):
        break
      tally.watch.start()
    if agreed is stop and saved.failed(wait=True):
      saved.save(step, items(state), tally.meta, fresh)
    saved.wait()
  return state, evaluations


def leave_results(
  plan: Plan, state: TrainState, tally: Tally, evaluations: dict[str, Evaluation], accuracies: dict[int, float]
) -> None:
  """Writes what a run leaves behind when it has ended: the pictures of its answers, and `summary.json`."""
  config, workdir, step = plan.config, plan.workdir, int(state.step)
  found = summary.summary(
    config, tally.meta, tally.epoch, evaluations, step, plan.steps_per_epoch, plan.classifier, plan.mesh
  )
  if step < plan.last_step and (epochs := plan.epochs_without_better(accuracies)):
    found['epochs_without_better'] = epochs
    console.say(f'ended early: {epochs} epochs without a better validation accuracy')
  trained = plan.classifier.with_networks(networks(state)[:1])
  summary.draw_answers(config, evaluations['test'], workdir, plan.dataset, step, trained)
  if processes.is_first():
    (workdir / DIVERGED).unlink(missing_ok=True)  # an earlier try left it
  files.write_json(workdir / 'summary.json', found)  # last: a run with it counts as ended
  console.say(summary.last_lines(found, workdir, plan.mesh))


# Functions that the loop calls, in the order of the calls ------------------------------------------------------------


def asked_to_stop(stop: StopRequest, agreed: StopRequest) -> int:
  """Returns the number of the signal that came to any process, or 0. All stop after the same step of one run."""
  number = stop.signal or 0
  if processes.count() > 1:
    number = distributed.asked_to_stop(number, sharding.steps_ahead())
  else:
    number = distributed.signal_of_any(number)  # other processes train other members
  if number:
    stop.signal = agreed.signal = signal.Signals(number)
  return number


def note_beginning(plan: Plan, state: TrainState, continues: bool, saved: checkpoints.Checkpoints) -> None:
  """Tries whether the workdir takes what will be written, and notes recipe, machine and split there."""
  workdir, machine = plan.workdir, runs.machine(plan.mesh)
  if continues and (note := runs.other_machine(runs.read(workdir).machine, machine)):
    console.say(note)
  saved.try_to_write(items(state), plan.checkpoints_at_once(int(state.step)))
  runs.write(workdir, runs.Run(plan.config, plan.classifier.classes, plan.dataset.image_shape, machine))
  if rows := plan.dataset.rows():
    dividing.write(workdir, rows)


def evaluate_again(
  plan: Plan,
  state: TrainState,
  tally: Tally,
  evaluator: Evaluator,
  saved: checkpoints.Checkpoints,
  log: MetricsLog,
) -> tuple[TrainState, dict[str, Evaluation]]:
  """Evaluates the restored state: a run was killed before that, or it has ended and makes its pictures again."""
  step = int(state.step)
  with saving_what_was_trained(lambda: state, tally, saved, log):
    if not saved.is_fresh(step):
      state, fresh = evaluator.fit_statistics(state)
      if fresh:  # a signal had left no time for it
        saved.replace(step, items(state), tally.meta)
    new = not log.has(step, plan.evaluated())
    evaluations = evaluator.evaluate(state)
  if evaluations:
    if new:
      console.say(epoch_line(step / plan.steps_per_epoch, tally.epoch, evaluations))
    summary.draw_curves(plan.config, log.records, plan.workdir, plan.dataset)
  return state, evaluations


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
    with progress.waiting('compiling the training step', 'once; later about 10 s') as waiting:
      weights = weights_of_classes(plan.dataset.train.labels, len(plan.classifier.classes), plan.config.class_weights)
      makers = (plan.classifier.graphdef, plan.tx, plan.config, plan.mesh, plan.steps_per_epoch, weights)
      calls = feed.calls(plan, state, make_train_step(*makers), make_train_steps(*makers))
    meta['compile_seconds'] += waiting.seconds
    if samples is not None:
      samples.result()
  return calls


@contextlib.contextmanager
def saving_what_was_trained(
  newest_state: Callable[[], TrainState], tally: Tally, saved: checkpoints.Checkpoints, log: MetricsLog
) -> Iterator[None]:
  """Saves the steps taken if something fails between two steps, then raises the error that says what."""
  try:
    yield
  except feed.BetweenStepsError as failure:
    state, error = newest_state(), failure.__cause__
    step = int(state.step)
    if tally.is_ahead_of_log():
      record = tally.log_point(step)
      if record is not None:
        with contextlib.suppress(OSError):  # the run ends with the error that came first
          log.write(record)
    if step and processes.count() == 1:  # the others do not save now, and a save needs all of them
      saved.save(step, items(state), tally.meta, fresh=not state.batch_stats)  # nothing if the step is saved already
    text = reason(error) if isinstance(error, UserError | OSError) else trouble(error, MEMORY)
    if text is None:
      raise error from None
    raise UserError(f'{text}. {saved.newest()}; the same command continues there') from error
