"""Opens Orbax's managers of checkpoints, for one process or for several that save a run together."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
from absl import logging

from googlenet_jax.host import retention


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences Orbax's warnings about our options, such as that a read-only manager saves nothing."""
  level = logging.get_verbosity()
  logging.set_verbosity(min(level, logging.ERROR))
  try:
    yield
  finally:
    logging.set_verbosity(level)


def writer(directory: pathlib.Path, accuracies: dict[int, float] | None = None) -> ocp.CheckpointManager:
  """Opens a folder that is there, to save in it. All processes that work on the run must call it.

  Args:
    directory: folder of the checkpoints. What a killed save left there is removed.
    accuracies: see `retention.TwoNewestAndBest`; None keeps all checkpoints.
  """
  policy = {} if accuracies is None else {'preservation_policy': retention.TwoNewestAndBest(accuracies)}
  in_background = ocp.AsyncOptions(barrier_sync_fn=_meet)
  return _open(directory, cleanup_tmp_directories=True, async_options=in_background, **policy)


def reader(directory: pathlib.Path) -> ocp.CheckpointManager:
  """Opens a folder to read in it. This process then waits for no other one."""
  own = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
  return _open(directory, read_only=True, multiprocessing_options=alone)


def _open(directory: pathlib.Path, **options) -> ocp.CheckpointManager:
  with _quiet():
    options = ocp.CheckpointManagerOptions(
      create=False,  # Orbax would take a file for an empty folder
      lightweight_initialize=True,  # reads no file of a checkpoint, which may be damaged
      **options,
    )
    return ocp.CheckpointManager(directory, options=options)


def _meet(*, key: str, timeout_ms: int) -> None:
  """Waits in a background thread until all processes have come so far with a save.

  Where a save has just failed it does not wait: the others would never come, and the failure could not be told.
  """
  if sys.exc_info()[1] is None:
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
