"""Runs that are trained in threads of one process take turns to save.

Orbax has one counter for all saves of a process. Two saves at once mix up their answers, lose files or wait forever.
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Protocol


class Saver(Protocol):
  """The checkpoints of a run."""

  def is_saving(self) -> bool:
    """Returns whether a save is under way in the background."""


_one_save = threading.Lock()
_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


def begin(saver: Saver) -> None:
  """Notes that a run is trained in this process."""
  with _one_save:
    _savers.add(saver)


def end(saver: Saver) -> None:
  """Notes that it is not trained any more."""
  with _one_save:
    _savers.discard(saver)


@contextlib.contextmanager
def turn(saver: Saver) -> Iterator[bool]:
  """Waits until no other run saves. Inside the block no other run begins to save.

  Yields:
    Whether a save must end inside the block, because other runs are trained in this process.
  """
  with _one_save:
    others = [other for other in _savers if other is not saver]
    while any(other.is_saving() for other in others):  # begun while that run was alone
      time.sleep(0.01)
    yield bool(others)
