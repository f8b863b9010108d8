"""How main.py ends: after a signal, a mistake of the user, a trouble of the machine, or a bug."""

import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable

from absl import flags

from googlenet_jax.host import console, errors, signals


def after_signal(workdir_of_flags: Callable[[], pathlib.Path | None], number: int = signal.SIGINT) -> None:
  """Ends the program after a signal, from any thread.

  Args:
    workdir_of_flags: returns the folder of the run, or None; called if the flags are parsed.
    number: the signal.
  """
  try:
    if distributed := sys.modules.get('googlenet_jax.host.distributed'):
      distributed.tell(f'{signal.Signals(number).name} interrupted it', 128 + number)
    if signals.farewell is not None:
      text = signals.farewell()
    else:
      text = f'interrupted; {_what_stays(workdir_of_flags() if flags.FLAGS.is_parsed() else None)}'
    print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
  finally:
    os._exit(128 + number)  # sys.exit would wait for a thread in which XLA compiles, and then crash


def _what_stays(workdir: pathlib.Path | None) -> str:
  """Says which checkpoints a program leaves that ends too early."""
  from googlenet_jax import runs

  folders = [workdir, *workdir.glob('member_*')] if workdir else []
  saved = any(map(runs.has_checkpoints, folders))
  return f'the checkpoints in {workdir} stay' if saved else 'nothing was saved yet'


def after_error(error: Exception) -> None:
  """Ends the program after a mistake of the user or a trouble of the machine, with a line; after a bug, with all of it.

  Where several processes are connected, it tells the others.
  """
  text = errors.trouble(error, errors.MEMORY_OF_OTHERS)
  distributed = sys.modules.get('googlenet_jax.host.distributed')  # missing if JAX cannot be imported
  connected = distributed is not None and distributed.are_connected()
  status = 1 if text is None else 2
  if connected:
    distributed.fail(text or errors.reason(error), status)
  if text is not None:
    console.complain(f'error: {text}')
  elif connected:
    traceback.print_exception(error)
  else:
    raise error
  if connected:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # sys.exit would wait for the other processes, in JAX
  sys.exit(2)
