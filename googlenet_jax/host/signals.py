"""Ctrl-C and SIGTERM as a request that the training loop answers between two steps."""

import os
import shlex
import signal
import sys
from types import FrameType

from googlenet_jax.host import console


class StopRequest:
  """Inside the `with` block, `signal` is the first SIGINT or SIGTERM that came; a second one ends the program."""

  def __init__(self):
    """Catches nothing until the block begins."""
    self.signal: signal.Signals | None = None
    self._before = {}

  def __enter__(self) -> 'StopRequest':
    for number in (signal.SIGINT, signal.SIGTERM):
      self._before[number] = signal.signal(number, self._catch)
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _catch(self, number: int, frame: FrameType | None) -> None:
    if self.signal is not None:
      os.write(2, b'ended at once; what was not saved yet is lost\n')
      os._exit(128 + number)  # SystemExit would wait for threads; a half-written checkpoint does not count
    self.signal = signal.Signals(number)
    # print could fail here: the signal may have interrupted another print.
    os.write(2, f'\n{self.signal.name}: saving after the steps under way; a second signal ends at once\n'.encode())

  def exit(self) -> None:
    """Says how to continue, and ends the program with the shell's status for the signal."""
    console.say(f'The same command continues: {shlex.join(["python", *sys.argv])}')
    raise SystemExit(128 + self.signal)
