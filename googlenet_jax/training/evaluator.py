"""What a training does with its network between two steps: batch statistics that fit, and evaluations."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax

from googlenet_jax.data import pipeline
from googlenet_jax.evaluation import statistics
from googlenet_jax.evaluation.evaluate import Evaluation, damage, evaluate
from googlenet_jax.host import backend, console, processes, progress
from googlenet_jax.host.signals import StoppedError, StopRequest
from googlenet_jax.training.feed import between_steps
from googlenet_jax.training.log import MetricsLog
from googlenet_jax.training.plan import Plan
from googlenet_jax.training.state import TrainState, networks, with_statistics
from googlenet_jax.training.tally import make_record

PATIENCE = 5.0  # seconds that a signal waits for batch statistics; a scheduler kills after 30 s or more


class Evaluator:
  """Fits batch statistics and evaluates. Both are compiled at their first use, so the first step waits for neither."""

  def __init__(
    self,
    plan: Plan,
    meta: dict[str, Any],
    accuracies: dict[int, float],
    log: MetricsLog,
    stop: StopRequest,
    ask: Callable[[], Any],
  ):
    """Compiles nothing yet.

    Args:
      plan: what does not change.
      meta: counts of the run; seconds of compiling are added.
      accuracies: accuracy on the validation images by step; evaluations add to it.
      log: evaluations are written there.
      stop: a signal ends what is under way.
      ask: called before each batch of an evaluation; it may give `stop` a signal on which all processes agree.
    """
    self._plan, self._meta, self.accuracies = plan, meta, accuracies
    self._log, self._stop, self._ask = log, stop, ask
    self._can_fit = self._can_evaluate = False

  @between_steps()
  def fit_statistics(self, state: TrainState) -> tuple[TrainState, bool]:
    """Computes batch statistics that fit the weights, for the raw and for the averaged ones.

    Returns:
      The state with them and True; or the state as it is and False, if a signal leaves no time.

    Raises:
      BetweenStepsError: training images cannot be had, or the machine has a trouble.
    """
    plan = self._plan
    if plan.statistics_step is None:
      return state, True
    if self._stop.signal and not self._can_fit:
      return state, False

    def recompute():
      seed, step = int(state.seed), int(state.step)
      split, config = plan.dataset.train, plan.config
      return statistics.recompute(plan.statistics_step, networks(state), split, config, seed, step, plan.mesh)

    try:
      with self._first_use('the batch statistics', self._can_fit):
        patience = PATIENCE if self._can_fit else 0
        if processes.count() > 1:
          patience = None  # a process that gave up would let the others wait
        found = self._stop.unless_stopped(_as_in_this_thread(recompute), patience)
    except StoppedError:
      return state, False
    self._can_fit = True
    return with_statistics(state, found, plan.mesh), True

  @between_steps()
  def evaluate(self, state: TrainState) -> dict[str, Evaluation]:
    """Evaluates on the validation and test images, writes the records, and says how many pictures are damaged.

    Returns:
      The evaluations by name; empty if a signal came first. If weights are averaged, 'test' has the averaged weights
      and 'test_raw' the raw weights; the same for 'validation' and 'validation_raw'.

    Raises:
      BetweenStepsError: too many pictures are damaged, or the machine has a trouble.
    """
    try:
      self._compile(state)
      evaluations = self._evaluate(state)
    except StoppedError:
      return {}
    if note := damage({'validation': self._plan.dataset.validation, 'test': self._plan.dataset.test}):
      console.say(note)
    return evaluations

  def _compile(self, state: TrainState) -> None:
    """Compiles the evaluation by a first use. A test batch has the same form, and may have damaged pictures."""
    if self._can_evaluate:
      return
    plan = self._plan

    def predict():
      batch = next(pipeline.eval_batches(plan.dataset.train, plan.config.batch_size, plan.mesh))
      jax.block_until_ready(plan.classifier.predict_step(1)(networks(state)[0], batch))

    with self._first_use('the evaluation', self._can_evaluate):
      self._stop.unless_stopped(_as_in_this_thread(predict))
    self._can_evaluate = True

  def _evaluate(self, state: TrainState) -> dict[str, Evaluation]:
    plan, step, evaluations = self._plan, int(state.step), {}
    classifier = plan.classifier.with_networks(networks(state))
    for name, split in (('validation', plan.dataset.validation), ('test', plan.dataset.test)):
      if split is None:
        continue
      begin = time.perf_counter()
      results = evaluate(classifier, split, before_batch=self._before_batch)
      speed = len(results) * len(split) / (time.perf_counter() - begin)
      for result, which in zip(results, (name, f'{name}_raw'), strict=False):
        evaluations[which] = result
        means = {'loss': result.loss, 'accuracy': result.accuracy}
        self._log.write(make_record(plan, step, which, means, speed))
    if 'validation' in evaluations:
      self.accuracies[step] = evaluations['validation'].accuracy
    return evaluations

  def _before_batch(self) -> None:
    self._ask()
    self._stop.check()

  @contextlib.contextmanager
  def _first_use(self, what: str, used: bool):
    """Says that something is compiled in the block, and counts the seconds."""
    if used:
      yield
      return
    with progress.waiting(f'compiling {what}', 'once') as waiting:
      yield
    self._meta['compile_seconds'] += waiting.seconds


def _as_in_this_thread(work: Callable[[], Any]) -> Callable[[], Any]:
  """Returns `work` for another thread, where it has the settings of JAX that a user made for this thread only."""
  here = {name: getattr(jax.config, name) for name in (*backend.OURS, 'jax_default_matmul_precision')}

  def run():
    with contextlib.ExitStack() as stack:
      for name, value in here.items():
        if getattr(jax.config, name) != value:  # others would make JAX compile again
          stack.enter_context(getattr(jax, name.removeprefix('jax_'))(getattr(value, 'value', value)))
      return work()

  return run
