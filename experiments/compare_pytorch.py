"""Trains d2l's network in JAX and in PyTorch, from the same weights on the same images in the same order.

  FASHION_MNIST_DIR=DIR python -m experiments.compare_pytorch

Writes to experiments/results/compare_pytorch/: `table.md` with losses, accuracy and differences, and `loss.png` with
both loss curves. Weights, images and options are the same, so a difference between the curves is rounding.

Both sides get the same uint8 batches and scale them to [0, 1] on the device. Images are enlarged by a whole factor and
padded with zeros, because the two frameworks resize differently. Speed is not measured here:
`python -m experiments.benchmark` does that, with the same steps.

Both start from weights that PyTorch has trained for `--warm_up` steps. From random weights the loss first stays near
2.30, and rounding decides when it leaves: even our step on one device and on two part there (results/README.md).
"""

import argparse
import contextlib
import pathlib
import statistics
import sys
import tempfile

import numpy as np

from experiments import contest, tables, worker
from experiments.worker import Worker, WorkerError
from googlenet_jax.data import pipeline
from googlenet_jax.host import huge_pages
from googlenet_jax.host.errors import UserError

SIDES = {'jax': 'JAX', 'pytorch': 'PyTorch'}
SMOOTHING = 25  # steps in the running mean of the picture
BLOCK = 100  # steps between two printed lines, and in the final mean


def parse_arguments() -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--device', choices=('auto', 'cpu', 'gpu'), default='auto')
  add('--image_size', type=int, default=32, help='pixels, at least 28')
  add('--batch_size', type=int, default=64)
  add('--steps', type=int, default=1000)
  add('--warm_up', type=int, default=1000, help='steps that PyTorch trains before; 0 for random weights')
  add('--learning_rate', type=float, default=0.02)
  add('--seed', type=int, default=0)
  add('--output', type=pathlib.Path, default=tables.RESULTS / 'compare_pytorch', help='folder of the results')
  options = parser.parse_args()
  for name, least in (('image_size', 28), ('batch_size', 1), ('steps', BLOCK), ('warm_up', 0)):
    if getattr(options, name) < least:
      parser.error(f'--{name} must be at least {least}, not {getattr(options, name)}')
  return options


def write_data(options: argparse.Namespace, folder: pathlib.Path) -> None:
  """Writes the images and their order to the folder that both sides read."""
  train, test = (worker.fashion_mnist(split) for split in ('train', 'test'))
  steps = range(options.warm_up + options.steps)
  order = [pipeline.train_indices(step, len(train[0]), options.batch_size, options.seed) for step in steps]
  np.save(folder / 'order.npy', np.stack(order))
  for name, (images, labels) in (('train', train), ('test', test)):
    np.save(folder / f'{name}_images.npy', images)
    np.save(folder / f'{name}_labels.npy', labels)


def start(options: argparse.Namespace, side: str, weights: pathlib.Path) -> Worker:
  """Starts one side with its network; PyTorch draws the weights where the file does not exist."""
  process = Worker(
    contest.JAX if side == 'jax' else contest.TORCH,
    options.device,
    environment=huge_pages.environment() if side == 'jax' else {},
  )
  given = {name: getattr(options, name) for name in ('image_size', 'batch_size', 'learning_rate')}
  given |= {'seed': options.seed} if side == 'pytorch' else {'steps_per_call': 1}
  given |= {'weights': str(weights)} if weights.exists() else {}
  process.ask('make', mode='training', input_size=options.image_size, **given)
  return process


