"""Connects the processes of a program that runs on several hosts, or several times on one."""

import atexit
import contextlib
import ctypes
import os
import pathlib
import platform
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from googlenet_jax import __version__
from googlenet_jax.host import clusters, console, meeting, peers, processes, relay, sharding
from googlenet_jax.host.clusters import Place
from googlenet_jax.host.errors import UserError, one_line, reason

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint')  # their versions must be equal everywhere
TIMEOUT = 300.0  # seconds in which all processes must have come
HOSTS_SHOWN = 8
GREETING_SECONDS = 0.2  # by then gloo has printed its line about a connection
HEARTBEAT_SECONDS = 600  # peers.py is to notice first that a process is lost: JAX ends the others without a line
# What tells a job of a launcher from others, which may use the same port.
JOB = {'Slurm': ('SLURM_JOB_ID', 'SLURM_STEP_ID', 'SLURM_RESTART_COUNT'), 'Open MPI': ('PMIX_NAMESPACE',)}
BOUND = ('SLURM_GPUS_PER_TASK', 'SLURM_TRES_PER_TASK')  # with them Slurm gives each process its own GPUs
_peers: peers.Peers | None = None
_hosts: list[str] = []  # hosts of all processes, until they are printed
_in_jax: Place | None = None  # until `join`


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
    found = clusters.find(os.environ, coordinator)
    if coordinator is not None and found is None:
      raise UserError(
        '--coordinator needs --num_processes=N and --process_id=I too: no launcher speaks of several processes'
      )
    return found
  if count is None or index is None:
    missing = '--num_processes=N' if count is None else '--process_id=I'
    raise UserError(f'{missing} is missing: --coordinator=HOST:PORT, --num_processes=N and --process_id=I go together')
  if not 0 <= index < count:
    raise UserError(f'--process_id={index}: processes have the numbers 0 to {count - 1} (--num_processes={count})')
  if count > 1 and coordinator is None:
    raise UserError('--coordinator=HOST:PORT is missing: give the host of process 0, and a free port there')
  return Place(coordinator, count, index, 'the flags') if count > 1 else None


@contextlib.contextmanager
def together(found: Place | None, seconds: float = TIMEOUT, ends_itself: bool = False) -> Iterator[None]:
  """Inside the block the processes are connected. At its end they wait for each other. With one process: nothing.

  Args:
    found: the place of this process.
    seconds: how long to wait for the others at the beginning.
    ends_itself: whether the program tells the others, by `fail`, of an error that leaves the block.

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
  except Exception as error:
    if not ends_itself:
      _peers.tell(reason(error), 2)
      atexit.register(_exit_at_once)
    raise
  else:
    _leave(shuts_jax_down=not joined)


def _exit_at_once() -> None:
  """Ends a program that uses this one, after its process has failed: JAX would wait for the others, and abort."""
  _flush()
  os._exit(1)


def _place_in_jax() -> Place:
  """Returns the place of a process that JAX has connected."""
  with socket.socket() as free:
    free.bind(('', 0))
    port = free.getsockname()[1]
  own = f'{socket.gethostname()}:{port}'.ljust(300).encode()
  everyone = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
  return Place(everyone[0].tobytes().decode().strip(), jax.process_count(), jax.process_index(), 'jax.distributed')


def _meet(found: Place, seconds: float) -> list[dict[str, Any]]:
  """Connects the processes, and returns what each one says of itself."""
  global _peers
  processes.expect(found.index)
  console.of_process = f'process {found.index}: ' if found.index else ''
  console.say(
    f'process 0 of {found.count}, by {found.found}, waits at {found.coordinator} for the others (at most {seconds:g} s)'
  )
  versions = {'googlenet_jax': __version__, 'python': '.'.join(platform.python_version_tuple()[:2])}
  versions |= {name: metadata.version(name) for name in PACKAGES}
  job = '.'.join(os.environ.get(name, '') for name in JOB.get(found.found, ()))
  hello = {'host': socket.gethostname(), 'machine': _machine(), 'job': job, 'versions': versions, 'gpus': _gpus()}
  channels, everyone = meeting.meet(found, hello, seconds)
  _hosts[:] = [theirs['host'] for theirs in everyone]
  names = [meeting.name(number, theirs) for number, theirs in enumerate(everyone)]
  _peers = peers.Peers(found.index, names, channels, _end)
  on_host = [theirs['machine'] for theirs in everyone].count(hello['machine'])
  processes.connect(found.index, found.count, on_host, _peers.gather)
  return everyone


def _machine() -> str:
  """Returns what tells this machine from others, also where they have the same name."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError:  # not Linux
    boot = ''
  return f'{socket.gethostname()} {boot}'


def _gpus() -> list[str] | None:
  """Returns the GPUs that this process may use; None if the launcher has given each process its own."""
  if any(os.environ.get(name) for name in BOUND):
    return None
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  if visible is not None:
    return visible.split(',')
  return sorted(path.name for path in pathlib.Path('/dev').glob('nvidia[0-9]*'))


