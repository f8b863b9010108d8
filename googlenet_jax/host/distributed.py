"""Connects the processes of a program that runs on several hosts, or several times on one."""

import contextlib
import os
import platform
import re
import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from googlenet_jax import __version__
from googlenet_jax.host import clusters, console, meeting, peers, processes, sharding
from googlenet_jax.host.clusters import Place
from googlenet_jax.host.errors import UserError, one_line, reason

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')  # of the same version everywhere
TIMEOUT = 300.0  # seconds in which all processes must have come
HOSTS_SHOWN = 8
LOST = 75  # exit status after another process was killed: EX_TEMPFAIL of sysexits.h, so a scheduler may try again
_peers: peers.Peers | None = None
_hosts: list[str] = []  # of all processes, until they are printed
_in_jax: tuple[str, int, int] | None = None  # arguments for JAX, until `join`


def place(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> Place | None:
  """Returns the place of this process, from flags or from the launcher; None if it works alone.

  Args:
    coordinator: `HOST:PORT`, where process 0 listens. Without the other two it is for a launcher that does not say it.
    count: number of processes.
    index: number of this process, from 0.

  Raises:
    UserError: a flag is malformed or missing; or as `clusters.find`.
  """
  port = re.fullmatch(r'(?:[^\s:/]+|\[[0-9A-Fa-f:.%]+\]):(\d{1,5})', coordinator or ':')
  if coordinator is not None and not (port and 0 < int(port[1]) < 2**16):
    raise UserError(f'--coordinator={one_line(coordinator)}: give host and port of process 0, such as node1:1234')
  if count is None and index is None:
    return clusters.find(os.environ, coordinator)
  if count is None or index is None:
    missing = '--num_processes=N' if count is None else '--process_id=I'
    raise UserError(f'{missing} is missing: --coordinator=HOST:PORT, --num_processes=N and --process_id=I go together')
  if not 0 <= index < count:
    raise UserError(f'--process_id={index}: processes have the numbers 0 to {count - 1} (--num_processes={count})')
  if count > 1 and coordinator is None:
    raise UserError('--coordinator=HOST:PORT is missing: give the host of process 0, and a free port there')
  return Place(coordinator, count, index, 'the flags') if count > 1 else None


@contextlib.contextmanager
def together(found: Place | None, seconds: float = TIMEOUT) -> Iterator[None]:
  """Inside the block the processes are connected. At its end they wait for each other. With one process: nothing.

  Args:
    found: the place of this process.
    seconds: how long to wait for the others at the beginning.

  Raises:
    UserError: the processes do not come together, see `meeting.meet`.
  """
  joined = jax.distributed.is_initialized() and jax.process_count() > 1  # by a program that uses this one
  if _peers is not None or (found is None and not joined):
    if hint := clusters.forgotten(os.environ):
      console.complain(f'note: {hint}')
    yield
    return
  everyone = _meet(_place_in_jax() if joined else found, seconds)
  if not joined:
    _prepare_to_join(found, everyone)
  try:
    yield
  except SystemExit:  # after a signal, in all processes
    _leave(shuts_jax_down=not joined)
    raise
  else:
    _leave(shuts_jax_down=not joined)


def _place_in_jax() -> Place:
  """Returns the place of a process that JAX has connected."""
  own = f'{socket.gethostname()}:{_free_port()}'.ljust(300).encode()
  everyone = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
  return Place(everyone[0].tobytes().decode().strip(), jax.process_count(), jax.process_index(), 'jax.distributed')


def _meet(found: Place, seconds: float) -> list[dict[str, Any]]:
  """Connects the processes, and returns what each one says of itself."""
  global _peers
  processes.expect(found.index)
  console.of_process = f'process {found.index}: ' if found.index else ''
  console.say(f'{found.found}: process 0 of {found.count} waits at {found.coordinator} for the others')
  versions = {'googlenet_jax': __version__, 'python': '.'.join(platform.python_version_tuple()[:2])}
  versions |= {name: metadata.version(name) for name in PACKAGES}
  hello = {'host': socket.gethostname(), 'versions': versions, 'visible': os.environ.get('CUDA_VISIBLE_DEVICES')}
  if found.index == 0:
    hello['port'] = _free_port()  # for JAX
  channels, everyone = meeting.meet(found, hello, seconds)
  _hosts[:] = [theirs['host'] for theirs in everyone]
  names = [meeting.name(number, theirs) for number, theirs in enumerate(everyone)]
  _peers = peers.Peers(found.index, names, channels, _end)
  processes.connect(found.index, found.count, _hosts.count(hello['host']), _peers.gather)
  return everyone


def _free_port() -> int:
  with socket.socket() as free:
    free.bind(('', 0))
    return free.getsockname()[1]


def _prepare_to_join(found: Place, everyone: list[dict[str, Any]]) -> None:
  """Settles what JAX must know before it starts."""
  global _in_jax
  own = everyone[found.index]
  here = [theirs for theirs in everyone if theirs['host'] == own['host']]
  # Each process on a host takes one GPU, unless the launcher has given each its own.
  if len(here) > 1 and (own['visible'] is None or len(own['visible'].split(',')) >= len(here)):
    for kind in ('cuda', 'rocm'):
      jax.config.update(f'jax_{kind}_visible_devices', str(here.index(own)))
  # gRPC reads this variable. A proxy for the internet does not know the hosts of a cluster.
  host = found.coordinator.rpartition(':')[0]
  around = [os.environ.get('no_grpc_proxy'), host.strip('[]')]  # noqa: SIM112
  os.environ['no_grpc_proxy'] = ','.join(filter(None, around))  # noqa: SIM112
  jax.config.update('jax_enable_preemption_service', False)  # it would catch SIGTERM instead of signals.py
  _in_jax = (f'{host}:{everyone[0]["port"]}', found.count, found.index)


def join() -> None:
  """Makes one machine of the devices of all processes. Until then, JAX in each process knows its own devices only.

  All processes call it, before JAX starts.

  Raises:
    UserError: JAX has started.
  """
  global _in_jax
  if _in_jax is None:
    return
  arguments, _in_jax = _in_jax, None
  try:
    jax.distributed.initialize(*arguments, cluster_detection_method='deactivate')
  except RuntimeError as error:
    raise UserError(
      f'JAX has started in this program before its processes could be connected ({reason(error)}): train before '
      'anything else is done with JAX'
    ) from error


def introduce() -> None:
  """Says which processes there are, once, after JAX has found the devices.

  Raises:
    UserError: processes have different numbers or kinds of devices.
  """
  if not _hosts or processes.count() == 1:
    return
  names, own = list(_hosts), jax.local_devices()
  _hosts.clear()
  hosts = list(dict.fromkeys(names))
  shown = [f'{host} has {_ranges([n for n, other in enumerate(names) if other == host])}' for host in hosts]
  more = f'; and {len(hosts) - HOSTS_SHOWN} hosts more' if len(hosts) > HOSTS_SHOWN else ''
  places = f'{"; ".join(map(one_line, shown[:HOSTS_SHOWN]))}{more}'
  if not jax.distributed.is_initialized():
    console.say(f'{len(names)} processes: {places}')
    return
  with _without_greetings():
    processes.agree('devices', {'their number': len(own), 'their kind': own[0].device_kind})
    mesh = sharding.make_mesh()
    one_each = jax.make_array_from_process_local_data(sharding.cut(mesh), np.ones(len(own), np.float32))
    jax.jit(jnp.sum, out_shardings=sharding.whole(mesh))(one_each).block_until_ready()
    multihost_utils.sync_global_devices('connected')  # Orbax connects one device of each process
  devices = f'{len(own)} {own[0].platform} device{"s" if len(own) > 1 else ""} each'
  console.say(f'{len(names)} processes with {devices}: {places}')


@contextlib.contextmanager
def _without_greetings() -> Iterator[None]:
  """Keeps from the screen what gloo, which connects CPUs, prints for each device at its first use."""
  if jax.default_backend() != 'cpu':
    yield
    return
  sys.stdout.flush()
  before = os.dup(1)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nowhere, 1)
    yield
  finally:
    os.dup2(before, 1)
    os.close(before)
    os.close(nowhere)


