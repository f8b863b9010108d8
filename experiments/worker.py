"""Starts the programs of an experiment: one process for each framework, and main.py.

Two frameworks in one process would share its threads and its memory. So each has a process of its own, which waits on
a pipe while another one works. A request and its answer are one line of JSON each.
"""

import contextlib
import itertools
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE_VARIABLE = 'FASHION_MNIST_DIR'
TINY = 'EXPERIMENTS_TINY'  # set where both sides take a small network
OUT_OF_MEMORY = ('out of memory', 'resource_exhausted', 'bad_alloc', "can't allocate memory", 'signal 9')
EVALUATION_BATCH = 256
PATIENCE = 10.0  # seconds that a process may take to end by itself
LOG_BYTES = 4000  # kept from what a process printed


class WorkerError(Exception):
  """A worker failed; the message is one line."""

  @property
  def memory(self) -> bool:
    """Whether the cause seems to be too little memory."""
    return any(sign in str(self).lower() for sign in OUT_OF_MEMORY)


class Worker(contextlib.AbstractContextManager):
  """The parent's end of the pipe."""

  def __init__(self, module: str, *arguments: str, environment: dict[str, str] | None = None):
    """Starts `python -m MODULE ARGUMENTS`, a module that calls `serve`.

    Args:
      module: such as 'experiments.jax_side'; it is found from any working directory.
      *arguments: command line of the module.
      environment: added to the environment of this process.
    """
    variables = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} | os.environ | (environment or {})  # workers share the GPU
    variables['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), variables.get('PYTHONPATH')]))
    self._stderr = tempfile.TemporaryFile('w+', errors='replace')  # noqa: SIM115
    self._process = subprocess.Popen(
      [sys.executable, '-m', module, *arguments],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, env=variables,
      process_group=0,  # with its compilers, so all can be ended together
    )  # fmt: skip

  def ask(self, do: str, seconds: float | None = None, **arguments) -> Any:
    """Calls the method `do` in the worker, waits, and returns its result.

    Args:
      do: name of the method.
      seconds: limit for the answer, after which the process is killed; None for no limit.
      **arguments: what the method takes.

    Raises:
      WorkerError: the method raised, the process has ended, or the answer took too long.
    """
    try:
      self._process.stdin.write(json.dumps({'do': do, **arguments}) + '\n')
      self._process.stdin.flush()
      if not select.select([self._process.stdout], [], [], seconds)[0]:
        self._kill()
        raise WorkerError(f'{do} took longer than {seconds:.0f} s')
      line = self._process.stdout.readline()
    except BrokenPipeError:
      line = ''
    if not line:
      raise WorkerError(self._last_words())
    answer = json.loads(line)
    if 'error' in answer:
      raise WorkerError(answer['error'])
    return answer['result']

  def __exit__(self, *_) -> None:
    self.close(0 if sys.exception() else PATIENCE)

  def close(self, patience: float = PATIENCE) -> None:
    """Ends the process; kills it if that takes longer than `patience`, in seconds."""
    with contextlib.suppress(BrokenPipeError):  # the process may be dead
      self._process.stdin.close()
    try:
      self._process.wait(patience)
    except subprocess.TimeoutExpired:
      self._kill()
    self._process.stdout.close()
    self._stderr.close()

  def log(self) -> str:
    """The end of what the process has printed."""
    file = self._stderr.fileno()
    size = os.fstat(file).st_size
    return os.pread(file, LOG_BYTES, max(0, size - LOG_BYTES)).decode(errors='replace')  # the process writes on

  def _kill(self) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()

  def _last_words(self) -> str:
    status = self._process.wait()
    lines = self.log().strip().splitlines() or ['it printed nothing']
    return f'ended by signal {-status}' if status < 0 else f'ended with status {status}: {lines[-1]}'


def serve(side: Any) -> None:
  """The worker's end of the pipe: calls methods of `side` until the parent closes the pipe."""
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)  # keeps what libraries print apart from the answers
  for line in sys.stdin:
    request = json.loads(line)
    try:
      answer = {'result': getattr(side, request.pop('do'))(**request)}
    except Exception as error:  # the parent reports it and goes on
      traceback.print_exc()
      answer = {'error': one_line(error)}
    print(json.dumps(answer), file=answers)


