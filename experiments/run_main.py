"""Runs main.py as a program of its own, and lets it answer Ctrl-C in its own time."""

import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_main(arguments: Sequence[str], each_line: Callable[[subprocess.Popen, str], None] | None = None) -> int:
  """Runs `python main.py ARGUMENTS` in the root of the repository; returns its exit status.

  Ctrl-C reaches main.py by itself, SIGTERM is passed on. Either way this waits until main.py has saved and ended.

  Args:
    arguments: of main.py.
    each_line: called with the process and every line it prints; without, it prints for itself.
  """
  piped = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True} if each_line else {}
  before = {}
  try:
    process = subprocess.Popen([sys.executable, 'main.py', *arguments], cwd=ROOT, **piped)
    # Handlers, not SIG_IGN: that main.py would inherit.
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    if each_line:
      for line in process.stdout:
        each_line(process, line)
    return process.wait()
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def run_or_exit(arguments: Sequence[str]) -> None:
  """Runs main.py; ends with its status where that is not 0."""
  if status := run_main(arguments):
    sys.exit(status)
