"""Ctrl-C and SIGTERM as a request that the loop answers between two steps."""

import signal
import sys
from types import FrameType

from googlenet_jax import monitor


class StopRequest:
  """Within the `with` block, `signal` is the first SIGINT or SIGTERM that came; a second one ends at once."""

  def __init__(self):
    """Nothing is caught before the block begins."""
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
      raise SystemExit(128 + number)
    self.signal = signal.Signals(number)
    monitor.say(f'{self.signal.name}: saving after this step; once more ends at once')

  def exit(self, step: int, last_step: int) -> None:
    """Ends the program with the shell's status for the signal and a line that says how to continue."""
    monitor.say(f'stopped at step {step} of {last_step}, saved. The same command continues: {" ".join(sys.argv)}')
    raise SystemExit(128 + self.signal)
