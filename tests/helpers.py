"""What several test files use: a small network and recipe, and the records of a run."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import default
from googlenet_jax import classifier, command_line, recipe, runs
from googlenet_jax.data import datasets
from googlenet_jax.evaluation import drawing, statistics
from googlenet_jax.host import checkpoints, console, program, sharding
from googlenet_jax.model import auxiliary_classifiers, googlenet
from googlenet_jax.training import loop, summary
from googlenet_jax.training.state import TrainState, items

ROOT = pathlib.Path(__file__).parent.parent


def take_devices(patch, count):
  """Whole runs see one or two devices of the eight, which take turns on the machine's cores."""
  devices = jax.local_devices()[:count]
  patch.setattr(jax, 'devices', lambda: devices)


def read_log(workdir):
  """The records of `metrics.jsonl`."""
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def small_table():
  """Three narrow blocks instead of nine: with the stem they compile in seconds."""
  widths = googlenet.Widths(8, 8, 8, 4, 8, 4)
  return {name: widths for name in ('inception_3b', 'inception_4a', 'inception_4d')}


def least_table():
  """One narrow block, for tests that need a network, and not a deep one."""
  return {'inception_4a': small_table()['inception_4a']}


def small_config(**changes):
  """A recipe that compiles in seconds' worth of a test: the digits at the least size."""
  config = default.get_config()
  config.data.name = 'digits'
  config.image_size = 17
  config.batch_size = 16
  config.update_from_flattened_dict(changes)
  return config


def changed(**changes):
  """The values of the default recipe with others, whatever their types."""
  return recipe.from_flat({**recipe.flatten(recipe.default()), **changes})


load = datasets.load  # as it is without patches


def small_digits():
  """A quarter of the digits: 11 steps of 32 images an epoch, and 104 test images."""
  digits = load('digits')
  few = lambda split, count: datasets.Split(split.images[:count], split.labels[:count])
  return dataclasses.replace(digits, train=few(digits.train, 360), test=few(digits.test, 104))


_programs = {}
# In no program:
ARGUMENTS = (
  'seed', 'max_steps', 'log_every_steps', 'checkpoint_every_steps', 'steps_per_call', 'early_stopping',
  'data.validation_examples',
)  # fmt: skip


def share_programs(patch):
  """Runs of one recipe in this process trace and compile once. The data set is always the same."""

  def shared(name, make):
    def shared_make(*arguments):
      config, mesh = (next(a for a in arguments if isinstance(a, kind)) for kind in (ConfigDict, Mesh))
      values = {k: v for k, v in recipe.flatten(config).items() if k not in ARGUMENTS and 'ensemble.' not in k}
      numbers = [a for a in arguments if isinstance(a, int)]  # they count crops
      key = str((name, values, [device.id for device in mesh.devices.flat], numbers))
      if key not in _programs:
        _programs[key] = make(*arguments)
      return _programs[key]

    return shared_make

  for module, name in (
    (loop, 'make_train_step'),
    (loop, 'make_train_steps'),
    (statistics, 'make_statistics_step'),
    (classifier, 'make_predict_step'),
  ):
    patch.setattr(module, name, shared(name, getattr(module, name)))


def make_whole_runs_cheap(patch):
  """A small network, a quarter of the digits, one device, statistics of few images, and small pictures."""
  digits = small_digits()
  table = small_table()
  del table['inception_3b']
  patch.setattr(googlenet, 'TABLE', table)
  for name in ('CHANNELS', 'HIDDEN'):
    patch.setattr(auxiliary_classifiers, name, 8)
  patch.setattr(datasets, 'load', lambda **_: digits)
  patch.setattr(statistics, 'EXAMPLES', 128)
  draw_small(patch)
  take_devices(patch, 1)
  share_programs(patch)


def draw_small(patch):
  """Draws pictures with few pixels and without a layout: it takes long, and no run needs it."""
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  patch.setattr(drawing, 'DPI', 40)
  patch.setattr(ConstrainedLayoutEngine, 'execute', lambda *_: None)


