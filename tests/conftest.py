"""Eight virtual CPU devices and one compilation cache for every test; flags parsed, as grain expects."""

import json
import os
import tempfile

os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',  # compiling is most of what the tests wait for
  ]
)
os.environ['JAX_PLATFORMS'] = 'cpu'
# Tests and the programs they start compile the same networks: once is enough.
CACHE = tempfile.TemporaryDirectory(prefix='googlenet_jax_tests_')
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.environ['XDG_CACHE_HOME'] = CACHE.name

import sys

import jax
import pytest
from absl import flags

if not flags.FLAGS.is_parsed():
  flags.FLAGS(sys.argv[:1])


@pytest.fixture
def mesh_of():
  """`mesh_of(n)`: a mesh over the first n devices."""
  from googlenet_jax import parallel

  return lambda n: parallel.make_mesh(jax.devices()[:n])


def take_two_devices(patch):
  """Whole runs see two devices of the eight: these take turns on the machine's cores, and two show the same."""
  devices = jax.devices()[:2]
  patch.setattr(jax, 'devices', lambda: devices)


def read_log(workdir):
  """The records of `metrics.jsonl`."""
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def small_table():
  """Three narrow blocks instead of nine: with the stem they compile in seconds."""
  from googlenet_jax import models

  widths = models.Widths(8, 8, 8, 4, 8, 4)
  return {name: widths for name in ('inception_3b', 'inception_4a', 'inception_4d')}


@pytest.fixture
def small_network(monkeypatch):
  """The network of `small_table`."""
  from googlenet_jax import models

  monkeypatch.setattr(models, 'TABLE', small_table())


def small_config(**changes):
  """A recipe that compiles in seconds' worth of a test: the digits at the least size."""
  from configs import default

  config = default.get_config()
  config.data.name = 'digits'
  config.image_size = 17
  config.batch_size = 16
  config.update_from_flattened_dict(changes)
  return config
