"""What the processes of a program tell each other beside JAX, over the connections of `meeting.py`.

Where a process dies, JAX aborts the others from C++, or lets them wait. The system closes these connections when a
process ends, however it ends. So the others learn of it at once, and end with a line that says why.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from googlenet_jax.host.errors import UserError
from googlenet_jax.host.meeting import Channel

GRACE = 1.0  # seconds for a process to report by itself what another one has reported
PING_SECONDS = 5.0  # between the signs of life of a process
SILENT_SECONDS = 45.0  # without one a process is lost: it was stopped, or its host or its connection was
LOST = 75  # exit status after another process was killed: EX_TEMPFAIL of sysexits.h, so a scheduler may try again


class Peers:
  """The other processes. Threads listen to them: process 0 to all, each other one to process 0."""

  def __init__(self, index: int, names: Sequence[str], channels: dict[int, Channel], end: Callable[[str, int], Any]):
    """Begins to listen.

    Args:
      index: number of this process.
      names: names of all processes.
      channels: from `meeting.meet`.
      end: called in a thread with a text and an exit status if another process has ended; it must end this one.
    """
    self._index, self._names, self._channels, self._end = index, names, channels, end
    self._changed = threading.Condition()  # guards what follows
    self._left: set[int] = set()  # processes that have nothing more to do
    self._agreed: set[int] = set()  # processes that know when to stop
    self._texts: dict[int, str] = {}  # why processes failed
    self._ending = False  # whether this process says why it ends
    self._wanted = self._signal = 0  # a signal that some process got; the one that all stop for
    self._calls, self._stop_at = 0, None  # calls for training steps and evaluations
    self._values: dict[int, Any] = {}  # what processes have sent to `gather`
    for number, channel in channels.items():
      threading.Thread(target=self._listen, args=(number, channel), daemon=True).start()
    threading.Thread(target=self._ping, daemon=True).start()

  def _listen(self, number: int, channel: Channel) -> None:
    try:
      while message := channel.receive(SILENT_SECONDS):
        self._hear(number, message)
    except Exception:  # silence, or nonsense: as if it had ended
      channel.close()
    with self._changed:
      # Another process waits in `leave` until process 0 has left.
      lost = number not in self._texts and not (number in self._left and self._index)
    if lost:
      self._fail_because_of(number, '', LOST)

  def _ping(self) -> None:
    while not self._ending:
      self._tell(ping=True)
      time.sleep(PING_SECONDS)

  def _hear(self, number: int, message: dict[str, Any]) -> None:
    if 'failed' in message:
      self._fail_because_of(message['failed'], message['text'], message['status'])
    with self._changed:
      if 'left' in message:
        self._left.add(number)
      if 'signal' in message:
        self._want(message['signal'])
      if 'stop_at' in message:
        self._stop_at, self._signal = message['stop_at'], message['of']
        self._channels[0].send(agreed=True)
      if 'agreed' in message:
        self._agreed.add(number)
      if 'value' in message:
        self._values[number] = message['value']
      self._changed.notify_all()

  def _tell(self, **message: Any) -> None:
    """Tells process 0; or, in process 0, all others."""
    for channel in self._channels.values():
      channel.send(**message)

  # The end of one is the end of all.

  def _fail_because_of(self, number: int, text: str, status: int) -> None:
    """Ends this process after another one has ended, with the same status."""
    with self._changed:
      self._texts[number] = text
      self._changed.notify_all()
      if self._ending:
        return
    if self._index == 0:
      self._tell(failed=number, text=text, status=status)
    if text:
      time.sleep(GRACE)  # this process may have the same trouble
    with self._changed:
      if self._ending:
        return
      self._ending = True
    why = text or 'it was killed, or its host or its connection was lost; the same command continues'
    self._end(f'{self._names[number]}{":" if text else " has ended:"} {why}', status)

  def fail(self, text: str, status: int) -> None:
    """Tells the others that this process ends because of a trouble, and which.

    If another process has ended before, that is the cause: then a thread says it and ends this process.

    Args:
      text: the trouble.
      status: exit status of this process, and so of all.
    """
    with self._changed:
      self._changed.wait_for(lambda: self._texts, GRACE)
      if set(self._texts.values()) - {text}:
        self._changed.wait_for(lambda: False, 10 * GRACE)
      self._ending = True
    self.tell(text, status)

  def tell(self, text: str, status: int) -> None:
    """Tells the others why this process ends now, and its exit status."""
    self._tell(failed=self._index, text=text, status=status)

  def close(self) -> None:
    """Closes the connections."""
    for channel in self._channels.values():
      channel.close()

  def leave(self) -> None:
    """Waits until all processes have nothing more to do."""
    if self._index:
      self._tell(left=True)
    with self._changed:
      self._changed.wait_for(lambda: self._left >= set(self._channels))
      self._ending = True
    if self._index == 0:
      self._tell(left=True)

  def gather(self, value: Any) -> list[Any]:
    """Returns the values of all processes, in their order. All of them must call it, and wait for the last one.

    Args:
      value: what JSON can say.
    """
    if self._index:
      self._tell(value=value)
    with self._changed:
      missing = lambda: set(self._channels) - self._values.keys()
      self._changed.wait_for(lambda: not missing() or missing() & self._left)
      if gone := missing() & self._left:
        raise UserError(
          f'{self._names[min(gone)]} has nothing more to do, and {self._names[self._index]} has: start all with the '
          'same command and the same files'
        )
      values, self._values = self._values, {}
    if self._index:
      return values[0]
    everyone = [json.loads(json.dumps(value)), *(values[number] for number in sorted(values))]
    self._tell(value=everyone)
    return everyone

  # A signal to one is a signal to all.

  def signal_of_any(self, signal: int) -> int:
    """Returns the number of the first signal that any process got, or 0; `signal` is that of this process, or 0."""
    with self._changed:
      self._want(signal)
      return self._wanted

  def _want(self, signal: int) -> None:
    if signal and not self._wanted:
      self._wanted = signal
      self._tell(signal=signal)  # process 0 tells the others

  def asked_to_stop(self, signal: int, ahead: int) -> int:
    """Returns the number of the signal for which all processes stop now, or 0. All stop after the same call.

    Every process asks this after each call of the training step, and before each batch of an evaluation. Process 0
    decides at which of these times to stop. It goes on when all know it. Until then no process can be further, because
    each call needs all of them.

    Args:
      signal: number of the signal that this process got, or 0.
      ahead: how many calls a process may start before an earlier one has ended.
    """
    self._calls += 1
    with self._changed:
      self._want(signal)
      decides = self._index == 0 and self._wanted and self._stop_at is None
      if decides:
        self._stop_at, self._signal = self._calls + ahead + 2, self._wanted
    if decides:
      self._tell(stop_at=self._stop_at, of=self._signal)
      with self._changed:
        self._changed.wait_for(lambda: self._agreed >= set(self._channels))
    with self._changed:
      return self._signal if self._stop_at == self._calls else 0
