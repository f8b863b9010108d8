import os
import subprocess
import sys

import pytest
from helpers import small_config

from googlenet_jax.host import cpu_cores


@pytest.mark.parametrize(
  ('cores', 'batch_size', 'image_size', 'changes', 'devices'),
  [
    (2, 16, 224, {}, 2),
    (2, 64, 96, {}, 2),
    (2, 256, 32, {}, 2),
    (2, 17, 224, {}, 1),  # no even shares
    (2, 254, 32, {}, 1),  # smaller than anything measured
    (2, 256, 224, {'model.norm': 'batch'}, 1),
    (2, 256, 224, {'model.head': 'fully_connected'}, 1),
    (6, 256, 224, {}, 1),
    (1, 256, 224, {}, 1),
  ],
)
def test_how_many_devices_a_cpu_becomes(cores, batch_size, image_size, changes, devices):
  assert cpu_cores.cpu_devices(cores, batch_size, image_size, small_config(**changes).model) == devices


@pytest.mark.parametrize(
  ('given', 'expected'),
  [({}, 2), ({'JAX_NUM_CPU_DEVICES': '3'}, 3), ({'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}, 4)],
)
def test_the_environment_may_say_how_many_devices(given, expected):
  code = """
import os
os.sched_getaffinity = lambda _: {0, 1}
from configs import default
from googlenet_jax.host import cpu_cores
config = default.get_config()
cpu_cores.use_cpu_cores(config)
import jax
print(jax.device_count())
config.model.norm = 'batch'  # would have one device
cpu_cores.use_cpu_cores(config)
print(jax.device_count())
"""
  environment = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_NUM_CPU_DEVICES')} | given
  done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True)
  assert done.stdout.split() == [str(expected)] * 2
