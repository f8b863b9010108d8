"""The processes that work together on one run, and what they tell each other through JAX.

A program is one process, or one on each host of a cluster. `distributed.start` connects them.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from googlenet_jax.host.errors import UserError

_alone = False  # whether each process trains a run of its own, see `alone`
_expected = 0  # number of this process, before JAX knows it
_on_host = 1  # processes on this host
_count = 1
_exchange: Callable[[Any], list[Any]] | None = None  # see `connect`


def all_count() -> int:
  """Returns the number of processes of this program. It does not start JAX."""
  if _exchange is None and jax.distributed.is_initialized():  # by a program that uses this one
    return jax.process_count()
  return _count


def all_index() -> int:
  """Returns the number of this process among all, from 0. It does not start JAX."""
  if _exchange is None and jax.distributed.is_initialized():
    return jax.process_index()
  return _expected


def connect(index: int, count: int, exchange: Callable[[Any], list[Any]] | None) -> None:
  """Notes that this process is connected with others, whether JAX knows of them or not.

  Args:
    index: its number.
    count: number of processes.
    exchange: sends a JSON value to all, and returns those of all; None: they are not connected any more.
  """
  global _expected, _count, _exchange
  _expected, _count, _exchange = index, count, exchange


def expect(index: int) -> None:
  """Sets the number of this process, before JAX knows it."""
  global _expected
  _expected = index


def share_host(count: int) -> None:
  """Sets the number of processes on this host."""
  global _on_host
  _on_host = count


def on_this_host() -> int:
  """Returns the number of processes on this host."""
  return _on_host


def count() -> int:
  """Returns the number of processes that work on this run."""
  return 1 if _alone else all_count()


def index() -> int:
  """Returns the number of this process among those that work on this run, from 0."""
  return 0 if _alone else all_index()


def is_first() -> bool:
  """Returns whether this process prints, and writes the files of the run."""
  return index() == 0


def devices() -> list[jax.Device]:
  """Returns the devices that work on this run."""
  return jax.devices()


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
  if count() == 1:
    return [value]
  if _exchange is not None:
    return _exchange(value)
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(text.size)).reshape(-1)
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: text.size] = text
  texts = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
  return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def of_first(value: Any) -> Any:
  """Returns the value of the first process in all of them; see `gather`."""
  return gather(value)[0]


def agree(what: str, value: dict[str, Any]) -> None:
  """Refuses to go on where processes have different values. All of them must call it.

  Args:
    what: what the values are about, such as 'recipe'.
    value: as for `gather`.

  Raises:
    UserError: in every process; names the first difference.
  """
  found = gather(value)
  for number, other in enumerate(found):
    for name in {**found[0], **other}:
      here, there = (one.get(name, 'nothing') for one in (found[0], other))
      if here != there:
        raise UserError(
          f'the processes have different values of {what}: {name} is {here} in process 0, and {there} in process '
          f'{number}: start all with the same command and the same files'
        )
