"""The one exception for mistakes that the user can correct, and paths that a user writes."""

import os
import pathlib


class UserError(Exception):
  """The user gave something wrong. The text says what is wrong, where, and what to do.

  `main.py` prints the text as one line and exits with status 2, without a traceback.
  """


def one_line(name: str | os.PathLike) -> str:
  """Returns a name that can be printed in one line: control characters and bytes that are no text become escapes."""
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fspath(name))


def reason(error: BaseException) -> str:
  """Returns what an exception says, in one line: file and trouble if it has them, and its kind if it says nothing."""
  if isinstance(error, OSError) and error.strerror:
    place = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else None  # it may be a number
    text = error.strerror if place is None else f'{one_line(os.fsdecode(place))}: {error.strerror}'
  else:
    text = str(error)
  return ' '.join(text.split()) or type(error).__name__


def expanded(path: str | os.PathLike) -> pathlib.Path:
  """Returns a path whose `~` or `~NAME` at the start is the home folder.

  Raises:
    UserError: there is no such home folder.
  """
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as error:
    raise UserError(f'{one_line(path)}: the home folder that ~ stands for is unknown: write the whole path') from error