def draw_nothing(patch):
  """Leaves out the pictures, which take longer than a small run."""
  for name in ('draw_samples', 'draw_curves', 'draw_answers'):
    patch.setattr(summary, name, lambda *_: None)


@dataclasses.dataclass
class Ended:
  status: int
  out: str
  err: str


def call_main(*arguments):
  """Runs `python main.py ARGUMENTS` in this process, which takes no seconds to start."""
  import main

  for flag in flags.FLAGS.get_flags_for_module('main'):
    flag.unparse()
  command_line.overrides.clear()
  status, out, err = 0, io.StringIO(), io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    patch.setattr(sys, 'argv', ['main.py', *map(str, arguments)])
    patch.setattr(console, 'quieten_libraries', lambda: None)
    patch.setattr(program, 'is_program', lambda: True)
    patch.setattr(app._run_init, 'done', True)  # or absl would take over the logging of the tests
    try:
      main.run()
    except SystemExit as error:
      status = error.code or 0
  return Ended(status, out.getvalue(), err.getvalue())


def start_main(*arguments, cwd=ROOT, **options):
  """Starts `python main.py ARGUMENTS`."""
  # Two devices do as well as eight, which would take turns on the machine's cores.
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=2')
  options = {'capture_output': True, 'text': True, 'timeout': 400, 'env': {**os.environ, 'XLA_FLAGS': flags}, **options}
  return subprocess.run([sys.executable, ROOT / 'main.py', *arguments], cwd=cwd, check=False, **options)


def assert_one_line(ended, *messages):
  """The program ended as it does at a user's mistake, and said so in one line of these parts."""
  assert ended.status == 2
  assert ended.err.startswith('error: ')
  assert len(ended.err.splitlines()) == 1
  for message in messages:
    assert message in ended.err
  assert 'Traceback' not in ended.out


def random_state(config, seed=0, channels=1):
  """A state whose network gives different answers to different images, though nobody trained it."""
  shape = classifier.Classifier(config, tuple('abcdefghij'), channels, [], sharding.make_mesh(jax.devices()[:1]))
  rng = np.random.default_rng(seed)

  def drawn(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name.endswith(('var', 'scale')):
      return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    if name.endswith('kernel'):
      return rng.normal(0, 1.5 / np.sqrt(np.prod(leaf.shape[:-1])), leaf.shape).astype(np.float32)
    return rng.normal(0, 0.1, leaf.shape).astype(np.float32)

  def network():
    draw = functools.partial(jax.tree_util.tree_map_with_path, drawn)
    return {'params': draw(shape.params_shape), 'batch_stats': draw(shape.batch_stats_shape)}

  return TrainState(
    step=jnp.int32(0),
    **network(),
    opt_state={'trace': np.zeros(1, np.float32)},
    averaged=network() if config.average_decay else {},
    seed=jnp.int32(seed),
  )


def write_validation(workdir, accuracies):
  """Writes the records of validations, by step, into `metrics.jsonl`."""
  numbers = {name: 0.0 for name, kind in runs.RECORD.items() if kind is float}
  records = [{**numbers, 'step': s, 'split': 'validation', 'accuracy': a} for s, a in accuracies.items()]
  (workdir / runs.METRICS).write_text(''.join(json.dumps(record) + '\n' for record in records))


def write_run(workdir, config, *saves):
  """Writes a run as training does, with a checkpoint for each `(step, state, accuracy, fresh)`."""
  workdir.mkdir(parents=True, exist_ok=True)
  runs.write(workdir, runs.Run(config, tuple('abcdefghij'), (8, 8, 1)))
  accuracies = {step: accuracy for step, _, accuracy, _ in saves if accuracy is not None}
  saved = checkpoints.Checkpoints(workdir, accuracies)
  for step, state, _, fresh in saves:
    saved.save(step, items(state.replace(step=jnp.int32(step))), {}, fresh)
    saved.wait()
  saved.close()
  write_validation(workdir, accuracies)
  return workdir
