"""How the training step scales over devices: what is exchanged, when, how fast it could be, and what must be read.

  python -m experiments.scaling                     # all stages
  python -m experiments.scaling --stage=bytes       # one of them

Stages:

- `bytes`: bytes exchanged in a step, counted in the programs that XLA compiles for 1 to 64 devices
- `overlap`: which exchanges run beside the backward pass, seen in the programs for eight GPUs and eight TPU chips
- `measure`: speed of virtual devices and of processes on this machine, in turns
- `reading`: images per second that the input pipeline delivers on this machine
- `model`: efficiency on 8 to 1024 GPUs from what the other stages found, and docs/pictures/scaling.png

No accelerator is needed. The first two stages compile for GPUs and TPUs if JAX's plugins are there, and leave them out
if not. They belong into a folder of their own, because programs that run would try to use them:

  pip install --target=plugins --no-deps jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 libtpu==0.0.52
  PYTHONPATH=plugins python -m experiments.scaling

Results go to experiments/results/scaling/. On 2 cores all stages take about three quarters of an hour.
"""

import argparse
import concurrent.futures
import os
import pathlib
import socket
import statistics
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from experiments import scaling_model, scaling_programs, tables, worker
from experiments.scaling_programs import BATCH_NORM, D2L
from experiments.tables import number, table
from googlenet_jax.data import folder, pipeline
from googlenet_jax.data.splits import Split
from googlenet_jax.host import sharding
from googlenet_jax.training import optimizers
from googlenet_jax.training.state import create_state
from googlenet_jax.training.step import make_train_step

TURNS, STEPS = 7, 3


class Place(NamedTuple):
  """Processes on this machine that train together."""

  name: str
  processes: int
  devices: int  # in each process
  batch_size: int  # images of all together
  one_core: bool = False  # each process may use one core only


STRONG = (
  Place('1 process, 1 device', 1, 1, 128),
  Place('1 process, 2 devices', 1, 2, 128),
  Place('2 processes, 1 device each', 2, 1, 128),
)
WEAK = (
  Place('1 process on one core, 64 images', 1, 1, 64, one_core=True),
  Place('2 processes on one core each, 128 images', 2, 1, 128, one_core=True),
)


# Speed on this machine -----------------------------------------------------------------------------------------------


class Trainer:
  """One process of a group: takes training steps. It answers to `Group`."""

  def connect(self, network: str, place: list[Any], index: int, port: int) -> None:
    """Joins the other processes, and compiles the step."""
    place = Place(*place)
    if place.one_core and hasattr(os, 'sched_setaffinity'):
      cores = sorted(os.sched_getaffinity(0))
      os.sched_setaffinity(0, {cores[index % len(cores)]})
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', place.devices)
    if place.processes > 1:
      jax.distributed.initialize(f'localhost:{port}', place.processes, index)
    config, mesh = (D2L | BATCH_NORM)[network].recipe(place.batch_size, 'float32'), sharding.make_mesh()
    tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, scaling_programs.STEPS_PER_EPOCH))
    graphdef, self.state = create_state(config, num_classes=10, channels=1, tx=tx, mesh=mesh)
    share = place.batch_size // place.processes
    side = config.image_size - 2 * config.augment.padding
    rng = np.random.default_rng(index)
    batch = {
      'image': rng.integers(0, 256, (share, side, side, 1), np.uint8),
      'label': rng.integers(0, 10, share).astype(np.int32),
      'index': np.arange(share, dtype=np.int32),
    }
    self.batch = sharding.shard_batch(batch, mesh)
    self.compiled = make_train_step(graphdef, tx, config, mesh, scaling_programs.STEPS_PER_EPOCH)
    self.take(2)

  def take(self, steps: int) -> float:
    """Takes steps; returns the seconds of one."""
    begin = time.monotonic()
    for _ in range(steps):
      self.state, metrics = self.compiled(self.state, self.batch)
      jax.block_until_ready(metrics)
    return (time.monotonic() - begin) / steps


class Group:
  """The processes of a place. They wait while another group is timed."""

  def __init__(self, network: str, place: Place):
    """Starts them, and compiles."""
    self._workers = [worker.Worker('experiments.scaling', '--serve') for _ in range(place.processes)]
    self._pool = concurrent.futures.ThreadPoolExecutor(place.processes)
    with socket.create_server(('localhost', 0)) as free:
      port = free.getsockname()[1]
    self._ask('connect', [{'index': i} for i in range(place.processes)], network=network, place=list(place), port=port)

  def _ask(self, do: str, own: list[dict[str, Any]], **arguments) -> list[Any]:
    asked = [
      self._pool.submit(w.ask, do, None, **mine, **arguments) for w, mine in zip(self._workers, own, strict=True)
    ]
    return [each.result() for each in asked]

  def take(self, steps: int) -> float:
    """Lets all take steps together; returns the seconds of one."""
    return max(self._ask('take', [{}] * len(self._workers), steps=steps))

  def close(self) -> None:
    """Ends the processes; those of JAX end together."""
    list(self._pool.map(lambda each: each.close(), self._workers))
    self._pool.shutdown()


def stage_measure(output: pathlib.Path) -> None:
  """Times devices and processes of this machine in turns; writes measure.md."""
  parts = ['# Devices and processes on one machine\n', tables.written_by('jax', 'jaxlib') + '\n', machine()]
  parts.append(
    f'Medians of {TURNS} turns of {STEPS} steps, with quartiles. A ratio compares blocks of the same turn.\n'
  )
  for network in D2L | BATCH_NORM:
    for title, places in (('the same batch of 128 images, both cores', STRONG), ('64 images a core', WEAK)):
      lines = measured(network, places)
      head = ['', 'ms a step', 'images/s', f'speed, relative to "{places[0].name}"']
      parts += [f'## {network}: {title}\n', table(head, lines)]
  tables.publish('\n'.join(parts), output / 'measure.md')


