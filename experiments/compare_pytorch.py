"""JAX and PyTorch side by side: the article's network, the same weights, the same images in the same order.

  python experiments/compare_pytorch.py

Trains both on the real Fashion-MNIST and writes to experiments/results/compare_pytorch/: `table.md` (also printed),
`table.csv`, and `loss.png`, both loss curves on top of each other. `--help` lists the options. Weights, order and
options being the same, a difference between the curves is rounding.

How it is measured. Each framework runs in a process of its own, with its own threads, and works only when it is told
to: the two train in turns, a block of steps each, and then evaluate in turns, so that a machine which slows down slows
both. Speed is the median over the blocks after the first. Both get the same uint8 batches from the same NumPy code, and
scale them to [0, 1] on the device; images are enlarged by a whole factor and padded with zeros, because the two resize
differently. JAX runs as `main.py` has it, on huge pages and on two devices where that is faster; PyTorch as it comes,
eagerly, channels last, its SGD not fused (benchmark.py has faster settings beside it, huge pages among them);
`--compile` adds a third column for `torch.compile`. Time to first step is that from the start of the process to the end
of its first training step, imports included; the second start finds what the first has left in caches, that of compiled
programs among them. Peak memory is the process's, on a GPU also the device's. `--validation` looks at held-out training
images instead.

Both start from weights that PyTorch has trained for `--warm_up` steps, momentum from zero. From random weights the loss
stays on a plateau near 2.30 first, and when it leaves that depends on rounding: even one device and two of ours, which
differ in the order of sums, part there (rounding.py).
"""

import argparse
import csv
import os
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from experiments.benchmark_tables import command, cores, cpu_model, publish, table
from experiments.compare_sides import MOMENTUM
from experiments.worker import Worker, WorkerError
from googlenet_jax.host import huge_pages

SIDES = {'jax': 'JAX', 'pytorch': 'PyTorch', 'pytorch_compiled': 'PyTorch compiled'}
VALIDATION_EXAMPLES = 5000
SMOOTHING = 25  # steps in the running mean of the picture


def parse_arguments() -> argparse.Namespace:
  """The options."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--image_size', type=int, default=32, help='pixels, at least 28')
  add('--batch_size', type=int, default=64)
  add('--steps', type=int, default=1000)
  add('--warm_up', type=int, default=1000, help='steps that PyTorch trains alone first; 0 for random weights')
  add('--learning_rate', type=float, default=0.02)
  add('--block', type=int, default=100, help='steps in a turn')
  add('--evaluations', type=int, default=3, help='passes over the test images')
  add('--threads', type=int, help='processor cores for both, on Linux; all by default')
  add('--seed', type=int, default=0)
  add('--compile', action='store_true', help='torch.compile as well')
  add('--validation', action='store_true', help='5000 held-out training images instead of the test images')
  add('--source_dir', default='', help='folder of the four original files; FASHION_MNIST_DIR stands in')
  add('--data_dir', default='', help='where TFDS keeps prepared sets')
  add('--results', type=pathlib.Path, default=ROOT / 'experiments' / 'results' / 'compare_pytorch')
  arguments = parser.parse_args()
  if arguments.warm_up < 0:
    parser.error(f'--warm_up must be at least 0, not {arguments.warm_up}')
  for name in ('batch_size', 'block', 'evaluations', 'threads'):
    if (value := getattr(arguments, name)) is not None and value < 1:
      parser.error(f'--{name} must be at least 1, not {value}')
  if arguments.image_size < 28:
    parser.error('--image_size must be at least 28')
  if arguments.threads and not hasattr(os, 'sched_setaffinity'):
    parser.error('--threads needs Linux')
  if arguments.steps < 2 * arguments.block or arguments.evaluations < 2:
    parser.error('--steps must be at least two times --block, --evaluations at least 2: the first one warms up')
  return arguments


def write_data(arguments: argparse.Namespace, folder: pathlib.Path) -> None:
  """Loads the images and the order of training, and lays them where both find them."""
  from googlenet_jax.data import datasets, pipeline

  dataset = datasets.load(
    'fashion_mnist', arguments.source_dir, arguments.data_dir, VALIDATION_EXAMPLES if arguments.validation else 0
  )
  order = pipeline.train_order(len(dataset.train), arguments.batch_size, arguments.seed)
  steps = range(arguments.warm_up + arguments.steps)
  np.save(folder / 'order.npy', np.stack([order[step] for step in steps]))
  for name, split in (('train', dataset.train), ('test', dataset.validation or dataset.test)):
    np.save(folder / f'{name}_images.npy', split.images)
    np.save(folder / f'{name}_labels.npy', split.labels)


def started(arguments: argparse.Namespace, side: str, folder: pathlib.Path) -> tuple[Worker, list[float], float]:
  """Starts a process and has it take one step: the process, the loss in a list, and the seconds that this took."""
  begin = time.perf_counter()
  process = Worker('compare_sides.py', environment(side, folder))
  make(process, arguments, side, folder, arguments.warm_up)
  losses, _ = process.ask('train', steps=1)
  return process, losses, time.perf_counter() - begin


def environment(side: str, folder: pathlib.Path) -> dict[str, str]:
  """Caches of this comparison's own, so that the first start is a cold one; and room on a GPU for the others."""
  return (huge_pages.environment() if side == 'jax' else {}) | {
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    'TORCHINDUCTOR_CACHE_DIR': str(folder / 'inductor'),
  }


