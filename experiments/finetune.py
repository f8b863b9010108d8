"""Fine-tuning against training from scratch, with ten images a class.

  python -m experiments.finetune
  python -m experiments.finetune --speed      # instead: what frozen stages save at 224 pixels

A network is trained on 15,000 images of Fashion-MNIST for four epochs. Then it is fine-tuned on handwritten digits: 100
images, ten of each class. The same recipe is trained on the same 100 images from random weights. Only `init_from`
differs. Each way has the learning rate that is best on held-out digits with the first seed. A seed has training images
of its own, too; all seeds have the same held-out images and the same test images.

Each run is in runs/finetune; one that has ended is not trained again. The table: experiments/results/finetune.md.
Fashion-MNIST is read as in `main.py`: set FASHION_MNIST_DIR.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import tables
from experiments.worker import ROOT
from googlenet_jax import recipe, recipe_checks
from googlenet_jax.data import datasets
from googlenet_jax.data.splits import Dataset, Split
from googlenet_jax.host import cache, sharding
from googlenet_jax.host.signals import StopRequest
from googlenet_jax.model import torch_weights
from googlenet_jax.training import finetune, loop, optimizers
from googlenet_jax.training.state import create_state
from googlenet_jax.training.step import make_train_step

SOURCE_IMAGES, SOURCE_TEST = 15_000, 2_000
A_CLASS, HELD_OUT, TEST = 10, 400, 1_000  # digits: training images of a class; other images
RATES = (0.003, 0.01, 0.03, 0.1)
WAYS = ('fine-tuned', 'from scratch')


def source_recipe(epochs: int) -> ConfigDict:
  """The recipe of the first network: configs/fashion_fast.py without held-out images and mirroring."""
  config = recipe.read(str(ROOT / 'configs/fashion_fast.py'))
  config.epochs = config.evaluate_every_epochs = epochs
  config.data.validation_examples = 0
  config.augment.alternating_flip = False
  return config


def target_recipe(epochs: int, rate: float, seed: int) -> ConfigDict:
  """The recipe of every other network, 2 steps an epoch."""
  config = recipe.read(str(ROOT / 'configs/digits.py'))
  config.epochs = config.evaluate_every_epochs = epochs
  config.batch_size = 50
  config.learning_rate = rate
  config.schedule = 'cosine'
  config.warmup_epochs = epochs / 10
  config.nesterov = True
  config.weight_decay = 5e-4
  config.label_smoothing = 0.1
  config.seed = seed
  return config


def few_digits(seed: int) -> Dataset:
  """Ten digits of each class for training, drawn by the seed; 400 held out and 1,000 for the test, always the same."""
  digits = datasets.load('digits')
  splits = (digits.train, digits.test)
  both = Split(*(np.concatenate([getattr(split, name) for split in splits]) for name in ('images', 'labels')))
  order = np.random.default_rng(0).permutation(len(both))
  test, held_out, pool = np.split(order, [TEST, TEST + HELD_OUT])
  pool = np.random.default_rng(seed).permutation(pool)
  chosen = np.concatenate([pool[both.labels[pool] == label][:A_CLASS] for label in range(10)])
  parts = {'train': chosen, 'validation': held_out, 'test': test}
  return dataclasses.replace(digits, **{name: both.take(indices) for name, indices in parts.items()})


def train(config: ConfigDict, workdir: pathlib.Path, dataset: Dataset) -> dict[str, float]:
  """Trains what is not trained yet; returns the last accuracy by split."""
  workdir.mkdir(parents=True, exist_ok=True)
  config = finetune.with_network_of_source(config, workdir)
  recipe_checks.validate(config)
  if not (workdir / 'summary.json').exists():
    with StopRequest() as stop:
      loop.train(config, workdir, stop, dataset=dataset)
    if stop.signal:
      stop.exit()
  records = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {record['split']: record['accuracy'] for record in records}


def speed(freeze: str = 'inception_4e', batch_size: int = 16, rounds: int = 9) -> str:
  """Times a step of configs/finetune.py on torchvision's network, without and with frozen stages by turns."""
  mesh, rng, run = sharding.make_mesh(jax.devices()[:1]), np.random.default_rng(0), {}
  batch = {
    'image': rng.integers(0, 256, (batch_size, 256, 256, 3), np.uint8),
    'label': np.zeros(batch_size, np.int32),
    'index': np.arange(batch_size, dtype=np.int32),
  }
  batch = sharding.shard_batch(batch, mesh)
  for stage in ('', freeze):
    config = recipe.read(str(ROOT / 'configs/finetune.py'))
    published = dataclasses.asdict(torch_weights.PUBLISHED)
    config.model.update({**published, 'auxiliary': 'none'})
    config.freeze = stage
    tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 10))
    graphdef, state = create_state(config, 5, 3, tx, mesh)
    compiled = make_train_step(graphdef, tx, config, mesh, 10).lower(state, batch).compile()
    state, _ = compiled(state, batch)
    run[stage] = (compiled, state)
  seconds = {stage: [] for stage in run}
  for _ in range(rounds):
    for stage, (compiled, state) in run.items():
      begin = time.perf_counter()
      state, metrics = compiled(state, batch)
      jax.block_until_ready((state, metrics))
      seconds[stage].append(time.perf_counter() - begin)
      run[stage] = (compiled, state)
  ratios = sorted(a / b for a, b in zip(seconds[''], seconds[freeze], strict=True))
  without, frozen = (statistics.median(seconds[stage]) for stage in ('', freeze))
  return (
    f'A step of {batch_size} images at 224 pixels: {without:.2f} s, with freeze={freeze} {frozen:.2f} s. {rounds} of '
    f'each by turns; ratio {ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}.'
  )


