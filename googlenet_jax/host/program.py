"""How this program was started: from a shell, or inside another program, such as a notebook or a debugger."""

import os
import sys


def is_program() -> bool:
  """Returns whether this process was started to run this program, and may be ended or restarted by it.

  False inside another program, such as by IPython's `%run`.
  """
  count = len(sys.argv)
  own, before = sys.orig_argv[-count:], sys.orig_argv[:-count]
  module = getattr(sys.modules['__main__'], '__spec__', None)
  as_module = before[-1:] == ['-m'] and module is not None and own[0] == module.name  # python -m main
  as_text = before[-1:] == ['-c'] == sys.argv[:1]
  return own == sys.argv or ((as_module or as_text) and own[1:] == sys.argv[1:])


def can_restart() -> bool:
  """Returns whether the same command line starts the same program again, and nobody looks on.

  A program that comes from standard input or from `-c` has no file. A debugger, a profiler or a coverage tool that
  runs the program would be restarted with it, or would lose it.
  """
  if not (is_program() and sys.executable and os.path.isfile(sys.argv[0])):
    return False
  options = sys.orig_argv[1 : -len(sys.argv)]  # for Python itself; -X and -W may have their values behind them
  plain = [option for place, option in enumerate(options) if not (place and options[place - 1] in ('-X', '-W'))]
  return all(option.startswith('-') and option != '-m' for option in plain) and sys.gettrace() is None


def open_standard_streams() -> None:
  """Opens standard input, output and error on /dev/null if they are closed.

  Otherwise the next file that is opened takes the place, such as a checkpoint. Libraries in C would write their
  messages into it.
  """
  for descriptor in range(3):
    try:
      os.fstat(descriptor)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
