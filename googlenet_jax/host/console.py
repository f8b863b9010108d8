"""What a person sees of a run: lines, a progress bar, seconds that count up."""

import asyncio
import contextlib
import contextvars
import errno
import os
import select
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import tqdm
from absl import logging
from tqdm.std import Bar

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

BAR = 10  # least width of the bar, in characters
LIVE_SECONDS = 1.0  # between updates of a line that is rewritten in place
LATE_SECONDS = 1.0  # a line waits so long for a reader that is behind
QUIET_SECONDS = 30.0  # between lines where the output is not a terminal
_waited = 0.0  # seconds spent in `waiting` by the whole process: the time left does not include them


_warned: set[str] = set()  # texts of `warn_once`
of_process = ''  # before what processes other than the first one complain of, such as `process 1: `


def say(text: str) -> None:
  """Prints a line from the first process only. The line appears above the progress bar if there is one.

  It never raises because of the output: a closed pipe or terminal, or a full disk, must not end a run.
  """
  if _is_first_process():
    _put('stdout', text)


def _is_first_process() -> bool:
  from googlenet_jax.host import processes  # here, because a program that cannot import JAX must be able to say so

  return processes.is_first()


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


def _is_live() -> bool:
  """Whether a line can be rewritten in place: on a terminal, and while no other run writes to it."""
  # The live line goes to stderr. If stdout is a file, the file needs the plain lines.
  return all(map(is_terminal, (sys.stdout, sys.stderr))) and _is_first_process() and not prefix.get()


def is_terminal(stream: Any) -> bool:
  """Returns whether a stream is a terminal; a closed or missing one is none."""
  return stream is not None and not stream.closed and stream.isatty()


class _LiveLine(tqdm.tqdm):
  """A line at the bottom of the terminal. tqdm keeps it below the lines that `say` prints."""

  monitor_interval = 0  # tqdm's own thread is not needed

  def __init__(self, text: Callable[['_LiveLine', int], str], **options: Any):
    """Shows `text(line, width)`, which has at most `width` characters."""
    self._text = text
    super().__init__(disable=not _is_live(), dynamic_ncols=True, miniters=1, **options)

  def __str__(self) -> str:
    width = self.format_dict['ncols'] or 79
    return self._text(self, width)[:width]


def _short_duration(seconds: float) -> str:
  """Two units at most: `45s`, `12m05s`, `1h23m`, `3d04h`."""
  seconds = round(seconds)
  for unit, size, part, part_size in (('d', 86400, 'h', 3600), ('h', 3600, 'm', 60), ('m', 60, 's', 1)):
    if seconds >= size:
      return f'{seconds // size}{unit}{seconds % size // part_size:02d}{part}'
  return f'{seconds}s'


def _bar_line(width: int, share: float, parts: dict[str, str], ascii_only: bool = False) -> str:
  """Lays out the progress bar.

  Args:
    width: characters of the line.
    share: how much is done, in [0, 1].
    parts: texts by name: `epoch` comes before the bar, the others come after it in their order.
    ascii_only: the terminal shows no block characters.

  Returns:
    A line with a bar of at least BAR characters. Texts are left out where the line is too narrow for all of them.
  """
  parts = dict(parts)
  for left_out in (None, 'step', 'speed', 'left', 'accuracy', 'loss', 'epoch'):
    parts.pop(left_out, None)
    before = [parts['epoch']] if 'epoch' in parts else []
    after = [text for name, text in parts.items() if name != 'epoch']
    for comma in (',', ''):
      texts = before + ([f'{comma} '.join(after)] if after else [])
      bar = width - 2 - sum(len(text) + 1 for text in texts)
      if bar >= BAR:
        full = Bar(min(max(share, 0.0), 1.0), bar, Bar.ASCII if ascii_only else Bar.UTF)
        return ' '.join([*before, f'|{full}|', *texts[len(before) :]])
  return ''


def _decoding(record: dict[str, Any]) -> str:
  speed = record.get('decoded_per_second')
  return '' if speed is None else f' (decoding up to {speed:.0f}/s)'


