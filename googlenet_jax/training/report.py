"""What a run leaves behind: log points, evaluations, pictures, the summary; and the estimate at its start."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from googlenet_jax import __version__, recipe
from googlenet_jax.data import augment, pipeline, random_keys
from googlenet_jax.data.splits import Dataset, Split, pictures
from googlenet_jax.evaluation import evaluate
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.host import checkpoints, console, sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet
from googlenet_jax.training.state import abstract, empty_metrics, for_prediction

# About what training on a CPU reaches of a large matrix product, with batch normalisation (experiments/results/
# cpu_efficiency.md); without it is a little more (benchmark_cpu.md).
CPU_EFFICIENCY = 0.55
LONG_HOURS = 1.0
SAMPLES = 16  # in the picture of a batch


def estimate(multiply_adds: int, examples: int) -> float:
  """Hours that training would take on this CPU, from the measured rate of a matrix product.

  Args:
    multiply_adds: of the forward pass of one image; the backward pass takes twice as many again.
    examples: images to train on, counted as often as they come.

  Returns:
    Hours, right within a factor of about two.
  """
  a = jnp.ones((1024, 1024))
  product = jax.jit(lambda a: a @ a)
  product(a).block_until_ready()
  seconds = []
  for _ in range(5):
    begin = time.perf_counter()
    product(a).block_until_ready()
    seconds.append(time.perf_counter() - begin)
  rate = 1024**3 / min(seconds) * CPU_EFFICIENCY
  return 3 * multiply_adds * examples / rate / 3600


class Report:
  """Writes and shows one run; the loop in train.py calls it and decides nothing by it but when to stop."""

  def __init__(
    self,
    config: Any,
    workdir: pathlib.Path,
    dataset: Dataset,
    mesh: Mesh,
    graphdef: nnx.GraphDef,
    state: Any,
    meta: dict[str, Any],
    schedule: optax.Schedule,
    steps_per_epoch: int,
    last_step: int,
  ):
    """Takes up the counts in `meta`, which came with the checkpoint, or zeros."""
    self._config, self._workdir, self._dataset, self._mesh = config, workdir, dataset, mesh
    self._schedule, self._steps_per_epoch, self._last_step = schedule, steps_per_epoch, last_step
    self._meta = meta
    self._model = nnx.merge(graphdef, state.params, state.batch_stats)
    self._parameters = googlenet.count_parameters(self._model)
    self._graphdef = graphdef
    first_step = int(state.step)
    self._trains = first_step < last_step  # if not, the summary that is made again says what it said
    self.watch = console.Stopwatch(meta['train_seconds'])
    self._log = console.MetricsLog(workdir, first_step)
    self._sums = jax.device_get(state.metrics)
    self._parts = [name for name in self._sums if name not in empty_metrics()]
    self._step = first_step
    self._state_shapes = abstract(state)
    self._eval_step: Callable[..., Any] | None = None
    self._last_evaluation: tuple[int, Evaluation] | None = None
    self._raw_accuracy: float | None = None  # of the raw weights beside the averaged ones
    self.progress = console.Progress(first_step, last_step, steps_per_epoch)

  def introduce(self, step: int) -> None:
    """Prints what will be trained, on what, and how long it may take; writes `config.json`."""
    data, config = self._dataset, self._config
    held = len(data.validation) if data.validation else 0
    size = 'x'.join(map(str, data.image_shape))
    if 'size' in data.test.batch(np.arange(1)):
      size = f'many sizes, kept within {size}'
    work = googlenet.count_multiply_adds(self._model, config.image_size)
    console.say(
      f'googlenet_jax {__version__}, jax {jax.__version__}, {sharding.device_name(self._mesh)}; '
      f'everything goes to {self._workdir}'
    )
    console.say(f'{data.name}: {len(data.train)} train, {held} validation, {len(data.test)} test images of {size}')
    console.say(
      f'GoogLeNet: {self._parameters:,} parameters, {work / 1e6:,.0f} M multiply-adds an image of '
      f'{config.image_size}x{config.image_size}x{data.image_shape[-1]}'
    )
    if jax.default_backend() == 'cpu' and step < self._last_step:
      hours = estimate(work, (self._last_step - step) * config.batch_size)
      if hours >= LONG_HOURS:
        console.say(
          f'No accelerator here: about {hours:.0f} hours for {self._last_step - step} steps on this CPU. '
          'For minutes: --config=configs/fashion_fast.py, or --config=configs/digits.py'
        )
    if step >= self._last_step:
      console.say(f'already ended at step {step}; more --config.epochs or --config.max_steps would go on')
    elif step:
      console.say(f'continuing after step {step} of {self._last_step}')
      if config.schedule in ('cosine', 'one_cycle') and config.epochs != self._meta['epochs']:
        console.say(
          f'note: the {config.schedule} schedule is now spread over {config.epochs} epochs instead of '
          f'{self._meta["epochs"]}: the learning rate jumps, and the run is not that of either recipe'
        )
    if step < self._last_step:
      console.say('compiling ...')
    checkpoints.write_json(self._workdir / 'config.json', config.to_dict())

  def draw_samples(self, batch: dict[str, jax.Array]) -> None:
    """Draws `augmentations.png`: images of the first batch, as stored and as the network sees them."""
    if jax.process_index() != 0:
      return
    from googlenet_jax.evaluation import plots

    # What this process holds of the batch begins at position 0.
    shown = {name: array.addressable_shards[0].data[:SAMPLES] for name, array in batch.items()}
    count = len(shown['label'])

    @jax.jit
    def see(seed, image, sizes):
      keys = random_keys.example_keys(seed, jnp.int32(0), jnp.arange(count))
      return augment.augment(image, keys, self._config.image_size, self._config.augment, sizes)

    seen = see(recipe.sampling_seed(self._config), shown['image'], shown.get('size'))
    names = [self._dataset.class_names[label] for label in np.asarray(shown['label'])]
    stored = pictures(jax.device_get(shown))
    plots.augmentations(stored, np.asarray(seen), names, self._workdir / 'augmentations.png')

  def _compile_evaluation(self) -> None:
    """Compiles the evaluation step: at the first evaluation, so that the first step need not wait for it."""
    begin = time.perf_counter()
    batch = next(pipeline.eval_batches(self._dataset.test, self._config.batch_size, self._mesh))
    step = evaluate.make_eval_step(self._graphdef, self._config, self._mesh)
    self._eval_step = step.lower(for_prediction(self._state_shapes), batch).compile()
    if self._trains:
      self._meta['compile_seconds'] += time.perf_counter() - begin

  def _record(
    self, step: int, split: str, loss: float, accuracy: float, speed: float, **parts: float
  ) -> dict[str, Any]:
    record = {
      'step': step,
      'epoch': step / self._steps_per_epoch,
      'split': split,
      'loss': loss,
      'accuracy': accuracy,
      'learning_rate': float(self._schedule(step - 1)),  # of the last step taken
      'examples_per_second': speed,
      **parts,
    }
    self._log.write(record)
    return record

  def log_training(self, step: int, sums: dict[str, np.ndarray], saved: checkpoints.Checkpoints) -> None:
    """Writes and shows the mean over the steps since the last log point.

    Args:
      step: steps taken.
      sums: `TrainState.metrics` on the host.
      saved: to name the newest one if the loss is not finite.

    Raises:
      UserError: the loss of a step was not finite.
    """
    seconds = self.watch.stop()
    bad_step = int(sums['bad_step'])
    if bad_step >= 0:
      self.close()
      raise UserError(
        f'step {bad_step + 1}: the loss is not finite, at a learning rate of {float(self._schedule(bad_step)):g}. '
        f'Lower --config.learning_rate, or set --config.clip_norm=1, in a new --workdir. {saved.newest()}'
      )
    count = int(sums['count'] - self._sums['count'])
    examples = (step - self._step) * self._config.batch_size
    self._meta['train_examples'] += examples
    loss, *parts = (float(sums[name] - self._sums[name]) / count for name in ('loss', *self._parts))
    accuracy = int(sums['correct'] - self._sums['correct']) / count
    parts = {f'loss_{name}': value for name, value in zip(self._parts, parts, strict=True)}
    self.progress.show(self._record(step, 'train', loss, accuracy, examples / seconds, **parts))
    self._sums, self._step = sums, step
    self._meta['epoch_metrics'] = {
      'loss': float(sums['loss'] / sums['count']),
      'accuracy': float(sums['correct'] / sums['count']),
    }

  def begin_epoch(self) -> None:
    """The sums on the device start from zero again."""
    self._sums = jax.tree.map(np.zeros_like, self._sums)

  def evaluate(self, step: int, state: Any) -> float | None:
    """Evaluates on the validation and test images, draws the curves; returns the validation accuracy, if any.

    Where weights are averaged, these are what is evaluated, and the raw ones beside them.
    """
    if self._eval_step is None:
      self._compile_evaluation()
    accuracy, line = None, []
    for name, split in (('validation', self._dataset.validation), ('test', self._dataset.test)):
      if split is None:
        continue
      networks = {name: for_prediction(state)}
      if state.averaged:
        networks[f'{name}_raw'] = state.params, state.batch_stats
      result, *raw = self._evaluate_split(step, networks, split)
      line.append(f'{name} loss {result.loss:.3f}, acc {result.accuracy:.4f}')
      if raw:
        self._raw_accuracy = raw[0].accuracy
        line[-1] += f' (raw weights {self._raw_accuracy:.4f})'
      if name == 'validation':
        accuracy = result.accuracy
      else:
        self._last_evaluation = step, result
    train = self._meta['epoch_metrics']
    console.say(
      f'epoch {step / self._steps_per_epoch:.4g}: train loss {train["loss"]:.3f}, acc {train["accuracy"]:.4f}; '
      + '; '.join(line)
    )
    if jax.process_index() == 0:
      from googlenet_jax.evaluation import plots

      plots.curves(self._log.records, self._workdir / 'curves.png')
    return accuracy

  def _evaluate_split(self, step: int, networks: dict[str, Any], split: Split) -> list[Evaluation]:
    begin = time.perf_counter()
    results = evaluate.evaluate(self._eval_step, [*networks.values()], split, self._config.batch_size, self._mesh)
    speed = len(networks) * len(split) / (time.perf_counter() - begin)
    for name, result in zip(networks, results, strict=True):
      self._record(step, name, result.loss, result.accuracy, speed)
    return results

  def meta(self) -> dict[str, Any]:
    """What a checkpoint has to carry for the summary to count the whole run."""
    return {**self._meta, 'train_seconds': self.watch.seconds, 'epochs': self._config.epochs}

  def finish(self, step: int, state: Any) -> None:
    """Draws the last pictures, writes `summary.json`, prints the article's two lines."""
    if self._last_evaluation is None or self._last_evaluation[0] != step:
      self.evaluate(step, state)  # the run had ended before: its pictures and summary are made again
    self.close()
    result, train = self._last_evaluation[1], self._meta['epoch_metrics']
    seconds = self.watch.seconds
    speed = self._meta['train_examples'] / seconds
    summary = {
      'test_accuracy': result.accuracy,
      'test_loss': result.loss,
      **({'test_accuracy_raw': self._raw_accuracy} if state.averaged else {}),
      'train_accuracy': train['accuracy'],
      'train_loss': train['loss'],
      'epochs': step / self._steps_per_epoch,
      'steps': step,
      'parameters': self._parameters,
      'train_examples_per_second': speed,
      'train_seconds': seconds,
      'compile_seconds': self._meta['compile_seconds'],
      'device': self._mesh.devices.flat[0].device_kind,
      'device_count': self._mesh.size,
      'jax_version': jax.__version__,
      'seed': self._config.seed,
    }
    if jax.process_index() == 0:
      from googlenet_jax.evaluation import plots

      names = self._dataset.class_names
      plots.confusion(result, names, self._workdir / 'confusion.png')
      plots.mistakes(result, self._dataset.test, names, self._workdir / 'mistakes.png')
      checkpoints.write_json(self._workdir / 'summary.json', summary)
    console.say(f'augmentations.png, curves.png, confusion.png, mistakes.png and summary.json are in {self._workdir}')
    console.say(
      f'loss {train["loss"]:.3f}, train acc {train["accuracy"]:.3f}, test acc {result.accuracy:.3f}\n'
      f'{speed:.1f} examples/sec on {sharding.device_name(self._mesh)}'
    )

  def close(self) -> None:
    """Closes the log and the progress bar."""
    self.progress.close()
    self._log.close()
