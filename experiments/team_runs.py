"""Starts narrowed runs of several processes on this machine; see `experiments/many_processes.py`."""

import functools
import os
import pathlib
import socket
from collections.abc import Sequence

from experiments.narrow_runs import Ended, Runs


class Team:
  """Processes that work on one run together, each as `python main.py` on a host of its own would."""

  def __init__(
    self,
    runs: Runs,
    workdir: pathlib.Path,
    cache: pathlib.Path,
    processes: int,
    devices: int,
    flags: Sequence[str] = (),
  ):
    """Starts them.

    Args:
      runs: starts a process.
      workdir: the folder that they share.
      cache: the folder of their caches.
      processes: how many there are; one is started without the flags of several.
      devices: devices of each.
      flags: more arguments of main.py.
    """
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    prepare = functools.partial(take_devices, devices)
    self.runs = []
    for index in range(processes):
      place = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}', f'--process_id={index}']
      own = [*flags, *(place if processes > 1 else [])]
      self.runs.append(runs.start(workdir, cache, prepare=prepare, flags=own))

  def end(self) -> list[Ended]:
    """Waits for the end of all."""
    return [run.end() for run in self.runs]


def take_devices(count: int) -> None:
  """Gives a new process so many devices on its CPU."""
  import jax

  os.environ['JAX_NUM_CPU_DEVICES'] = str(count)
  jax.config.update('jax_num_cpu_devices', count)
