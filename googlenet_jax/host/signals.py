"""Signals that ask a program to end: Ctrl-C, SIGTERM, a closed terminal (SIGHUP), Slurm's warning (SIGUSR1).

While a training has steps that are not saved, the first signal is a request, which the loop answers by saving.
Everywhere else a signal raises KeyboardInterrupt in the main thread. That may take a minute, because Python waits for a
call of XLA that compiles. And it may get lost: Python drops what a callback of its garbage collector raises. So a
program also has a thread that learns of signals at once.
"""

import concurrent.futures
import contextlib
import contextvars
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from googlenet_jax.host import program

NAMES = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1')
# A closed terminal sends SIGHUP twice, and a scheduler's SIGTERM follows its SIGUSR1: only these insist, if repeated.
INSISTING = ('SIGINT', 'SIGTERM')
GRACE = 1.0  # seconds in which KeyboardInterrupt must arrive
LAST_WORDS = 3.0  # seconds for the message at the end: the disk that it looks at may hang
farewell: Callable[[], str] | None = None  # a mode's last work at a signal, in any thread; returns the last words
_watching = False  # whether a thread learns of signals
_request: 'StopRequest | None' = None  # the training that runs in the main thread
_abandoned: list[concurrent.futures.Future] = []  # work that XLA may still compile