def share_of_gpus(place: int, gpus: Sequence[Sequence[str] | None]) -> list[int] | None:
  """Returns the GPUs that a process takes, as places among those that it sees; None for all of them.

  Args:
    place: number of the process among those on its machine.
    gpus: what each of these may use, see `_gpus`.
  """
  each = len(gpus[place] or ()) // len(gpus)
  if len(gpus) == 1 or not each or any(other != gpus[0] for other in gpus):  # then they are divided already
    return None
  return list(range(place * each, (place + 1) * each))


def _prepare_to_join(found: Place, everyone: list[dict[str, Any]]) -> None:
  """Settles what JAX must know before it starts."""
  global _in_jax
  own = everyone[found.index]
  here = [theirs for theirs in everyone if theirs['machine'] == own['machine']]
  share = share_of_gpus(here.index(own), [theirs['gpus'] for theirs in here])
  if share is not None:
    for kind in ('cuda', 'rocm'):
      jax.config.update(f'jax_{kind}_visible_devices', ','.join(map(str, share)))
  # gRPC reads this variable. A proxy for the internet does not know the hosts of a cluster.
  around = [os.environ.get('no_grpc_proxy'), '127.0.0.1', found.address[0]]  # noqa: SIM112
  os.environ['no_grpc_proxy'] = ','.join(filter(None, around))  # noqa: SIM112
  jax.config.update('jax_check_proxy_envs', False)  # so JAX need not warn of proxies
  jax.config.update('jax_enable_preemption_service', False)  # it would catch SIGTERM instead of signals.py
  _in_jax = found


def join() -> None:
  """Makes one machine of the devices of all processes. Until then, JAX in each process knows its own devices only.

  All processes call it, before JAX starts. JAX listens on the port at which the processes have met.

  Raises:
    UserError: JAX has started.
  """
  global _in_jax
  if _in_jax is None:
    return
  found, _in_jax = _in_jax, None
  address = f'127.0.0.1:{relay.start(*found.address)}' if found.index else found.coordinator
  try:
    jax.distributed.initialize(
      address,
      found.count,
      found.index,
      cluster_detection_method='deactivate',
      coordinator_bind_address=f'[::]:{found.address[1]}',
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
  except RuntimeError as error:
    if 'before any JAX calls' not in str(error):
      raise UserError(f'JAX cannot connect the processes: {reason(error)}') from error
    raise UserError(
      'JAX has started in this program before its processes could be connected: train before anything else is done '
      'with JAX'
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
    if jax.process_index() != processes.index():
      raise UserError(f'process {processes.index()} has the number {jax.process_index()} in JAX: give it that one')
    seen = {'number of devices': len(own), 'kind': own[0].device_kind}
    processes.agree('devices', seen, 'let each process see as many, such as by CUDA_VISIBLE_DEVICES')
    for devices in (jax.devices(), own):  # a run's, and those with which process 0 draws
      mesh = sharding.make_mesh(devices)
      one_each = jax.make_array_from_process_local_data(sharding.cut(mesh), np.ones(len(own), np.float32))
      jax.jit(jnp.sum, out_shardings=sharding.whole(mesh))(one_each).block_until_ready()
    multihost_utils.sync_global_devices('connected')  # Orbax connects one device of each process
  each = f'{len(own)} {own[0].platform} device{"s" if len(own) > 1 else ""} each'
  console.say(f'{len(names)} processes with {each}: {places}')


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
    time.sleep(GREETING_SECONDS)
  finally:
    with contextlib.suppress(OSError, AttributeError):  # not on Windows
      ctypes.CDLL(None).fflush(None)  # gloo's lines wait in a buffer of C
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
  _peers.close()
  _peers = _in_jax = None
  console.of_process = ''
  processes.connect(0, 1, 1, None)


def asked_to_stop(signal: int, ahead: int) -> int:
  """Returns the number of the signal for which all processes stop now, or 0; see `peers.Peers.asked_to_stop`."""
  return _peers.asked_to_stop(signal, ahead)


def signal_of_any(signal: int) -> int:
  """Returns the number of a signal that some process got, or 0; see `peers.Peers.signal_of_any`."""
  return signal if _peers is None else _peers.signal_of_any(signal)


def pass_on(signal: int) -> None:
  """Tells the other processes of a signal that came to this one; for handlers of signals, which must not wait."""
  if _peers is not None:
    threading.Thread(target=_peers.signal_of_any, args=(signal,), daemon=True).start()


def fail(text: str, status: int) -> None:
  """Tells the other processes that this one ends because of a trouble; see `peers.Peers.fail`."""
  _peers.fail(text, status)


def tell(text: str, status: int) -> None:
  """Tells the other processes, if there are any, why this one ends now."""
  if _peers is not None:
    _peers.tell(text, status)


def are_connected() -> bool:
  """Returns whether there are other processes, for which JAX would wait at the end."""
  return _peers is not None


def _end(text: str, status: int) -> None:
  """Ends this process because another one has ended; called in a thread."""
  console.complain(f'error: {text}')
  _flush()
  os._exit(status)


def _flush() -> None:
  for stream in filter(None, (sys.stdout, sys.stderr)):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