class Progress:
  """A live bar on a terminal, plain lines elsewhere."""

  def __init__(self, first_step: int, last_step: int, steps_per_epoch: int):
    """Starts at `first_step` and ends at `last_step`."""
    self._first_timed, self._last_step, self._steps_per_epoch = first_step, last_step, steps_per_epoch
    self._epochs = -(-last_step // steps_per_epoch)
    self._began: float | None = None  # when the first call ended: compiling comes before it and is not counted
    self._record: dict[str, Any] = {}
    self._bar = _LiveLine(self._line, total=last_step, initial=first_step)

  def advance(self, step: int) -> None:
    """Moves the bar to a step."""
    if self._began is None:
      self._began, self._first_timed = time.perf_counter() - _waited, step
    self._bar.update(step - self._bar.n)

  def show(self, record: dict[str, Any]) -> None:
    """Shows a log point.

    Args:
      record: a line of `metrics.jsonl` with `split` 'train'.
    """
    if self._bar.disable:
      say(
        f'step {record["step"]}/{self._last_step} epoch {record["epoch"]:.2f}/{self._epochs}: '
        f'loss {record["loss"]:.3f}, acc {record["accuracy"]:.3f}, {record["examples_per_second"]:.1f} examples/s'
        f'{_decoding(record)}'
      )
    else:
      self._record = record
      self._bar.refresh()

  def close(self) -> None:
    """Leaves the bar as it is."""
    self._bar.close()

  def _line(self, bar: _LiveLine, width: int) -> str:
    step = bar.n
    parts = {'epoch': f'epoch {step / self._steps_per_epoch:.1f}/{self._epochs}', 'step': f'{step}/{self._last_step}'}
    if self._record:
      parts['loss'] = f'loss {self._record["loss"]:.3f}'
      parts['accuracy'] = f'acc {self._record["accuracy"]:.3f}'
      parts['speed'] = f'{self._record["examples_per_second"]:.0f} img/s{_decoding(self._record)}'
    timed = step - self._first_timed  # the clock starts at the end of the first call
    if timed > 0 and step < self._last_step:
      seconds = time.perf_counter() - _waited - self._began
      parts['left'] = f'{_short_duration(seconds / timed * (self._last_step - step))} left'
    return _bar_line(width, step / self._last_step, parts, bar.ascii)


class Stopwatch:
  """Counts the seconds between `start` and `stop`, over several stretches."""

  def __init__(self, seconds: float = 0.0):
    """Continues from `seconds`."""
    self.seconds, self._since = seconds, None

  def start(self) -> None:
    """Begins a stretch."""
    self._since = time.perf_counter()

  def stop(self) -> float:
    """Ends the stretch and returns its seconds."""
    stretch = time.perf_counter() - self._since
    self.seconds += stretch
    return stretch


@contextlib.contextmanager
def waiting(text: str, expectation: str = '', status: Callable[[], str] | None = None) -> Iterator[Stopwatch]:
  """Tells the user what a silent stretch of work does and for how long it has lasted.

  A terminal shows one line whose seconds count up. Elsewhere a line is printed at once, another every 30 seconds,
  and a last one with the seconds in all.

  Args:
    text: what is done, such as 'compiling the training step'.
    expectation: how long it takes, such as 'once; later about 10 s'.
    status: returns how far the work is, such as '1,200 of 3,670'.

  Yields:
    A stopwatch. After the block its `seconds` is the duration of the block.
  """
  global _waited
  watch, begin, done = Stopwatch(), time.perf_counter(), threading.Event()
  opening = f'{text} ({expectation})' if expectation else text

  def so_far() -> str:
    done = f'{status()}, ' if status else ''
    return f' ... {done}{time.perf_counter() - begin:.0f} s'

  def counting(line: _LiveLine, width: int) -> str:
    seconds = so_far()
    what = next((words for words in (opening, text) if len(words + seconds) <= width), text)
    return what[: max(width - len(seconds), 0)] + seconds

  def tick() -> None:
    while not done.wait(QUIET_SECONDS if line.disable else LIVE_SECONDS):
      if line.disable:
        say(f'{text}{so_far()}')
      else:
        line.refresh()

  line = _LiveLine(counting, leave=False)
  if line.disable:
    say(f'{opening} ...')
  # The thread prints with the prefix of this one.
  thread = threading.Thread(target=contextvars.copy_context().run, args=(tick,), daemon=True)
  outcome = 'stopped after '
  watch.start()
  try:
    thread.start()
    yield watch
    outcome = ''
  finally:
    _waited += watch.stop()
    done.set()
    if thread.is_alive():
      thread.join()
    line.close()
    say(f'{text}: {outcome}{watch.seconds:.0f} s')