def compare(options: argparse.Namespace, folder: pathlib.Path) -> dict:
  """Trains and evaluates; returns losses, predictions and a description of both sides."""
  weights, first = folder / 'weights.safetensors', options.warm_up
  with start(options, 'pytorch', weights) as process:
    if first:
      losses = process.ask('train', folder=str(folder), first=0, steps=first)
      print(f'warmed up for {first} steps: loss {statistics.mean(losses[-BLOCK:]):.4f}', flush=True)
    process.ask('save', path=str(weights))
  found = {'losses': {side: [] for side in SIDES}, 'predictions': {}}
  with contextlib.ExitStack() as stack:
    processes = {side: stack.enter_context(start(options, side, weights)) for side in SIDES}
    found['versions'] = {name: v for p in processes.values() for name, v in p.ask('describe')['versions'].items()}
    for step in range(0, options.steps, BLOCK):
      steps = min(BLOCK, options.steps - step)
      for side, process in processes.items():
        found['losses'][side] += process.ask('train', folder=str(folder), first=first + step, steps=steps)
      means = ', '.join(f'{name} {statistics.mean(found["losses"][s][-steps:]):.4f}' for s, name in SIDES.items())
      print(f'step {step + steps} of {options.steps}: loss {means}', flush=True)
    for side, process in processes.items():
      found['predictions'][side] = process.ask('evaluate', folder=str(folder))
  return found


def tables_of(found: dict, labels: np.ndarray) -> str:
  """Both sides, and the differences between them, as two tables."""
  losses, said = ({side: np.array(found[key][side]) for side in SIDES} for key in ('losses', 'predictions'))
  last = [f'{losses[side][-BLOCK:].mean():.4f}' for side in SIDES]
  accuracy = [f'{(said[side] == labels).mean():.4f}' for side in SIDES]
  by_side = [[f'training loss, mean of the last {BLOCK} steps', *last], ['test accuracy', *accuracy]]
  apart = abs(losses['jax'] / losses['pytorch'] - 1)[:10].max()
  same = (said['jax'] == said['pytorch']).mean()
  return (
    f'{tables.table(["", *SIDES.values()], by_side)}\nOver the first 10 steps the losses differ by at most {apart:.1e} '
    f'(relative).\nAfter training both networks give {same:.1%} of the test images the same class.\n'
  )


def draw(losses: dict[str, list[float]], path: pathlib.Path) -> None:
  """Draws the loss curves on top of each other and, below, their difference."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 6), layout='constrained')
  FigureCanvasAgg(figure)
  above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
  window = np.ones(SMOOTHING) / SMOOTHING
  ours, theirs = (np.convolve(losses[side], window, 'valid') for side in SIDES)
  steps = np.arange(SMOOTHING, len(losses['jax']) + 1)
  # A wide pale line below a thin dark one: both can be seen where they coincide.
  above.plot(steps, theirs, label='PyTorch', color='#E69F00', lw=6, alpha=0.5)
  above.plot(steps, ours, label='JAX', color='#0072B2', lw=1.2)
  above.set_title('JAX and PyTorch: same weights, same images, same order')
  above.set_ylabel(f'training loss, nats\n(mean of {SMOOTHING} steps)')
  above.set_ylim(0, 1.08 * max(ours.max(), theirs.max()))
  above.legend()
  below.plot(steps, abs(ours - theirs), color='0.3', lw=1)
  below.set_yscale('log')
  below.set_ylabel('difference, nats')
  below.set_xlabel('step')
  for axes in (above, below):
    axes.grid(alpha=0.3)
  figure.savefig(path, dpi=120)


def main() -> None:
  """Trains both sides and writes the table and the picture."""
  options = parse_arguments()
  with tempfile.TemporaryDirectory(prefix='compare_pytorch_') as folder:
    folder = pathlib.Path(folder)
    try:
      machine = contest.describe(options.device)
      options.device = machine['platform']
      write_data(options, folder)
      found = compare(options, folder)
    except (UserError, WorkerError, OSError) as error:
      sys.exit(f'error: {error}')
    labels = np.load(folder / 'test_labels.npy')
    both = tables_of(found, labels)
  head = (
    f'{tables.written_by(**found["versions"])}\n{machine["device"]}, {tables.cores()} CPU cores, float32.\n'
    f'Fashion-MNIST at {options.image_size} pixels, batch {options.batch_size}, {options.steps} steps of SGD with '
    f'learning rate {options.learning_rate:g}\nand momentum 0.9, seed {options.seed}, from weights that PyTorch has '
    f'trained for {options.warm_up} steps.\n\n'
  )
  tables.publish(head + both, options.output / 'table.md')
  draw(found['losses'], options.output / 'loss.png')


if __name__ == '__main__':
  main()