def make(process: Worker, arguments: argparse.Namespace, side: str, folder: pathlib.Path, first_step: int) -> None:
  """Has a process make its network; `first_step` is where it begins in the order of images."""
  given = {name: getattr(arguments, name) for name in ('image_size', 'batch_size', 'learning_rate', 'seed')}
  process.ask('make', side=side, folder=str(folder), first_step=first_step, **given)


def warm_up(arguments: argparse.Namespace, folder: pathlib.Path) -> None:
  """PyTorch draws the weights and trains them behind the plateau; all others start from what it leaves."""
  process = Worker('compare_sides.py', environment('pytorch', folder))
  make(process, arguments, 'pytorch', folder, first_step=0)
  if arguments.warm_up:
    losses, _ = process.ask('train', steps=arguments.warm_up)
    print(f'warmed up for {arguments.warm_up} steps: loss {statistics.mean(losses[-100:]):.4f}', flush=True)
  process.ask('save')
  process.close()


def compare(arguments: argparse.Namespace, folder: pathlib.Path) -> dict:
  """Runs everything; returns what was measured."""
  sides = [side for side in SIDES if side != 'pytorch_compiled' or arguments.compile]
  found = {name: {} for name in ('cold', 'warm', 'memory', 'accuracy', 'about')}
  losses, processes = {}, {}
  training, inference = {side: [] for side in sides}, {side: [] for side in sides}

  warm_up(arguments, folder)
  for side in sides:
    process, _, found['cold'][side] = started(arguments, side, folder)
    process.close()
  for side in ('jax', 'pytorch'):
    process = Worker('compare_sides.py', environment(side, folder))
    make(process, arguments, side, folder, arguments.warm_up)
    process.ask('start')
    process.close()

  for side in sides:
    processes[side], losses[side], found['warm'][side] = started(arguments, side, folder)
  step = 1
  while step < arguments.steps:
    steps = min(arguments.block, arguments.steps - step)
    for side, process in processes.items():
      block, seconds = process.ask('train', steps=steps)
      losses[side] += block
      training[side].append(steps * arguments.batch_size / seconds)
    step += steps
    means = ', '.join(f'{SIDES[side]} {statistics.mean(losses[side][-steps:]):.4f}' for side in sides)
    print(f'step {step} of {arguments.steps}: loss {means}', flush=True)
  for side, process in processes.items():
    found['memory'][side] = process.ask('memory')  # of training: evaluation needs less
  images = len(np.load(folder / 'test_labels.npy'))
  for _ in range(arguments.evaluations):
    for side, process in processes.items():
      found['accuracy'][side], seconds = process.ask('evaluate')
      inference[side].append(images / seconds)
  for side, process in processes.items():
    found['about'][side] = process.ask('describe')
    process.close()

  found |= {'losses': losses, 'against': differences(folder, losses)}
  for name, speeds in (('training', training), ('inference', inference)):
    speeds = {side: blocks[1:] for side, blocks in speeds.items()}  # the first turn warms up
    found[name] = {side: statistics.median(blocks) for side, blocks in speeds.items()}
    ratios = [ours / theirs for ours, theirs in zip(speeds['jax'], speeds['pytorch'], strict=True)]
    for word, value in (('least', min), ('median', statistics.median), ('greatest', max)):
      found['against'][f'{name}, times as fast as PyTorch turn by turn: {word}'] = value(ratios)
  return found


def differences(folder: pathlib.Path, losses: dict[str, list[float]]) -> dict[str, float]:
  """How far JAX is from PyTorch: at the first weights, on the first batch; and at the end."""

  def vector(gradients):
    return np.concatenate([gradients[name].ravel() for name in exact])

  def distance(gradients, others):
    return np.linalg.norm(vector(gradients) - vector(others)) / np.linalg.norm(vector(others))

  ours, theirs, exact = (
    dict(np.load(folder / f'{name}.npz')) for name in ('jax_float32', 'pytorch_float32', 'pytorch_float64')
  )
  logits, expected, _ = (gradients.pop('logits') for gradients in (ours, theirs, exact))
  distance_of_logits = abs(logits - expected).max() / abs(expected).max()
  loss = [np.array(losses[side][:10]) for side in ('jax', 'pytorch')]
  predictions = [np.load(folder / f'{side}.predictions.npy') for side in ('jax', 'pytorch')]
  rows = {
    'logits of the first batch: greatest difference / greatest value': distance_of_logits,
    'first gradient, all tensors as one vector: relative difference': distance(ours, theirs),
    'the same of JAX and PyTorch in float64': distance(ours, exact),
    'the same of PyTorch and PyTorch in float64': distance(theirs, exact),
    'loss over the first 10 steps: greatest relative difference': (abs(loss[0] - loss[1]) / loss[1]).max(),
    'images of the evaluation given the same class, after training': (predictions[0] == predictions[1]).mean(),
  }
  return {name: float(value) for name, value in rows.items()}


