"""The processes that work together on one run, and what they tell each other.

A program is one process, or one on each host of a cluster. `distributed.together` connects them. It is not JAX that
carries what they tell each other: a process that trains a run of its own must not be connected in JAX, see
`distributed.join`.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from googlenet_jax.host.errors import UserError

_index, _count, _on_host = 0, 1, 1
_exchange: Callable[[Any], list[Any]] | None = None  # see `connect`
_alone = False  # whether each process trains a run of its own, see `alone`


def expect(index: int) -> None:
  """Sets the number of this process, before it is connected: only process 0 prints."""
  global _index
  _index = index


def connect(index: int, count: int, on_host: int, exchange: Callable[[Any], list[Any]] | None) -> None:
  """Notes that this process is connected with others.

  Args:
    index: its number, from 0.
    count: number of processes.
    on_host: those on its host.
    exchange: sends a value to all, and returns those of all; None: they are not connected any more.
  """
  global _index, _count, _on_host, _exchange
  _index, _count, _on_host, _exchange = index, count, on_host, exchange


def on_this_host() -> int:
  """Returns the number of processes on this host."""
  return _on_host


def count() -> int:
  """Returns the number of processes that work on this run."""
  return 1 if _alone else _count


def index() -> int:
  """Returns the number of this process among those that work on this run, from 0."""
  return 0 if _alone else _index


def is_first() -> bool:
  """Returns whether this process prints, and writes the files of the run."""
  return index() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
  """Inside the block each process works on a run of its own, with its own devices. All processes enter it."""
  global _alone
  before, _alone = _alone, True
  try:
    yield
  finally:
    _alone = before


def gather(value: Any) -> list[Any]:
  """Returns the values of all processes, in their order. All of them must call it, and wait for the last one.

  Args:
    value: numbers, texts, lists and dicts, as in JSON; their sizes may differ.
  """
  return [value] if count() == 1 else _exchange(value)


def of_first(value: Any) -> Any:
  """Returns the value of the first process in all of them; see `gather`."""
  return gather(value)[0]


def agree(what: str, value: dict[str, Any], advice: str = 'start all with the same command and the same files') -> None:
  """Refuses to go on where processes have different values. All of them must call it.

  Args:
    what: what the values are about, such as 'devices'.
    value: as for `gather`.
    advice: what to do if they differ.

  Raises:
    UserError: in every process; names the first difference, and how many more there are.
  """
  first, *others = gather(value)
  for number, other in enumerate(others, start=1):
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    if names:
      here, there = (one.get(names[0], 'nothing') for one in (first, other))
      more = f' (and {len(names) - 1} more)' if names[1:] else ''
      raise UserError(
        f'the {what} differ: {names[0]} is {here} in process 0, and {there} in process {number}{more}: {advice}'
      )
