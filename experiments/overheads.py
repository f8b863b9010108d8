"""What a training step costs beside the device's work: the input pipeline, and Python.

  FASHION_MNIST_DIR=DIR python experiments/overheads.py

Writes experiments/results/overheads_cpu.md or overheads_gpu.md. Python's part of a step is that of a step that computes
nothing. It is measured with nothing else going on, which is what it costs beside an accelerator, and after work on the
CPU that has emptied its caches, which is what it costs where the CPU is the device.
"""

import argparse
import itertools
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from experiments import benchmark_jax, worker
from experiments.benchmark_tables import CPU_BATCHES, cores, cpu_model, number, publish, table
from googlenet_jax import datasets, input_pipeline, optimizers, parallel
from googlenet_jax.state import create_state

WARM_UP = 20
HOST_BATCH = 256
DEVICE_WORK = 0.02  # seconds; meanwhile the input pipeline gathers ahead
OTHER_WORK = 32 << 20  # bytes read and written, as much as a large last-level cache holds


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


def host_milliseconds(split: datasets.Split, mesh, norm: str, steps: int) -> tuple[int, dict[str, float]]:
  """Arrays of the state, and the host's milliseconds in each part of a turn of the training loop, medians."""
  config = benchmark_jax.recipe(32, HOST_BATCH, norm=norm)
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 100))
  _, state = create_state(config, 10, 1, tx, mesh)
  batches = input_pipeline.train_batches(split, HOST_BATCH, 0, 0, mesh)
  batch = next(batches)
  train_step = empty_step(mesh, state, batch)
  other = np.zeros(OTHER_WORK // 4, np.float32)
  parts = {'step called, nothing else': [], 'step called, after other work': [], 'next batch, after other work': []}

  def call(part):
    nonlocal state
    begin = time.perf_counter()
    state, loss = train_step(state, batch)
    parts[part].append(time.perf_counter() - begin)
    loss.block_until_ready()

  for _ in range(WARM_UP + steps):
    call('step called, nothing else')
  for _ in range(WARM_UP + steps):
    np.add(other, 1, out=other)
    call('step called, after other work')
    time.sleep(DEVICE_WORK)
    np.add(other, 1, out=other)
    begin = time.perf_counter()
    batch = next(batches)
    parts['next batch, after other work'].append(time.perf_counter() - begin)
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
  rates = []
  for size, batch_size in CPU_BATCHES.items():
    pipeline = pipeline_rate(split, batch_size, mesh, options.steps)
    step_seconds = benchmark_jax.Case('training', size, batch_size, 'float32').run(options.train_steps)
    step = batch_size / step_seconds
    rates.append([str(size), str(batch_size), number(pipeline), number(step), number(pipeline / step)])
    print(f'{size} px: pipeline {pipeline:.0f}, step {step:.0f} examples/s', flush=True)
  host = []
  for norm in ('none', 'batch'):  # the state has more arrays with batch normalisation
    arrays, parts = host_milliseconds(split, mesh, norm, options.steps)
    host.append([norm, str(arrays), *(f'{value:.2f}' for value in parts.values())])
  text = '\n'.join(
    [
      f'Measured by `python experiments/overheads.py`: jax {jax.__version__}, float32, {device.device_kind}, '
      f'{cores()} cores of {cpu_model()}.\n',
      'The input pipeline alone (Fashion-MNIST, 28x28 uint8, on the device), beside the training step:\n',
      table(['pixels', 'batch', 'pipeline, examples/s', 'step, examples/s', 'pipeline / step'], rates),
      f"The host's milliseconds in a step: a step that computes nothing, and the next batch of {HOST_BATCH}; medians "
      f'of {options.steps}:\n',
      table(['norm', 'arrays of the state', *parts], host),
    ]
  )
  publish(text, options.output / f'overheads_{jax.default_backend()}.md')


if __name__ == '__main__':
  main()