def main() -> None:
  """Trains everything and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--source_epochs', type=int, default=4)
  parser.add_argument('--epochs', type=int, default=60, help='of two steps')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--speed', action='store_true', help='time steps with and without frozen stages instead')
  parser.add_argument('--output', type=pathlib.Path, default=tables.RESULTS / 'finetune.md')
  options = parser.parse_args()
  cache.use_compilation_cache()
  if options.speed:
    about = f'{tables.written_by("jax")} {tables.cores()} cores of {tables.cpu_model()}.'
    tables.publish(f'# Frozen stages\n\n{about}\n\n{speed()}', options.output.with_name('finetune_speed.md'))
    return
  runs = ROOT / 'runs' / 'finetune'
  source = runs / 'source'
  fashion = datasets.load('fashion_mnist')
  fashion = dataclasses.replace(
    fashion,
    train=fashion.train.take(np.arange(SOURCE_IMAGES)),
    test=fashion.test.take(np.arange(SOURCE_TEST)),
  )
  first = train(source_recipe(options.source_epochs), source, fashion)

  def result(way: str, rate: float, seed: int) -> dict[str, float]:
    config = target_recipe(options.epochs, rate, seed)
    config.init_from = str(source) if way == WAYS[0] else ''
    return train(config, runs / f'{way.replace(" ", "_")}_{rate}_{seed}', few_digits(seed))

  held_out = {(way, rate): result(way, rate, 0)['validation'] for way in WAYS for rate in RATES}
  best = {way: max(RATES, key=lambda rate: held_out[way, rate]) for way in WAYS}
  found = {way: [result(way, best[way], seed)['test'] for seed in range(options.seeds)] for way in WAYS}
  head = ['way', 'learning rate', *(f'seed {seed}' for seed in range(options.seeds)), 'mean']
  lines = [
    [way, f'{best[way]:g}', *(f'{value:.3f}' for value in found[way]), f'{statistics.fmean(found[way]):.3f}']
    for way in WAYS
  ]
  rates = [[way, *(f'{held_out[way, rate]:.3f}' for rate in RATES)] for way in WAYS]
  text = [
    '# Fine-tuning on ten images a class',
    tables.written_by('jax', 'flax'),
    f'{tables.cores()} cores of {tables.cpu_model()}.',
    f'The first network: {SOURCE_IMAGES:,} images of Fashion-MNIST, {options.source_epochs} epochs at 32 pixels, test '
    f"accuracy {first['test']:.3f} there. Then {10 * A_CLASS} of scikit-learn's digits, {2 * options.epochs} "
    f'steps of 50 at 32 pixels. Test accuracy on {TEST:,} other digits:',
    tables.table(head, lines).rstrip(),
    f'Accuracy on {HELD_OUT} held-out digits with seed 0, by learning rate. It chose the learning rates above:',
    tables.table(['way', *(f'{rate:g}' for rate in RATES)], rates),
  ]
  tables.publish('\n\n'.join(text), options.output)


if __name__ == '__main__':
  main()