def one_line(error: Exception) -> str:
  """The type of an error and the first line of its message, at most 200 characters."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ['']
  return f'{type(error).__name__}: {lines[0]}'[:200]


class Side:
  """One framework: the base of `JaxSide` and `TorchSide`.

  The subclass builds the network and its steps. What is timed, trained on and evaluated is written here, once for both
  frameworks, so a figure means the same on both sides. The subclass defines `step`, `loss_of`, `predict`, `put`,
  `wait`, `multiply` and `device_memory`, and sets `image_size` and `batches` (endless, on the device).
  """

  steps_a_call = 1  # steps that `step` takes

  def run(self, steps: int, before: int = 1) -> float:
    """Takes about `before + steps` steps; returns the seconds of one of the last ones, with all work on the device.

    Both numbers are rounded up to whole calls of `step`.
    """
    calls = -(-steps // self.steps_a_call)
    for batch in itertools.islice(self.batches, -(-before // self.steps_a_call)):  # after idling the first is slower
      self.step(batch)
    self.wait()
    begin = time.perf_counter()
    for batch in itertools.islice(self.batches, calls):
      self.step(batch)
    self.wait()
    return (time.perf_counter() - begin) / (calls * self.steps_a_call)

  def train(self, folder: str, first: int, steps: int) -> list[float]:
    """Trains on the batches `first` to `first + steps` of `order.npy` in `folder`; returns the losses."""
    order = np.load(pathlib.Path(folder, 'order.npy'), mmap_mode='r')[first : first + steps]
    results = [self.step(self.put(*self.examples(folder, 'train', indices))) for indices in order]
    self.wait()
    return [self.loss_of(result) for result in results]

  def evaluate(self, folder: str) -> list[int]:
    """Predicts the class of every image in `test_images.npy`."""
    count = len(np.load(pathlib.Path(folder, 'test_labels.npy')))
    predictions = []
    for first in range(0, count, EVALUATION_BATCH):
      indices = np.arange(first, first + EVALUATION_BATCH)
      indices[indices >= count] = 0  # fills the last batch
      predictions += self.predict(self.put(*self.examples(folder, 'test', indices))).tolist()
    return predictions[:count]

  def examples(self, folder: str, split: str, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images of `compare_pytorch.py`, uint8 `[B, image_size, image_size, 1]`, and labels `[B]`."""
    files = [pathlib.Path(folder, f'{split}_{kind}.npy') for kind in ('images', 'labels')]
    images, labels = (np.load(file, mmap_mode='r') for file in files)
    return enlarged(images[indices], self.image_size), labels[indices]

  def product(self, size: int, dtype: str, repeats: int) -> float:
    """Median FLOP/s of the product of two `size x size` matrices."""
    multiply = self.multiply(size, dtype)
    seconds = []
    for _ in range(repeats + 1):
      begin = time.perf_counter()
      multiply()
      seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / float(np.median(seconds[1:]))  # the first one compiles

  def memory(self) -> tuple[int | None, int | None]:
    """Peak bytes of this process (None where there is no /proc), and on the GPU."""
    status = pathlib.Path('/proc/self/status')  # ru_maxrss may include the process that started this one
    lines = status.read_text().splitlines() if status.exists() else []
    peak = next((1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM:')), None)
    return peak, self.device_memory()


def tiny_table(table: dict[str, Sequence[int]]) -> dict[str, list[int]]:
  """Three narrow blocks of a network's table, which compile in seconds: for `TINY`."""
  return {name: [max(4, n // 16) for n in table[name]] for name in ('inception_3b', 'inception_4e', 'inception_5b')}


def enlarged(images: np.ndarray, image_size: int) -> np.ndarray:
  """Enlarges uint8 `[B, 28, 28, 1]` to `[B, image_size, image_size, 1]` by a whole factor, then pads with zeros.

  JAX and PyTorch resize differently; this is the same for both.
  """
  factor = image_size // images.shape[1]
  images = images.repeat(factor, 1).repeat(factor, 2)
  before = (image_size - images.shape[1]) // 2
  after = image_size - images.shape[1] - before
  return np.pad(images, ((0, 0), (before, after), (before, after), (0, 0)))


def fashion_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
  """Fashion-MNIST: images, uint8 `[N, 28, 28, 1]`, and labels, int32 `[N]`.

  Where FASHION_MNIST_DIR names the folder of the four original files, they are read without TFDS.

  Args:
    split: 'train' or 'test'.

  Raises:
    UserError: the files are missing or damaged, or TFDS cannot get them.
  """
  from googlenet_jax.data import datasets, preparing

  if folder := os.environ.get(SOURCE_VARIABLE):
    images, labels = (preparing.read_idx(pathlib.Path(folder, name)) for name in preparing.IDX_FILES[split])
    return images[..., None], labels.astype(np.int32)
  found = getattr(datasets.load('fashion_mnist'), split)
  return found.images, found.labels


def training_images() -> tuple[np.ndarray, np.ndarray]:
  """See `fashion_mnist`."""
  return fashion_mnist('train')


def run_main(
  arguments: Sequence[str],
  each_line: Callable[[subprocess.Popen, str], None] | None = None,
  seconds: float | None = None,
) -> int:
  """Runs `python main.py ARGUMENTS` in the root of the repository; returns its exit status.

  Ctrl-C reaches main.py directly; SIGTERM is passed on. In both cases this waits until main.py has saved and ended.

  Args:
    arguments: command line of main.py.
    each_line: called with the process and each line that it prints. By default main.py prints to the terminal.
    seconds: limit, after which main.py gets SIGTERM and saves; `2 * PATIENCE` later it is killed.
  """
  piped = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True} if each_line else {}
  before, timers = {}, []
  try:
    process = subprocess.Popen([sys.executable, 'main.py', *arguments], cwd=ROOT, **piped)
    # Handlers instead of SIG_IGN, which main.py would inherit.
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    if seconds is not None:
      timers = [threading.Timer(seconds, process.terminate), threading.Timer(seconds + 2 * PATIENCE, process.kill)]
    for timer in timers:
      timer.start()
    if each_line:
      for line in process.stdout:
        each_line(process, line)
    return process.wait()
  finally:
    for timer in timers:
      timer.cancel()
    for number, handler in before.items():
      signal.signal(number, handler)


def run_or_exit(arguments: Sequence[str]) -> None:
  """Runs main.py; if it fails, exits with its status."""
  if status := run_main(arguments):
    sys.exit(status)
