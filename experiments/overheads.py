"""What a training step costs beside the device's work: the input pipeline, and Python.

  FASHION_MNIST_DIR=DIR python experiments/overheads.py

Writes experiments/results/overheads_cpu.md or overheads_gpu.md. Python's part of a step is that of a step that computes
nothing. It is measured with nothing else going on, which is what it costs beside an accelerator, and after work on the
CPU that has emptied its caches, which is what it costs where the CPU is the device.
"""

import argparse
import contextlib
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
from experiments.benchmark_tables import CPU_BATCHES, command, cores, cpu_model, number, publish, table
from googlenet_jax.data import datasets, pipeline
from googlenet_jax.host import huge_pages, sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.training import optimizers
from googlenet_jax.training.state import create_state

WARM_UP = 20
HOST_BATCH = 256
ENVIRONMENT = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}  # room on a GPU beside this process
LIMIT = 1  # millisecond of Python in a step
DEVICE_WORK = 0.02  # seconds; meanwhile the input pipeline gathers ahead
OTHER_WORK = 32 << 20  # bytes read and written, as much as a large last-level cache holds


def pipeline_rate(split: datasets.Split, batch_size: int, mesh, batches: int) -> float:
  """Examples a second of the input pipeline alone: gathered, and arrived on the device."""
  source = pipeline.train_batches(split, batch_size, 0, 0, mesh)
  for batch in itertools.islice(source, WARM_UP):
    jax.block_until_ready(batch)
  begin = time.perf_counter()
  for batch in itertools.islice(source, batches):
    jax.block_until_ready(batch)
  return batches * batch_size / (time.perf_counter() - begin)


def empty_step(mesh, state, batch):
  """A step that takes and gives what `train.make_train_step`'s does, and computes nothing."""

  def step(state, batch):
    loss = jax.lax.psum(batch['label'][0].astype(jnp.float32), sharding.AXIS)
    return state.replace(step=state.step + 1), loss

  sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(sharding.AXIS)), out_specs=P())
  return jax.jit(sharded, donate_argnums=0).lower(state, batch).compile()


def host_milliseconds(split: datasets.Split, mesh, norm: str, steps: int) -> tuple[int, list[float]]:
  """Arrays of the state, and three medians in ms: the step called, that after other work, the next batch after it."""
  config = benchmark_jax.recipe(32, HOST_BATCH, norm=norm)
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 100))
  _, state = create_state(config, 10, 1, tx, mesh)
  batches = pipeline.train_batches(split, HOST_BATCH, 0, 0, mesh)
  batch = next(batches)
  train_step = empty_step(mesh, state, batch)
  other = np.zeros(OTHER_WORK // 4, np.float32)
  idle, called, fetched = [], [], []

  def call(seconds):
    nonlocal state
    begin = time.perf_counter()
    state, loss = train_step(state, batch)
    seconds.append(time.perf_counter() - begin)
    loss.block_until_ready()

  for _ in range(WARM_UP + steps):
    call(idle)
  for _ in range(WARM_UP + steps):
    np.add(other, 1, out=other)
    call(called)
    time.sleep(DEVICE_WORK)
    np.add(other, 1, out=other)
    begin = time.perf_counter()
    batch = next(batches)
    fetched.append(time.perf_counter() - begin)
  return len(jax.tree.leaves(state)), [1e3 * statistics.median(s[WARM_UP:]) for s in (idle, called, fetched)]


def pipeline_lines(split: datasets.Split, batches: int, train_steps: int) -> tuple[list[list[str]], float]:
  """The table of pipeline and step, and the milliseconds of the shortest step."""
  lines, shortest = [], float('inf')
  mesh = sharding.make_mesh(jax.devices()[:1])
  for size, batch_size in CPU_BATCHES.items():
    pipeline = pipeline_rate(split, batch_size, mesh, batches)
    with contextlib.closing(
      worker.Worker('benchmark_jax.py', ENVIRONMENT)
    ) as process:  # on the devices that main.py would make
      process.ask('make', mode='training', image_size=size, batch_size=batch_size, dtype='float32')
      seconds = process.ask('run', steps=train_steps)
    step, shortest = batch_size / seconds, min(shortest, 1e3 * seconds)
    lines.append([str(size), str(batch_size), number(pipeline), number(step), number(pipeline / step)])
    print(f'{size} px: pipeline {pipeline:.0f}, step {step:.0f} examples/s', flush=True)
  return lines, shortest


def main() -> None:
  """Prints and writes both tables."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--train_steps', type=int, default=5, help='of the real step, after 6')
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'experiments' / 'results')
  options = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', 2)  # of a CPU; of other devices there are as many as there are
  try:
    split = datasets.Split(*worker.training_images())
  except (UserError, OSError) as error:
    sys.exit(f'error: {error}')
  rates, shortest = pipeline_lines(split, options.steps, options.train_steps)
  host = []
  # The state has more arrays with batch normalisation; every device has its own.
  cases = [
    (norm, devices) for norm, devices in (('none', 1), ('none', 2), ('batch', 1)) if devices <= len(jax.devices())
  ]
  for norm, devices in cases:
    mesh = sharding.make_mesh(jax.devices()[:devices])
    arrays, (idle, called, fetched) = host_milliseconds(split, mesh, norm, options.steps)
    total = called + fetched
    cells = [*(f'{value:.2f}' for value in (idle, called, fetched, total)), f'{total / shortest:.2%}']
    host.append(
      [norm, str(devices), str(arrays), *cells, 'yes' if idle < LIMIT else 'no', 'yes' if total < LIMIT else 'no']
    )
  head = ['norm', 'devices', 'arrays of the state', 'step called, nothing else', 'step called', 'next batch', 'sum']
  head += ['of the shortest step above', f'first below {LIMIT} ms', f'sum below {LIMIT} ms']
  text = '\n'.join(
    [
      f'Measured by `{command()}`: jax {jax.__version__}, float32, {jax.devices()[0].device_kind}, '
      f'{cores()} cores of {cpu_model()}.\n',
      'The input pipeline alone (Fashion-MNIST, 28x28 uint8, on one device), beside the training step:\n',
      table(['pixels', 'batch', 'pipeline, examples/s', 'step, examples/s', 'pipeline / step'], rates),
      "The host's milliseconds in a step: calling one that computes nothing, with nothing else going on; and after",
      f'other work on the CPU has emptied its caches, calling it and taking the next batch of {HOST_BATCH}. Medians of '
      f'{options.steps}:\n',
      table(head, host),
    ]
  )
  publish(text, options.output / f'overheads_{jax.default_backend()}.md')


if __name__ == '__main__':
  huge_pages.restart()  # as main.py
  main()
