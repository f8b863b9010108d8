"""Contenders in one case, timed in turns. Each has a process of its own, which is idle while another one is timed."""

import concurrent.futures
import math
import threading
import time
from typing import Any, NamedTuple

from experiments import tables
from experiments.tables import OURS, Case
from experiments.worker import Worker, WorkerError

JAX, TORCH = 'experiments.jax_side', 'experiments.torch_side'
PRODUCT = {'cpu': 2048, 'gpu': 8192}  # side of the matrices
MAX_STEPS = 500  # in a block
WARM_UP = 4  # steps
GRACE = 20.0  # seconds that a block may take beyond the limit


class Contender(NamedTuple):
  """A module to start, its environment, and extra arguments for `make`."""

  module: str
  environment: dict[str, str] = {}
  arguments: dict[str, Any] = {}


class Settings(NamedTuple):
  """How to time."""

  config: str  # recipe of ours
  repeats: int  # blocks for each contender
  block_seconds: float
  seconds: float = math.inf  # limit for everything; who is not ready in time is left out
  together: bool = False  # compile all at the same time
  product: int | None = None  # side of the matrices; None for the platform's


def describe(device: str) -> dict[str, Any]:
  """Returns the machine: platform, device, versions, and the forms of our layers.

  Raises:
    WorkerError: there is no such device.
  """
  with Worker(JAX, device) as worker:
    found = worker.ask('describe')
  if device != found['platform']:
    raise WorkerError(f'JAX finds only {found["platform"]}')
  return found | ({'device': tables.cpu_model()} if found['platform'] == 'cpu' else {})


class Contest:
  """The contenders in one case, with all their processes alive; `errors` and `logs` say who failed, and why."""

  def __init__(self, case: Case, entries: dict[str, Contender], machine: dict[str, Any], settings: Settings):
    """Starts, compiles and warms up."""
    self.errors: dict[str, WorkerError] = {}
    self.logs: dict[str, str] = {}
    self.made: dict[str, dict[str, Any]] = {}
    self.workers: dict[str, Worker] = {}
    self._tuned = threading.Event()  # XLA has chosen kernels by timing them, so others may use the device
    if OURS not in entries:
      self._tuned.set()
    timing = min(1.5 * settings.repeats * settings.block_seconds * len(entries), settings.seconds / 2)
    self._end = time.monotonic() + settings.seconds - timing
    with concurrent.futures.ThreadPoolExecutor(len(entries) if settings.together else 1) as pool:
      try:
        list(pool.map(lambda name: self._prepare(name, case, entries[name], machine, settings), entries))
      except BaseException:
        self._end = 0  # the threads give up
        self._tuned.set()
        self.close(patience=0)
        raise
    self._end += timing + GRACE
    self.workers = {name: self.workers[name] for name in entries if name in self.workers}  # in the order given

  def _prepare(self, name, case, entry, machine, settings) -> None:
    begin = time.perf_counter()
    self.workers[name] = Worker(entry.module, machine['platform'], environment=entry.environment)
    arguments = case._asdict() | entry.arguments | ({'config': settings.config} if entry.module == JAX else {})
    made = self.ask(name, 'make', **arguments)
    if name == OURS:
      self._tuned.set()
    elif settings.together and 'compile_mode' not in arguments:  # what compiles reaches the device late
      self._tuned.wait()
    if self.ask(name, 'run', steps=1, before=0) is not None:
      self.made[name] = made | {'start': time.perf_counter() - begin}
      machine['versions'] |= self.ask(name, 'describe')['versions']
      self.ask(name, 'run', steps=WARM_UP)

  def ask(self, name: str, do: str, **arguments) -> Any:
    """Asks a worker; returns None where it fails or has failed."""
    left = None if math.isinf(self._end) else max(0.1, self._end - time.monotonic())
    worker = self.workers.get(name)
    try:
      return worker and worker.ask(do, seconds=left, **arguments)
    except WorkerError as error:
      self.errors[name], self.logs[name] = error, worker.log()
      self.workers.pop(name).close()

  def run(self, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Returns the seconds of a step for each contender and turn; a block takes about `seconds`.

    There are `repeats` turns, or fewer when the time is up.
    """
    blocks = {name: [] for name in self.workers}
    trials = {name: self.ask(name, 'run', steps=2) or seconds for name in blocks}
    lengths = {name: max(1, min(MAX_STEPS, round(seconds / trial))) for name, trial in trials.items()}
    for turn in range(repeats):
      if turn and time.monotonic() > self._end - GRACE:
        break
      for name in list(blocks)[:: 1 if turn % 2 == 0 else -1]:
        blocks[name].append(self.ask(name, 'run', steps=lengths[name]))
    return {name: found for name, found in blocks.items() if name in self.workers}

  def close(self, **arguments) -> None:
    """Ends all processes, see `Worker.close`."""
    for worker in self.workers.values():
      worker.close(**arguments)


def contest(case: Case, entries: dict[str, Contender], machine: dict[str, Any], settings: Settings) -> dict[str, Any]:
  """Times some contenders in one case.

  Returns:
    By contender: `seconds` of a step in each turn; `made`, with what the contender runs on and its start in seconds;
    `memory`, peak bytes of the process and on the GPU; `products`, FLOP/s of a large matrix product; `errors` and
    `logs`. For all: `multiply_adds` of a step.
  """
  running = Contest(case, entries, machine, settings)
  size, products = settings.product or PRODUCT[machine['platform']], {}

  def measure_products():
    for name in (OURS, 'eager'):
      if product := running.ask(name, 'product', size=size, dtype=case.dtype, repeats=9):
        products.setdefault(name, []).append(product)

  try:
    memory = {}
    measure_products()
    seconds = running.run(settings.repeats, settings.block_seconds)
    memory = {name: running.ask(name, 'memory') or (None, None) for name in list(running.workers)}
    measure_products()
  finally:
    running.close()
  return {
    'seconds': seconds,
    'made': running.made,
    'memory': memory,
    'products': products,
    'errors': running.errors,
    'logs': running.logs,
    'multiply_adds': next((made['multiply_adds'] for made in running.made.values() if made['multiply_adds']), None),
  }
