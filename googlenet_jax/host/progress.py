"""What a person sees of work that goes on: a progress bar, and seconds that count up.

On a terminal and in a notebook a line is rewritten in place. Elsewhere a new line is printed now and then.
"""

import contextlib
import contextvars
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import tqdm
from tqdm.std import Bar

from googlenet_jax.host import console, processes

BAR = 10  # least width of the bar, in characters
NOTEBOOK_WIDTH = 79  # characters of a line in a notebook
NOTEBOOK_SECONDS = 0.5  # least time between two updates of a line in a notebook
LIVE_SECONDS = 1.0  # between updates of the seconds in a line that is rewritten in place
QUIET_SECONDS = 30.0  # between lines where nothing can be rewritten
_waited = 0.0  # seconds spent in `waiting` by the whole process: the time left does not include them


class _TerminalLine(tqdm.tqdm):
  """A line at the bottom of the terminal. tqdm keeps it below the lines that `console.say` prints."""

  monitor_interval = 0  # tqdm's own thread is not needed

  def __init__(self, text: Callable[[Any, int], str], initial: int = 0):
    """Shows `text(line, width)`, which has at most `width` characters."""
    self._text = text
    super().__init__(initial=initial, dynamic_ncols=True, miniters=1)

  def __str__(self) -> str:
    width = self.format_dict['ncols'] or 79
    return self._text(self, width)[:width]

  def replace(self, text: str) -> None:
    """Prints `text` in place of the line."""
    self.leave = False
    self.close()
    console.say(text)


class _NotebookLine:
  """A line below a cell of a notebook, which keeps only its last text. It needs no widgets."""

  ascii = False

  def __init__(self, text: Callable[[Any, int], str], initial: int = 0):
    """Shows `text(line, width)`."""
    from IPython.display import display  # a notebook has it

    self._text, self.n, self._shown = text, initial, time.monotonic()
    self._handle = display({'text/plain': text(self, NOTEBOOK_WIDTH)}, raw=True, display_id=True)

  def update(self, count: int) -> None:
    """Counts on; the text follows a few times in a second at most."""
    self.n += count
    if time.monotonic() - self._shown >= NOTEBOOK_SECONDS:
      self.refresh()

  def refresh(self) -> None:
    """Shows the text of now."""
    self.replace(self._text(self, NOTEBOOK_WIDTH))

  def replace(self, text: str) -> None:
    """Shows `text`."""
    self._shown = time.monotonic()
    self._handle.update({'text/plain': text}, raw=True)

  def close(self) -> None:
    """Shows the text of now for the last time."""
    self.refresh()


def _live_line(text: Callable[[Any, int], str], initial: int = 0) -> _TerminalLine | _NotebookLine | None:
  """Returns a line that is rewritten in place, or None where none can be, or other runs print at the same time."""
  if not processes.is_first() or console.prefix.get():
    return None
  if type(sys.stdout).__module__.startswith('ipykernel.'):  # not while a user redirects it
    return _NotebookLine(text, initial)
  # The line goes to stderr. If stdout is a file, the file needs the plain lines.
  if all(map(console.is_terminal, (sys.stdout, sys.stderr))):
    return _TerminalLine(text, initial)
  return None


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
  """A live bar, or plain lines where none can be shown."""

  def __init__(self, first_step: int, last_step: int, steps_per_epoch: int):
    """Starts at `first_step` and ends at `last_step`."""
    self._first_timed, self._last_step, self._steps_per_epoch = first_step, last_step, steps_per_epoch
    self._epochs = -(-last_step // steps_per_epoch)
    self._began: float | None = None  # when the first call ended: compiling comes before it and is not counted
    self._record: dict[str, Any] = {}
    self._bar = _live_line(self._line, first_step)

  def advance(self, step: int) -> None:
    """Moves the bar to a step."""
    if self._began is None:
      self._began, self._first_timed = time.perf_counter() - _waited, step
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def show(self, record: dict[str, Any]) -> None:
    """Shows a log point.

    Args:
      record: a line of `metrics.jsonl` with `split` 'train'.
    """
    if self._bar is not None:
      self._record = record
      self._bar.refresh()
      return
    console.say(
      f'step {record["step"]}/{self._last_step} epoch {record["epoch"]:.2f}/{self._epochs}: '
      f'loss {record["loss"]:.3f}, acc {record["accuracy"]:.3f}, {record["examples_per_second"]:.1f} examples/s'
      f'{_decoding(record)}'
    )

  def close(self) -> None:
    """Leaves the bar as it is."""
    if self._bar is not None:
      self._bar.close()

  def _line(self, bar: _TerminalLine | _NotebookLine, width: int) -> str:
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

  A terminal or a notebook shows one line whose seconds count up. Elsewhere a line is printed at once, another every 30
  seconds, and a last one with the seconds in all.

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

  def counting(_: Any, width: int) -> str:
    seconds = so_far()
    what = next((words for words in (opening, text) if len(words + seconds) <= width), text)
    return what[: max(width - len(seconds), 0)] + seconds

  def tick() -> None:
    while not done.wait(QUIET_SECONDS if line is None else LIVE_SECONDS):
      if line is None:
        console.say(f'{text}{so_far()}')
      else:
        line.refresh()

  line = _live_line(counting)
  if line is None:
    console.say(f'{opening} ...')
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
    ending = f'{text}: {outcome}{watch.seconds:.0f} s'
    if line is None:
      console.say(ending)
    else:
      line.replace(ending)
