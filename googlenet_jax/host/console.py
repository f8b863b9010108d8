"""Lines and warnings for a person. `progress.py` has what is rewritten in place."""

import asyncio
import contextlib
import contextvars
import errno
import os
import select
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import tqdm
from absl import logging

from googlenet_jax.host import processes
from googlenet_jax.host.errors import UserError, reason

if TYPE_CHECKING:
  from jax.sharding import Mesh


def quieten_libraries() -> None:
  """Keeps long library reports about one failure off the screen. The last line of the run reports the failure.

  Library warnings do not help users. What XLA, Orbax and TensorStore log as errors, they also raise. XLA reads its
  setting when JAX is imported.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  logging.set_verbosity(logging.FATAL)
  warnings.filterwarnings('ignore', message='coroutine .* was never awaited')

  def unraisable(args) -> None:
    # After the first failure TensorStore's threads report to an event loop of Orbax that is closed.
    closed = isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == 'Event loop is closed'
    # Orbax reads arrays side by side in coroutines: the first failure is raised, the others come here.
    of_orbax = 'orbax' in getattr(getattr(args.object, 'cr_code', None), 'co_filename', '')
    of_loop = args.object is asyncio.BaseEventLoop.__del__  # one that could not open its files
    interrupt = isinstance(args.exc_value, KeyboardInterrupt)  # signals.py ends the program nevertheless
    if not (closed or of_orbax or of_loop or interrupt):
      sys.__unraisablehook__(args)

  sys.unraisablehook = unraisable


# Text before every line of a thread. It is set where several runs work at the same time.
prefix: contextvars.ContextVar[str] = contextvars.ContextVar('prefix', default='')

LATE_SECONDS = 1.0  # a line waits so long for a reader that is behind
_warned: set[str] = set()  # texts of `warn_once`
of_process = ''  # before what processes other than the first one complain of, such as `process 1: `


def say(text: str) -> None:
  """Prints a line from the first process only. The line appears above the progress bar if there is one.

  It never raises because of the output: a closed pipe or terminal, or a full disk, must not end a run.
  """
  if processes.is_first():
    _put('stdout', text)


def complain(text: str) -> None:
  """Prints a line on standard error, from any process. It never raises, and does not start JAX."""
  _put('stderr', f'{of_process}{text}')


def warn_once(text: str) -> None:
  """Prints `warning: TEXT` on standard error, once in this process for each text."""
  if text not in _warned:
    _warned.add(text)
    complain(f'warning: {text}')


@contextlib.contextmanager
def side_output(what: str) -> Iterator[None]:
  """Keeps the work going if a picture, an event file or a report cannot be made: then it only warns, once.

  A UserError goes through. It has another cause, such as damaged pictures.

  Args:
    what: what is written inside the block, such as 'curves.png'.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:  # drawing libraries raise any kind
    warn_once(f'{what} was not written: {reason(error)}; the work goes on')


def _put(name: str, text: str) -> None:
  """Prints lines on `sys.stdout` or `sys.stderr`. Letters that it cannot show become escapes such as `\\u65e5`.

  After a passing trouble, such as a full disk, only the line is lost. Nothing more is tried if nobody can read.
  """
  stream = getattr(sys, name)  # None if the program was started with it closed
  encoding = getattr(stream, 'encoding', None) or 'utf-8'
  with tqdm.tqdm.get_lock():  # other threads come before or after these lines
    for line in text.split('\n'):
      line = f'{prefix.get()}{line}\n'.encode(encoding, 'backslashreplace').decode(encoding)
      try:
        if stream is None:
          raise ValueError('it was closed at the start')
        _write(stream, line)
      except (OSError, ValueError) as error:  # ValueError: closed
        code = getattr(error, 'errno', None) or errno.EPIPE
        if stream is not None and stream in (sys.__stdout__, sys.__stderr__):
          _to_nowhere(stream, for_ever=code in (errno.EPIPE, errno.EBADF, errno.EIO))
        if name == 'stdout' and code != errno.EAGAIN:
          gone = code in (errno.EPIPE, errno.EBADF)
          trouble = 'nobody reads the output any more' if gone else 'the output cannot be written'
          warn_once(f'{trouble} ({reason(error)}); the work goes on')


def _write(stream: Any, line: str) -> None:
  """Writes a line. Waits a while for a reader that is behind, where the system does not wait itself."""
  try:
    tqdm.tqdm.write(line, file=stream, end='')
    stream.flush()
  except BlockingIOError:
    with contextlib.suppress(OSError, ValueError):  # not all streams can be waited for
      select.select([], [stream], [], LATE_SECONDS)
    stream.flush()  # the stream has kept the line


def flush() -> None:
  """Writes what standard output has kept. A reader that has gone, as `head` does, is no trouble."""
  try:
    sys.stdout.flush()
  except BrokenPipeError:
    _to_nowhere(sys.stdout, for_ever=True)


def _to_nowhere(stream: Any, for_ever: bool) -> None:
  """Lets vanish what a stream has kept, and all its further output if `for_ever`.

  Otherwise Python would write what is kept again with the next line and at exit, and fail again.
  """
  with contextlib.suppress(OSError, ValueError):  # closed by this program: then nothing is kept either
    place = stream.fileno()
    with contextlib.ExitStack() as stack:
      nowhere = os.open(os.devnull, os.O_WRONLY)
      stack.callback(os.close, nowhere)
      if not for_ever:
        before = os.dup(place)
        stack.callback(os.close, before)
        stack.callback(os.dup2, before, place)
      os.dup2(nowhere, place)
      stream.flush()


def device_name(mesh: 'Mesh') -> str:
  """Names the devices as PyTorch does: `cpu:0`, `cuda:0`, or `8 x cuda` for several."""
  device = mesh.devices.flat[0]
  kind = 'cuda' if device.platform == 'gpu' and 'cuda' in str(device).lower() else device.platform
  return f'{kind}:{device.id}' if mesh.size == 1 else f'{mesh.size} x {kind}'


def is_terminal(stream: Any) -> bool:
  """Returns whether a stream is a terminal; a closed or missing one is none."""
  return stream is not None and not stream.closed and stream.isatty()
