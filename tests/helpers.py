"""What several test files use: a small network and recipe, and the records of a run."""

import json

import jax

from configs import default
from googlenet_jax.model import googlenet


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
