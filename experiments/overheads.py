"""What a training step costs beside the device's work: the input pipeline, and Python.

  FASHION_MNIST_DIR=DIR python experiments/overheads.py

Writes experiments/results/overheads_cpu.md or overheads_gpu.md.
"""

import argparse
import collections
import itertools
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from experiments import benchmark_jax, worker
from experiments.benchmark_tables import CPU_BATCHES, number, publish, table
from googlenet_jax import datasets, input_pipeline, monitor, optimizers, parallel
from googlenet_jax.state import create_state

WARM_UP = 20
DEVICE_WORK = 0.01  # seconds
LIMIT_MS = 1.0  # that we set ourselves


def pipeline_rate(split: datasets.Split, batch_size: int, mesh, batches: int) -> float:
  """Examples a second of the input pipeline alone: gathered, and arrived on the device."""
  source = input_pipeline.train_batches(split, batch_size, 0, 0, mesh)
  for batch in itertools.islice(source, WARM_UP):
    jax.block_until_ready(batch)
  begin = time.perf_counter()
  for batch in itertools.islice(source, batches):
    jax.block_until_ready(batch)
  return batches * batch_size / (time.perf_counter() - begin)


def empty_step(mesh, state, batch):
  """A step that takes and gives what `train.make_train_step`'s does, and computes nothing."""

  def step(state, batch):
    loss = jax.lax.psum(batch['label'][0].astype(jnp.float32), parallel.AXIS)
    return state.replace(step=state.step + 1), loss

  sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(parallel.AXIS)), out_specs=P())
  return jax.jit(sharded, donate_argnums=0).lower(state, batch).compile()


def host_milliseconds(split: datasets.Split, batch_size: int, mesh, steps: int) -> tuple[int, dict[str, float]]:
  """The host's work in one turn of the loop of train.py, part by part, medians over `steps`.

  The step computes nothing, so that all that passes is overhead; a sleep, not counted, takes the place of the device's
  work, in which the input pipeline gathers ahead. Batch normalisation is on: the state has the most leaves so.
  """
  config = benchmark_jax.recipe(32, batch_size)
  config.model.norm = 'batch'
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 100))
  _, state = create_state(config, 10, 1, tx, mesh)
  batches = input_pipeline.train_batches(split, batch_size, 0, 0, mesh)
  batch = next(batches)
  train_step = empty_step(mesh, state, batch)
  progress = monitor.Progress(0, steps, steps)
  pending, ahead = collections.deque(), parallel.steps_ahead()
  parts = collections.defaultdict(list)
  for _ in range(WARM_UP + steps):
    marks = [time.perf_counter()]
    state, loss = train_step(state, batch)
    marks.append(time.perf_counter())
    progress.step()
    pending.append(loss)
    if len(pending) > ahead:
      pending.popleft().block_until_ready()
    marks.append(time.perf_counter())
    time.sleep(DEVICE_WORK)
    begin = time.perf_counter()
    batch = next(batches)
    marks.append(marks[-1] + time.perf_counter() - begin)
    for part, begin, end in zip(('step called', 'waited, counted', 'next batch'), marks, marks[1:], strict=False):
      parts[part].append(end - begin)
    parts['in all'].append(marks[-1] - marks[0])
  progress.close()
  return len(jax.tree.leaves(state)), {part: 1e3 * statistics.median(s[WARM_UP:]) for part, s in parts.items()}


def main() -> None:
  """Prints and writes both tables."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--train_steps', type=int, default=5, help='of the real step, after 6')
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'experiments' / 'results')
  options = parser.parse_args()
  parallel.keep_freed_memory()  # as main.py does
  split = datasets.Split(*worker.training_images())
  mesh = parallel.make_mesh()
  device = jax.devices()[0]
  rates, host = [], []
  for size, batch_size in CPU_BATCHES.items():
    pipeline = pipeline_rate(split, batch_size, mesh, options.steps)
    step_seconds = benchmark_jax.Case('training', size, batch_size, 'float32').run(options.train_steps)
    step = batch_size / step_seconds
    rates.append([str(size), str(batch_size), number(pipeline), number(step), number(pipeline / step)])
    leaves, parts = host_milliseconds(split, batch_size, mesh, options.steps)
    host.append([str(batch_size), *(f'{value:.2f}' for value in parts.values())])
    host[-1] += [f'{parts["in all"] / (1e3 * step_seconds):.2%}']
    print(f'{size} px: pipeline {pipeline:.0f}, step {step:.0f} examples/s; host {parts["in all"]:.2f} ms', flush=True)
  text = '\n'.join(
    [
      f'Measured by `python experiments/overheads.py`: jax {jax.__version__}, {device.device_kind}, '
      f'{os.cpu_count()} CPU cores, float32.\n',
      'The input pipeline alone (Fashion-MNIST, 28x28 uint8, on the device), beside the training step:\n',
      table(['pixels', 'batch', 'pipeline, examples/s', 'step, examples/s', 'pipeline / step'], rates),
      f'Milliseconds of a turn of the training loop around a step that computes nothing, with a state of {leaves} '
      f'arrays; medians of {options.steps} turns. The limit is {LIMIT_MS:g} ms:\n',
      table(['batch', *parts, 'of the real step'], host),
    ]
  )
  publish(text, options.output / f'overheads_{jax.default_backend()}.md')


if __name__ == '__main__':
  main()
