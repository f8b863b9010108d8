"""The mesh: one axis, `data`, over every device. Each device holds all parameters and a share of every batch."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from googlenet_jax.host import processes
from googlenet_jax.host.errors import UserError

AXIS = 'data'


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """Makes a mesh with the one axis `data` over `devices`; by default over all that work on this run.

  The devices of a process are side by side, in the order of the processes, because each makes one piece of a batch.
  `jax.make_mesh` orders TPUs by their places in the network instead.
  """
  devices = jax.devices() if devices is None else devices
  devices = sorted(devices, key=lambda device: (device.process_index, device.id))
  return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def check_divides(batch_size: int, mesh: Mesh, micro_batches: int = 1) -> None:
  """Raises UserError if the global batch does not divide into equal shares."""
  parts = mesh.size * micro_batches
  if batch_size % parts:
    times = f' times {micro_batches} micro-batches' if micro_batches > 1 else ''
    raise UserError(
      f'batch_size={batch_size} does not divide by {mesh.size} devices{times}: '
      f'take {max(parts, batch_size // parts * parts)}'
    )


def whole(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def cut(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch whose first axis is cut over the devices."""
  return NamedSharding(mesh, P(AXIS))


def cut_steps(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of the batches of several steps, `[steps, B, ..]`: each batch is cut over the devices."""
  return NamedSharding(mesh, P(None, AXIS))


def replicate(tree, mesh: Mesh):
  """Puts a tree of arrays, the same in every process, whole on every device."""
  if processes.count() > 1:  # from arrays of one device JAX 0.10.2 makes wrong ones, where each process has one device
    tree = jax.tree.map(np.asarray, tree)
  return jax.device_put(tree, whole(mesh))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Makes global arrays from each process's share of a batch; returns before the transfer has ended."""
  return {name: jax.make_array_from_process_local_data(cut(mesh), a) for name, a in batch.items()}


def steps_ahead() -> int:
  """Returns how many calls of a step the host may start before the device has finished the current one.

  With two calls a GPU or TPU stays busy while the host works. A CPU gains nothing from it, and each started call holds
  its working memory.
  """
  return 0 if jax.default_backend() == 'cpu' else 2
