"""How many JAX devices a CPU becomes. The choice is made before JAX looks for devices."""

import contextlib
import os
from typing import Any

import jax

from googlenet_jax.host import processes


def cpu_devices(cores: int, batch_size: int, image_size: int, model: Any) -> int:
  """Returns how many devices to make of a CPU: one or two.

  On 2 cores, two devices trained d2l's network faster, or as fast, with batches of 256 images of 32 pixels, 64 of 96,
  and 16 of 224 (experiments/results/README.md). With batch normalisation they did not: the devices wait for each other
  at every layer. Other cases are unmeasured and use one device.

  Args:
    cores: number of CPU cores.
    batch_size: images that are in memory together.
    image_size: side of an image in pixels.
    model: the `model` part of a recipe.
  """
  measured = cores == 2 and model.norm == 'none' and model.head == 'average_pool'
  large = batch_size % 2 == 0 and batch_size * image_size**2 >= 256 * 32**2
  return 2 if measured and large else 1


def cores() -> int:
  """Returns how many CPU cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def use_cpu_cores(config: Any) -> None:
  """Sets the number of CPU devices for a recipe, unless the environment has set it."""
  chosen = 'JAX_NUM_CPU_DEVICES' in os.environ or 'host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
  if not chosen:
    share = config.batch_size // config.micro_batches
    with contextlib.suppress(RuntimeError):  # a notebook's second run: JAX has started, and keeps its devices
      own = max(cores() // processes.on_this_host(), 1)
      jax.config.update('jax_num_cpu_devices', cpu_devices(own, share, config.image_size, config.model))