def rows_of(found: dict, test: str) -> list[tuple[str, str, dict]]:
  """The rows of the table: quantity, format, value by side."""
  rows = [
    ('training, images/s', '.0f', found['training']),
    ('inference, images/s', '.0f', found['inference']),
    ('start to first step, s, first time', '.1f', found['cold']),
    ('start to first step, s, again', '.1f', found['warm']),
    ('peak memory of training, MiB', '.0f', {side: host / 2**20 for side, (host, _) in found['memory'].items()}),
  ]
  if all(device for _, device in found['memory'].values()):
    on_device = {side: device / 2**20 for side, (_, device) in found['memory'].items()}
    rows.append(('peak memory on the device, MiB', '.0f', on_device))
  last = {side: statistics.mean(losses[-100:]) for side, losses in found['losses'].items()}
  return [
    *rows,
    ('training loss, mean of the last 100 steps', '.4f', last),
    (f'{test} accuracy', '.4f', found['accuracy']),
  ]


def write(arguments: argparse.Namespace, found: dict) -> None:
  """Prints the table; writes it as Markdown and CSV, and the picture."""
  folder = arguments.results
  sides = list(found['losses'])
  rows = rows_of(found, 'validation' if arguments.validation else 'test')
  versions = '; '.join(dict.fromkeys(about for about, _ in found['about'].values()))
  devices = ', '.join(dict.fromkeys(device for _, device in found['about'].values()))
  head = [
    f'Measured by `{command()}`: {versions}; {devices}, {cores()} cores of {cpu_model()}, float32.',
    f'Fashion-MNIST at {arguments.image_size} pixels, batch {arguments.batch_size}, {arguments.steps} steps of SGD, '
    f'learning rate {arguments.learning_rate:g}, momentum {MOMENTUM:g}, seed {arguments.seed}, from weights that '
    f'PyTorch has trained for {arguments.warm_up} steps. JAX on huge pages, PyTorch as it comes.',
    '',
  ]
  names = [SIDES[side] for side in sides]
  by_side = table(['', *names], [[name, *(format(values[s], spec) for s in sides)] for name, spec, values in rows])
  against = [[name, f'{value:{".2g" if value < 0.1 else ".4g"}}'] for name, value in found['against'].items()]
  publish('\n'.join([*head, by_side, table(['JAX against PyTorch', ''], against)]), folder / 'table.md')
  with (folder / 'table.csv').open('w', newline='') as file:
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['quantity', *names])
    writer.writerows([name, *(values[side] for side in sides)] for name, _, values in rows)
    writer.writerows([f'JAX against PyTorch: {name}', value] for name, value in found['against'].items())
  draw(found['losses'], folder / 'loss.png')


def draw(losses: dict[str, list[float]], path: pathlib.Path) -> None:
  """The loss curves on top of each other, and how far they lie apart."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 6), layout='constrained')
  above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
  smooth = {side: np.convolve(values, np.ones(SMOOTHING) / SMOOTHING, 'valid') for side, values in losses.items()}
  steps = np.arange(SMOOTHING, len(losses['jax']) + 1)
  # A broad pale line below a thin dark one: both are seen where they coincide.
  styles = {'pytorch': dict(color='C1', lw=6, alpha=0.5), 'pytorch_compiled': dict(color='C2', lw=3, alpha=0.7)}
  for side in sorted(losses, key='jax'.__eq__):
    above.plot(steps, smooth[side], label=SIDES[side], **styles.get(side, dict(color='C0', lw=1.2)))
  above.set_ylabel(f'training loss, nats\n(mean of {SMOOTHING} steps)')
  above.set_ylim(0, 1.08 * max(values.max() for values in smooth.values()))
  above.legend()
  for side in losses:
    if side != 'jax':
      below.plot(steps, abs(smooth[side] - smooth['jax']), color=styles[side]['color'], lw=1, label=SIDES[side])
  below.set_yscale('log')
  below.set_ylabel('JAX and PyTorch:\ndifference, nats')
  below.set_xlabel('step, from the same weights')
  for axes in (above, below):
    axes.grid(alpha=0.3)
  FigureCanvasAgg(figure)
  figure.savefig(path, dpi=120)


def main() -> None:
  """The whole comparison."""
  arguments = parse_arguments()
  if arguments.threads:  # the processes inherit it
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
  from googlenet_jax.host.errors import UserError

  with tempfile.TemporaryDirectory(prefix='compare_pytorch_') as folder:
    folder = pathlib.Path(folder)
    try:
      write_data(arguments, folder)
      write(arguments, compare(arguments, folder))
    except (UserError, WorkerError) as error:
      sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
