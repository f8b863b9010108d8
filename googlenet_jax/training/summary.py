"""What a run prints at its start and its end, `summary.json`, and the pictures of a run."""

import pathlib
import shlex
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from googlenet_jax import __version__
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import augment, mixing, pipeline, preparing, random_keys
from googlenet_jax.data.splits import Dataset, pictures
from googlenet_jax.evaluation import report
from googlenet_jax.evaluation.evaluate import Evaluation
from googlenet_jax.evaluation.output import Output
from googlenet_jax.host import console, processes
from googlenet_jax.model.googlenet import count_multiply_adds, count_parameters, stages_up_to
from googlenet_jax.model.options import MIN_IMAGE_SIZE
from googlenet_jax.training.loss import weights_of_classes
from googlenet_jax.training.metrics import Metrics
from googlenet_jax.training.state import partition

# Training on a CPU reaches about this share of a large matrix product, measured with batch normalisation
# (experiments/results/README.md); without it a little more.
CPU_EFFICIENCY = 0.55
LONG_HOURS = 1.0
SAMPLES = 16  # in the picture of a batch


def estimate(multiply_adds: int, examples: int, frozen: int = 0) -> float:
  """Estimates how long training would take on this CPU, from the measured rate of a matrix product.

  Args:
    multiply_adds: multiply-adds of the forward pass of one image; the backward pass takes twice as many.
    examples: images to train on; each counts as often as it is used.
    frozen: multiply-adds among them in frozen stages, which have no backward pass.

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
  return (3 * multiply_adds - 2 * frozen) * examples / rate / 3600


def introduction(
  config: ConfigDict, workdir: pathlib.Path, dataset: Dataset, classifier: Classifier, mesh: Mesh
) -> str:
  """Says what will be trained, on what, and where."""
  held = len(dataset.validation) if dataset.validation else 0
  size = 'x'.join(map(str, dataset.image_shape))
  if 'size' in dataset.test.batch(np.arange(1)):
    size = f'many sizes, kept within {size}'
  weights = weights_of_classes(dataset.train.labels, len(classifier.classes), config.class_weights)
  weighted = ''
  if weights is not None:
    rare, common = (classifier.classes[i] for i in (weights.argmax(), weights.argmin()))
    weighted = f'; class weights from {weights.min():.2g} ({common}) to {weights.max():.2g} ({rare})'
  parameters, work, frozen = count_parameters(classifier.shape), classifier.multiply_adds, ''
  if config.freeze:
    trained, _ = partition(classifier.params_shape, config.freeze)
    count = sum(leaf.size for leaf in jax.tree.leaves(trained))
    frozen = f' ({count:,} of them are trained, {config.freeze} and all before it are frozen)'
  return '\n'.join(
    [
      f'googlenet_jax {__version__}, jax {jax.__version__}, {console.device_name(mesh)}; output goes to {workdir}',
      f'{dataset.name}: {len(dataset.train)} train, {held} validation, {len(dataset.test)} test images of {size}'
      f'{weighted}',
      f'GoogLeNet: {parameters:,} parameters{frozen}, {work / 1e6:,.0f} M multiply-adds per image of '
      f'{config.image_size}x{config.image_size}x{dataset.image_shape[-1]}',
    ]
  )


def where_it_stands(
  config: ConfigDict, classifier: Classifier, step: int, last_step: int, epochs_before: int, ended: bool
) -> list[str]:
  """Says where the run stands, and warns if the rest takes hours.

  Args:
    config: the recipe.
    classifier: the network.
    step: steps taken.
    last_step: steps in all.
    epochs_before: `config.epochs` when the checkpoint was saved.
    ended: whether there is nothing left to train.
  """
  if ended:
    more = 'more --config.epochs or --config.max_steps' if step >= last_step else 'a larger --config.early_stopping'
    return [f'already ended at step {step}; {more} would continue it']
  lines = []
  if jax.default_backend() == 'cpu':
    examples = (last_step - step) * config.batch_size
    frozen = stages_up_to(config.freeze)
    frozen = count_multiply_adds(classifier.shape, config.image_size, frozen) if frozen else 0
    hours = estimate(classifier.multiply_adds, examples, frozen)
    if hours >= LONG_HOURS:
      said = f'No accelerator here: about {hours:.0f} hours for {last_step - step} steps on this CPU'
      lines.append(f'{said}. {_faster(config, step > 0)}')
  if step:
    lines.append(f'continuing after step {step} of {last_step}')
    if config.schedule in ('cosine', 'linear', 'one_cycle') and config.epochs != epochs_before:
      lines.append(
        f'note: the {config.schedule} schedule is now spread over {_epochs(config.epochs)} instead of {epochs_before}: '
        'the learning rate jumps, and the run is that of neither recipe'
      )
  return lines


def _epochs(number: float) -> str:
  return f'{number:.4g} epoch{"s" * (number != 1)}'


def _faster(config: ConfigDict, has_begun: bool) -> str:
  """Says what would take less time."""
  if preparing.normalised(config.data.name) != 'folder':
    return 'For minutes: --config=configs/fashion_fast.py, or --config=configs/digits.py'
  side = max(config.image_size // 2, MIN_IMAGE_SIZE[config.model.stem])
  ways = [f'smaller images, such as --config.image_size={side}']
  if not config.freeze:
    source = '' if config.init_from else ' and --config.init_from'
    ways.append(f'frozen stages: --config.freeze=inception_4e{source}')
  return f'Faster{", in another --workdir" if has_begun else ""}: {"; or ".join(ways)}'


def augmentations_in_words(options: Any) -> list[str]:
  """Names the augmentations that a recipe uses; `options` is its `augment` part."""
  used = {
    f'random crops of {100 * options.min_area:g} to 100 % of the area': options.min_area < 1,
    'random interpolation': options.random_interpolation,
    f'photometric distortions of strength {options.photometric:g}': options.photometric,
    f'padding of {options.padding} px': options.padding,
    f'shifts up to {options.shift} px': options.shift,
    'mirroring': options.flip,
    'mirroring in every second epoch': options.alternating_flip,
    f'erasing with probability {options.erasing:g}': options.erasing,
    f'a rectangle of the next image with probability {options.cutmix:g} (CutMix)': options.cutmix,
    f'blended with the next image (mixup, Beta({options.mixup:g}, {options.mixup:g}))': options.mixup,
  }
  return [text for text, on in used.items() if on]


def draw_samples(config: ConfigDict, workdir: pathlib.Path, dataset: Dataset, seed: int) -> None:
  """Draws `augmentations.png`: images of the first batch, as stored and as the network sees them.

  Each image is mixed with the next one, as in training. With micro-batches training takes another one.
  """
  if not processes.is_first():
    return
  indices = pipeline.train_indices(0, len(dataset.train), config.batch_size, seed)[: SAMPLES + 1]
  shown = {**dataset.train.batch(indices), 'index': indices}

  @jax.jit
  def see(seed, batch):
    keys = random_keys.example_keys(seed, jnp.int32(0), jnp.arange(len(batch['label'])))
    batch = augment.with_mirrored(batch, seed, jnp.int32(0), config.augment)
    return mixing.training_input(batch, keys, config)[0][:SAMPLES]

  seen = see(seed, shown)  # one image more than is drawn, because the last one is mixed with it
  shown = {name: array[:SAMPLES] for name, array in shown.items()}
  names = [dataset.class_names[label] for label in shown['label']]
  path = workdir / 'augmentations.png'
  with console.side_output(str(path)):
    from googlenet_jax.evaluation import galleries  # matplotlib takes a second to import

    title = f'recipe {config.name or workdir.name}: the first training batch of {dataset.name}'
    galleries.augmentations(
      pictures(shown), np.asarray(seen), names, path, title, augmentations_in_words(config.augment)
    )


def draw_curves(config: ConfigDict, records: list[dict[str, Any]], workdir: pathlib.Path, dataset: Dataset) -> None:
  """Draws `curves.png` from the records of `metrics.jsonl`."""
  if not processes.is_first():
    return
  final = ''
  for record in records:
    if record['split'] == 'test':
      final = f': test accuracy {record["accuracy"]:.4f} after {_epochs(record["epoch"])}'
  path = workdir / 'curves.png'
  with console.side_output(str(path)):
    from googlenet_jax.evaluation import plots

    plots.curves(records, path, f'recipe {config.name or workdir.name} on {dataset.name}{final}')


def draw_answers(
  config: ConfigDict,
  evaluation: Evaluation,
  workdir: pathlib.Path,
  dataset: Dataset,
  step: int,
  classifier: Classifier | None = None,
) -> None:
  """Draws `predictions.png` and `confusion.png` of the test images, and writes what `report.write` does.

  Args:
    config: the recipe.
    evaluation: the answers to the test images.
    workdir: folder of the run.
    dataset: the data set.
    step: steps taken.
    classifier: the trained network, for class activation maps.
  """
  if not processes.is_first():
    return
  title = f'recipe {config.name or workdir.name}, {dataset.name} test images, step {step}'
  names, path = dataset.class_names, workdir / 'predictions.png'
  with console.side_output(str(path)):
    from googlenet_jax.evaluation import galleries

    galleries.predictions(evaluation, dataset.test, names, path, title)
  path = workdir / 'confusion.png'
  with console.side_output(str(path)):
    from googlenet_jax.evaluation import plots

    plots.confusion(evaluation, names, path, title)
  maps = classifier and classifier.of_this_process()  # the others do not draw
  report.write(evaluation, dataset.test, names, Output(workdir), title, 'test', maps)


def summary(
  config: ConfigDict,
  meta: dict[str, Any],
  train: Metrics,
  evaluations: dict[str, Evaluation],
  step: int,
  steps_per_epoch: int,
  classifier: Classifier,
  mesh: Mesh,
) -> dict[str, Any]:
  """Returns what `summary.json` holds.

  Args:
    config: the recipe.
    meta: counts of the whole run, see `tally.new_meta`.
    train: sums over the last epoch.
    evaluations: by name, see `Evaluator.evaluate`.
    step: steps taken.
    steps_per_epoch: steps in an epoch.
    classifier: the network.
    mesh: devices.
  """
  raw, means = evaluations.get('test_raw'), train.mean()
  return {
    'test_accuracy': evaluations['test'].accuracy,
    'test_loss': evaluations['test'].loss,
    **({'test_accuracy_raw': raw.accuracy} if raw else {}),
    'train_accuracy': means['accuracy'],
    'train_loss': means['loss'],
    'epochs': step / steps_per_epoch,
    'steps': step,
    **({'skipped_updates': meta.get('skipped_updates', 0)} if config.skip_nonfinite else {}),
    'parameters': count_parameters(classifier.shape),
    'train_examples_per_second': meta['train_examples'] / meta['train_seconds'],
    'train_seconds': meta['train_seconds'],
    'compile_seconds': meta['compile_seconds'],
    'device': mesh.devices.flat[0].device_kind,
    'device_count': mesh.size,
    'jax_version': jax.__version__,
    'seed': config.seed,
  }


def last_lines(found: dict[str, Any], workdir: pathlib.Path, mesh: Mesh) -> str:
  """Says where the files are, and ends with the two lines that d2l prints."""
  others = [name for name in ('roc.png', 'split.csv') if (workdir / name).exists()]  # two classes; a folder
  return '\n'.join(
    [
      f'In {workdir}: predictions.png, mistakes.png, mistakes.csv, per_class.csv, confusion.png, curves.png, '
      f'{", ".join(["augmentations.png", *others, "summary.json"])}',
      f'More curves: pip install tensorboard, then tensorboard --logdir {shlex.quote(str(workdir / "tensorboard"))}',
      f'loss {found["train_loss"]:.3f}, train acc {found["train_accuracy"]:.3f}, test acc {found["test_accuracy"]:.3f}',
      f'{found["train_examples_per_second"]:.1f} examples/sec on {console.device_name(mesh)}',
    ]
  )
