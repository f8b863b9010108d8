"""Eight virtual CPU devices for every test; flags parsed, as grain expects."""

import os

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ['JAX_PLATFORMS'] = 'cpu'

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


def small_config(**changes):
  """A recipe that compiles in seconds' worth of a test: the digits at the least size."""
  from configs import default

  config = default.get_config()
  config.data.name = 'digits'
  config.image_size = 17
  config.batch_size = 16
  config.update_from_flattened_dict(changes)
  return config
