"""What several test files use: a small network and recipe, and the records of a run."""

import dataclasses
import json

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import default
from googlenet_jax import classifier, recipe
from googlenet_jax.data import datasets
from googlenet_jax.evaluation import statistics
from googlenet_jax.model import googlenet
from googlenet_jax.training import loop


def take_two_devices(patch):
  """Whole runs see two devices of the eight: these take turns on the machine's cores, and two show the same."""
  devices = jax.devices()[:2]
  patch.setattr(jax, 'devices', lambda: devices)


def read_log(workdir):
  """The records of `metrics.jsonl`."""
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def small_table():
  """Three narrow blocks instead of nine: with the stem they compile in seconds."""
  widths = googlenet.Widths(8, 8, 8, 4, 8, 4)
  return {name: widths for name in ('inception_3b', 'inception_4a', 'inception_4d')}


def small_config(**changes):
  """A recipe that compiles in seconds' worth of a test: the digits at the least size."""
  config = default.get_config()
  config.data.name = 'digits'
  config.image_size = 17
  config.batch_size = 16
  config.update_from_flattened_dict(changes)
  return config


load = datasets.load  # as it is without patches


def small_digits():
  """Half of the digits: 11 steps of 64 images an epoch, and 104 test images."""
  digits = load('digits')
  few = lambda split, count: datasets.Split(split.images[:count], split.labels[:count])
  return dataclasses.replace(digits, train=few(digits.train, 720), test=few(digits.test, 104))


_programs = {}
ARGUMENTS = ('seed', 'max_steps', 'log_every_steps', 'checkpoint_every_steps')  # keys that are in no program


def share_programs(patch):
  """Runs of one recipe in this process trace and compile once. The data set is always the same."""

  def shared(name, make):
    def shared_make(*arguments):
      config, mesh = (next(a for a in arguments if isinstance(a, kind)) for kind in (ConfigDict, Mesh))
      values = {k: v for k, v in recipe.flatten(config).items() if k not in ARGUMENTS and 'ensemble.' not in k}
      numbers = [a for a in arguments if isinstance(a, int)]  # of crops
      key = str((name, values, [device.id for device in mesh.devices.flat], numbers))
      if key not in _programs:
        _programs[key] = make(*arguments)
      return _programs[key]

    return shared_make

  for module, name in (
    (loop, 'make_train_step'),
    (statistics, 'make_statistics_step'),
    (classifier, 'make_predict_step'),
  ):
    patch.setattr(module, name, shared(name, getattr(module, name)))


def make_whole_runs_cheap(patch):
  """A small network, half of the digits, two devices, and statistics of few images."""
  digits = small_digits()
  patch.setattr(googlenet, 'TABLE', small_table())
  patch.setattr(datasets, 'load', lambda **_: digits)
  patch.setattr(statistics, 'EXAMPLES', 256)
  take_two_devices(patch)
  share_programs(patch)