def caught() -> list[signal.Signals]:
  """Returns the signals to answer: those of this system which the parent did not have ignored, as `nohup` does."""
  numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
  return [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def interrupt(number: int, frame: FrameType | None) -> None:
  """Interrupts the main thread, as a handler. During training, `StopRequest` handles signals instead."""
  raise KeyboardInterrupt(number)


@contextlib.contextmanager
def of_program(end: Callable[[int], Any]) -> Iterator[None]:
  """Lets signals interrupt the block, even where the main thread is inside XLA. For a program, not for a library.

  A signal raises `KeyboardInterrupt(number)`. If that does not leave the block in time, or at a second signal, a thread
  ends the program, after LAST_WORDS at the latest.

  Args:
    end: says what is left, and ends the process; its argument is the number of the signal.
  """
  global _watching
  receiver, sender = socket.socketpair()
  sender.setblocking(False)
  before = {number: signal.signal(number, interrupt) for number in caught()}
  descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
  threading.Thread(target=_watch, args=(receiver, frozenset(before), end), daemon=True).start()
  _watching = True
  try:
    yield
  except SystemExit as error:
    if not all(work.done() for work in _abandoned):  # Python would wait for XLA
      for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
          stream.flush()
      os._exit(error.code or 0)
    raise
  finally:
    _watching = False
    signal.set_wakeup_fd(descriptor)
    for number, handler in before.items():
      signal.signal(number, handler)
    sender.close()  # ends the thread


def _watch(receiver: socket.socket, numbers: frozenset[int], end: Callable[[int], Any]) -> None:
  """Reads the number of every signal as it comes, until the block is left."""
  with receiver:
    while number := receiver.recv(1):
      number = number[0]
      if number not in numbers:
        continue
      if _request is None or not _request.is_held():
        break
      if _request.ask(number):
        _tell('ended at once; what was not saved yet is lost')
        os._exit(128 + number)  # SystemExit would wait for threads; a half-written checkpoint does not count
    else:
      return
    if _is_left(receiver, GRACE):
      return
    last = threading.Thread(target=end, args=(number,), daemon=True)
    last.start()
    last.join(LAST_WORDS)  # whatever other signals come: they must not cut its work
    os._exit(128 + number)


def _is_left(receiver: socket.socket, seconds: float) -> bool:
  """Waits so long for the end of the block, or for another signal, and returns whether the block has ended."""
  receiver.settimeout(seconds)
  try:
    return not receiver.recv(1)
  except TimeoutError:
    return False


def _tell(text: str) -> None:
  with contextlib.suppress(OSError):  # the terminal is gone
    os.write(2, f'{text}\n'.encode())  # print could fail: the signal may have interrupted another print


class StoppedError(Exception):
  """A signal came before some work was done."""


class Interrupted(KeyboardInterrupt):
  """A training was interrupted, and has saved. A notebook shows the text instead of a traceback."""

  def _render_traceback_(self) -> list[str]:
    return [str(self)]


class StopRequest:
  """Answers signals in a `with` block in which something is trained; `signal` is the first one that came.

  Where nothing is unsaved, a signal raises KeyboardInterrupt. Inside `holding()` it only sets `signal`. Then the block
  must save and end, and a second SIGINT or SIGTERM ends a program, or raises KeyboardInterrupt in a library. Only the
  main thread can catch signals. In another thread the block leaves them to the program.
  """

  def __init__(self):
    """Catches nothing until the block begins."""
    self.signal: signal.Signals | None = None
    self._before: dict[signal.Signals, Any] = {}
    self._held = self._insisted = 0
    self._counting = threading.Lock()

  def __enter__(self) -> 'StopRequest':
    global _request
    if threading.current_thread() is threading.main_thread():
      _request = self
      self._before = {number: signal.signal(number, self._catch) for number in caught()}
    return self

  def __exit__(self, *_) -> None:
    global _request
    for number, handler in self._before.items():
      signal.signal(number, handler)
    if _request is self:
      _request = None

  @contextlib.contextmanager
  def holding(self) -> Iterator[None]:
    """Inside the block something is unsaved. Several threads may hold at the same time."""
    with self._counting:
      self._held += 1
    try:
      yield
    finally:
      with self._counting:
        self._held -= 1

  def is_held(self) -> bool:
    """Returns whether something is unsaved."""
    return self._held > 0

  def ask(self, number: int) -> bool:
    """Notes a signal while something is unsaved, and says once what follows.

    Returns:
      Whether it insists: it is the second SIGINT or SIGTERM.
    """
    from googlenet_jax.host import distributed, processes  # they import JAX; a program has signals before

    first, self.signal = self.signal is None, self.signal or signal.Signals(number)
    distributed.pass_on(self.signal)
    self._insisted += signal.Signals(number).name in INSISTING
    if first and processes.is_first():
      second = 'a second Ctrl-C or SIGTERM ends' if program.is_program() else 'a second interrupt stops'
      _tell(f'\n{self.signal.name}: saving after the steps under way; {second} at once')
    return self._insisted > 1

  def _catch(self, number: int, frame: FrameType | None) -> None:
    if self.is_held() and (_watching or not self.ask(number)):  # the thread that watches asks
      return
    self.signal = self.signal or signal.Signals(number)  # threads that train see it, also if the interrupt gets lost
    raise KeyboardInterrupt(number)

  def check(self) -> None:
    """Raises StoppedError if a signal came."""
    if self.signal is not None:
      raise StoppedError

  def unless_stopped(self, work: Callable[[], Any], patience: float | None = 0.0) -> Any:
    """Returns what `work()` returns. Inside XLA no thread can answer a signal, so the work gets a thread of its own.

    Args:
      work: what may take a minute, and can be abandoned.
      patience: seconds to wait for it after a signal; None for no end.

    Raises:
      StoppedError: a signal came first. The work goes on for nothing until the process ends.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1)
    future = pool.submit(contextvars.copy_context().run, work)
    pool.shutdown(wait=False)
    while not future.done():
      concurrent.futures.wait([future], 0.1)
      if self.signal is not None and not concurrent.futures.wait([future], patience).done:
        _abandoned.append(future)
        raise StoppedError
    return future.result()

  def exit(self) -> None:
    """Ends what the signal interrupted, after saving, and says how to continue.

    Raises:
      SystemExit: has the shell's status for the signal.
      Interrupted: SIGINT came, and this is not our own program but, say, a notebook.
    """
    if not program.is_program() and self.signal == signal.SIGINT:
      raise Interrupted('interrupted, after saving: run the same again to continue')
    from googlenet_jax.host import console  # here, because it is slow to import

    again = shlex.join(['python', *sys.argv])
    console.say(f'The same command continues: {again}' if program.is_program() else 'Run the same again to continue.')
    raise SystemExit(128 + self.signal)
