"""A process that waits on a pipe: each framework runs in one of its own, and idles while another is timed.

Thread pools and memory of two frameworks do not mix so, and they can take turns. A request and its answer
are one line of JSON each.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE_VARIABLE = 'FASHION_MNIST_DIR'
OUT_OF_MEMORY = ('out of memory', 'resource_exhausted', 'bad_alloc', "can't allocate memory", 'signal 9')


class WorkerError(Exception):
  """What a worker could not do, in one line."""

  @property
  def memory(self) -> bool:
    """Whether memory seems to have been too small."""
    return any(sign in str(self).lower() for sign in OUT_OF_MEMORY)


class Worker:
  """The parent's end: starts a script that calls `serve`."""

  def __init__(self, script: str, environment: dict[str, str]):
    """Starts `experiments/{script}`; `environment` is added to this process's own."""
    self._stderr = tempfile.TemporaryFile('w+', errors='replace')  # noqa: SIM115
    self._process = subprocess.Popen(
      [sys.executable, str(ROOT / 'experiments' / script)],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, env=os.environ | environment,
    )  # fmt: skip

  def ask(self, do: str, **arguments) -> Any:
    """Has the worker call its function `do`, waits, and returns what that returned.

    Raises:
      WorkerError: the function raised, or the process has ended.
    """
    try:
      self._process.stdin.write(json.dumps({'do': do, **arguments}) + '\n')
      self._process.stdin.flush()
      line = self._process.stdout.readline()
    except BrokenPipeError:
      line = ''
    if not line:
      raise WorkerError(self._epitaph())
    answer = json.loads(line)
    if 'error' in answer:
      raise WorkerError(answer['error'])
    return answer['result']

  def close(self) -> None:
    """Ends the process."""
    with contextlib.suppress(BrokenPipeError):  # of what a dead process has not read
      self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()
    self._stderr.close()

  def _epitaph(self) -> str:
    status = self._process.wait()
    self._stderr.seek(0)
    lines = self._stderr.read().strip().splitlines() or ['it said nothing']
    return f'ended by signal {-status}' if status < 0 else f'ended with status {status}: {lines[-1]}'


def serve(functions: dict[str, Callable[..., Any]]) -> None:
  """The worker's end: answers requests until the parent closes the pipe."""
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)  # what a library prints must not get between the answers
  for line in sys.stdin:
    request = json.loads(line)
    try:
      answer = {'result': functions[request.pop('do')](**request)}
    except Exception as error:  # the parent shows it and goes on with the next case
      traceback.print_exc()
      answer = {'error': one_line(error)}
    print(json.dumps(answer), file=answers)


def serve_cases(make_case: Callable[..., Any], **functions: Callable[..., Any]) -> None:
  """The end of a worker of experiments/benchmark.py: answers `make` and `run`, beside `functions`.

  Args:
    make_case: of the arguments of `make`; its result has `run(steps)`, which returns seconds a step, `multiply_adds` of
      a step, and `whole_epochs`.
    **functions: other requests.
  """
  case = None

  def make(**arguments):
    nonlocal case
    case = make_case(**arguments)
    return {'multiply_adds': case.multiply_adds}

  def run(steps: int):
    if not case.whole_epochs:
      case.run(1)  # not counted: the process was idle
    return case.run(steps)

  serve({'make': make, 'run': run, **functions})


def one_line(error: Exception) -> str:
  """The kind of an error and the first line that says something, at most 200 characters."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ['']
  return f'{type(error).__name__}: {lines[0]}'[:200]


def training_images() -> tuple[np.ndarray, np.ndarray]:
  """Fashion-MNIST's training images, uint8 `[60000, 28, 28, 1]`, and labels, from the original files.

  Not from TFDS: the GPU machine at hand has none, and to an epoch it makes no difference where the array came from.

  Raises:
    UserError: the environment names no folder, or the files are not there or damaged.
  """
  from googlenet_jax.data import datasets
  from googlenet_jax.host.errors import UserError

  if not os.environ.get(SOURCE_VARIABLE):
    raise UserError(f'{SOURCE_VARIABLE} has to name the folder with the four original files')
  folder = pathlib.Path(os.environ[SOURCE_VARIABLE])
  images, labels = (datasets.read_idx(folder / name) for name in datasets.IDX_FILES['train'])
  return images[..., None], labels.astype(np.int32)