def measured(network: str, places: tuple[Place, ...]) -> list[list[str]]:
  """Times places in turns; a line for each."""
  groups = [Group(network, place) for place in places]
  try:
    turns = [[group.take(STEPS) for group in groups] for _ in range(TURNS)]
  finally:
    for group in groups:
      group.close()
  speeds = [[place.batch_size / seconds for place, seconds in zip(places, turn, strict=True)] for turn in turns]
  lines = []
  for i, place in enumerate(places):
    ratios = np.quantile([turn[i] / turn[0] for turn in speeds], tables.QUARTILES)
    speed = statistics.median(turn[i] for turn in speeds)
    ratio = f'{ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})' if i else '1'
    lines.append([place.name, number(1e3 * place.batch_size / speed), number(speed), ratio])
  return lines


def machine() -> str:
  """Names the processor."""
  return f'{tables.cores()} cores of {tables.cpu_model()}.\n'


# Reading -------------------------------------------------------------------------------------------------------------


class Reading(NamedTuple):
  """A training set, and what reads it."""

  name: str
  split: Split
  batches: int  # to read
  job: scaling_model.Job  # whose speed is needed


def stage_reading(output: pathlib.Path) -> None:
  """Measures what the input pipeline delivers, and how many cores eight GPUs need; writes reading.md."""
  lines = []
  with tempfile.TemporaryDirectory() as root:
    write_photographs(pathlib.Path(root))
    for case in readings(root):
      needed = 8 * case.job.images / case.job.seconds
      wall, processor = delivered(case.split, case.job.images, case.batches)
      lines.append([case.name, number(wall), number(processor), number(needed), number(needed / processor)])
  head = ['training images', 'images/s', 'images/s of one core', 'eight H200 need, images/s', 'cores needed']
  note = """Batches of 256 from `pipeline.train_batches`, put on a CPU device. Needed is eight times the speed of one
H200 (gpu/speed.md): d2l's network at 224 pixels, and `configs/fashion_best.py` for images of 28 pixels.
"""
  parts = ['# Reading\n', tables.written_by('jax', 'grain', 'pillow') + '\n', machine(), note, table(head, lines)]
  tables.publish('\n'.join(parts), output / 'reading.md')


def readings(root: str) -> list[Reading]:
  """Images in memory, and JPEG files below `root`, each with the job of its size."""
  large, small = scaling_model.JOBS
  rng = np.random.default_rng(0)
  noise = lambda *shape: Split(rng.integers(0, 256, shape, np.uint8), np.zeros(shape[0], np.int32))
  found = [
    Reading('28 x 28, grey, in memory', noise(60_000, 28, 28, 1), 1000, small),
    Reading('224 x 224, colour, in memory', noise(4_000, 224, 224, 3), 40, large),
  ]
  for canvas in (256, 512):
    files = folder.load(root, canvas=canvas, memory_mb=0, validation_share=0.0, test_share=0.2).train
    found.append(Reading(f'JPEG, 500 x 375, colour, canvas={canvas}', files, 12, large))
  return found


def write_photographs(root: pathlib.Path, count: int = 400) -> None:
  """Writes JPEGs of a size that is usual in ImageNet, cut from the two photographs in scikit-learn."""
  from sklearn.datasets import load_sample_images

  rng, photographs = np.random.default_rng(0), load_sample_images().images
  for i in range(count):
    photograph = photographs[i % 2]
    top, left = rng.integers(photograph.shape[0] - 375), rng.integers(photograph.shape[1] - 500)
    path = root / f'class_{i % 2}' / f'{i}.jpg'
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(photograph[top : top + 375, left : left + 500]).save(path, quality=90)


def delivered(split: Split, batch_size: int, batches: int) -> tuple[float, float]:
  """Returns images per second, and images for a second of processor time."""
  source = pipeline.train_batches(split, batch_size, 0, 0, sharding.make_mesh(jax.devices()[:1]))
  jax.block_until_ready(next(source))
  clocks = time.monotonic, time.process_time
  begin = [clock() for clock in clocks]
  for _ in range(batches):
    jax.block_until_ready(next(source))
  wall, processor = (batches * batch_size / (clock() - at) for clock, at in zip(clocks, begin, strict=True))
  source.close()  # ends its threads
  return wall, processor


# Command line --------------------------------------------------------------------------------------------------------

STAGES = {
  'bytes': scaling_programs.stage_bytes,
  'overlap': scaling_programs.stage_overlap,
  'measure': stage_measure,
  'reading': stage_reading,
  'model': scaling_model.stage_model,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--stage', choices=STAGES, help='default: all')
  parser.add_argument('--output', type=pathlib.Path, default=tables.RESULTS / 'scaling', help='folder of the results')
  parser.add_argument('--serve', action='store_true', help=argparse.SUPPRESS)  # a process of `Group`
  return parser.parse_args(arguments)


def main() -> None:
  """Runs the stages."""
  options = parse()
  if options.serve:
    worker.serve(Trainer())
    return
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', max(scaling_programs.DEVICES))
  options.output.mkdir(parents=True, exist_ok=True)
  for name in [options.stage] if options.stage else STAGES:
    STAGES[name](options.output)


if __name__ == '__main__':
  main()