def _ranges(numbers: list[int]) -> str:
  if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
    return f'{numbers[0]} to {numbers[-1]}'
  return ' and '.join(map(str, numbers)) if len(numbers) == 2 else ', '.join(map(str, numbers))


def _leave(shuts_jax_down: bool) -> None:
  global _peers, _in_jax
  _peers.leave()
  if shuts_jax_down and jax.distributed.is_initialized():
    jax.distributed.shutdown()
  _peers = _in_jax = None
  processes.connect(0, 1, 1, None)


def asked_to_stop(signal: int, ahead: int) -> int:
  """Returns the number of the signal for which all processes stop now, or 0; see `peers.Peers.asked_to_stop`."""
  return _peers.asked_to_stop(signal, ahead)


def signal_of_any(signal: int) -> int:
  """Returns the number of a signal that some process got, or 0; see `peers.Peers.signal_of_any`."""
  return signal if _peers is None else _peers.signal_of_any(signal)


def fail(text: str) -> bool:
  """Tells the other processes that this one ends, and returns whether this one must say it; see `peers.Peers.fail`."""
  return _peers is None or _peers.fail(text)


def tell(text: str) -> None:
  """Tells the other processes, if there are any, why this one ends now."""
  if _peers is not None:
    _peers.tell(text)


def are_connected() -> bool:
  """Returns whether there are other processes, for which JAX would wait at the end."""
  return _peers is not None


def _end(text: str, was_killed: bool) -> None:
  """Ends this process because another one has ended; called in a thread."""
  console.complain(f'error: {text}')
  for stream in filter(None, (sys.stdout, sys.stderr)):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(LOST if was_killed else 2)
