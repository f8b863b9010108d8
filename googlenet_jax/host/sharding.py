"""The mesh: one axis, `data`, over every device; parameters on all of them, batches cut along it."""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from googlenet_jax.host import cache
from googlenet_jax.host.errors import UserError

AXIS = 'data'


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh with the one axis `data` over `devices`, all there are by default."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def cpu_devices(cores: int, batch_size: int, image_size: int, model: Any) -> int:
  """How many devices to make of a CPU: one, or two.

  Two were faster, or as fast, in training on 2 cores, with the article's network and batches of 256 images of 32
  pixels, 64 of 96 and 16 of 224 (experiments/results/cpu_devices*.md). With batch normalisation they were not: they
  wait for each other at each layer. Nothing else was measured, so that there is one device for anything smaller
  or else.
  """
  measured = cores == 2 and model.norm == 'none' and model.head == 'average_pool'
  large = batch_size % 2 == 0 and batch_size * image_size**2 >= 256 * 32**2
  return 2 if measured and large else 1


def use_cpu_cores(config) -> None:
  """Makes `cpu_devices` for a recipe, unless the user has said how many; to be called before JAX looks for devices."""
  told = 'JAX_NUM_CPU_DEVICES' in os.environ or 'host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
  if not told:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    share = config.batch_size // config.micro_batches
    jax.config.update('jax_num_cpu_devices', cpu_devices(cores, share, config.image_size, config.model))


def check_divides(batch_size: int, mesh: Mesh, micro_batches: int = 1) -> None:
  """Raises UserError if the global batch does not divide into equal shares."""
  parts = mesh.size * micro_batches
  if batch_size % parts:
    times = f' times {micro_batches} micro-batches' if micro_batches > 1 else ''
    raise UserError(
      f'batch_size={batch_size} does not divide by {mesh.size} devices{times}: '
      f'take {max(parts, batch_size // parts * parts)}'
    )


def replicate(tree, mesh: Mesh):
  """Puts a tree of arrays, the same in every process, whole on every device."""
  return jax.device_put(tree, NamedSharding(mesh, P()))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Makes global arrays of each process's share of a batch; returns before the transfer has ended."""
  sharding = NamedSharding(mesh, P(AXIS))
  return {name: jax.make_array_from_process_local_data(sharding, a) for name, a in batch.items()}


def device_name(mesh: Mesh) -> str:
  """As PyTorch writes them: `cpu:0`, `cuda:0`, or `8 x cuda` for several."""
  device = mesh.devices.flat[0]
  kind = 'cuda' if device.platform == 'gpu' and 'cuda' in str(device).lower() else device.platform
  return f'{kind}:{device.id}' if mesh.size == 1 else f'{mesh.size} x {kind}'


def use_compilation_cache() -> None:
  """Keeps compiled programs between runs, unless the user has named a folder (JAX_COMPILATION_CACHE_DIR)."""
  if jax.config.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', str(cache.folder()))


def steps_ahead() -> int:
  """How many steps the host may start before the device has ended the one at work.

  Two hide the host's work from a GPU or TPU. On a CPU there is nothing to hide it behind, and a step under way holds
  its working memory.
  """
  return 0 if jax.default_backend() == 'cpu' else 2
