"""Mistakes that the user can correct, troubles of the machine, and paths that a user writes."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

JOINERS = '\u200c\u200d'  # invisible, and part of words in Persian and Hindi, and of emoji


class UserError(Exception):
  """The user gave something wrong. The text says what is wrong, where, and what to do.

  `main.py` prints the text as one line and exits with status 2. A notebook shows that line too, without a traceback.
  """

  def __init__(self, text: str):
    """Makes one line of a text, which may quote a file or a library: with escapes for what cannot be printed."""
    super().__init__(one_line(' '.join(text.splitlines())))

  def _render_traceback_(self) -> list[str]:
    """Returns what a notebook shows instead of a traceback."""
    return [f'error: {self}']


def one_line(name: str | os.PathLike) -> str:
  """Returns a name that can be printed in one line: control characters and bytes that are no text become escapes."""
  return ''.join(c if c.isprintable() or c in JOINERS else ascii(c)[1:-1] for c in os.fspath(name))


def reason(error: BaseException) -> str:
  """Returns what an exception says, in one line: file and trouble if it has them, and its kind if it says nothing."""
  if isinstance(error, OSError) and error.strerror:
    place = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else None  # it may be a number
    text = error.strerror if place is None else f'{one_line(os.fsdecode(place))}: {error.strerror}'
  else:
    text = str(error)
  return ' '.join(text.split()) or type(error).__name__


# What systems and libraries say when a machine has a trouble, and what helps.
_TROUBLES = {
  'No space left on device|Disk quota exceeded': 'make room there, then give the same command again',
  'File too large': 'raise the limit, such as by ulimit -f unlimited',
  'Too many open files': 'raise the limit, such as by ulimit -n 4096',
  "can't start new thread|Resource temporarily unavailable": 'end other programs, or raise the limit (ulimit -u)',
  'Input/output error|Stale file handle|Transport endpoint': 'look at the disk or its network, then give the same '
  'command again',
}
_PRECISION = 'JAX_DEFAULT_MATMUL_PRECISION'  # JAX reads it from the environment
_MEMORY = (
  'RESOURCE_EXHAUSTED|(?i:out.of.memory|bad_alloc|alloc_failed|(cannot|unable to|failed to) allocate|'
  'failed to map segment)'
)
MEMORY_OF_OTHERS = 'end other programs that need memory'


def advice(text: str) -> str:
  """Returns what helps against the trouble of a machine that a text is about; empty if nothing is known."""
  return next((helps for says, helps in _TROUBLES.items() if re.search(says, text)), '')


def trouble(error: Exception, memory: str, place: str | os.PathLike = '') -> str | None:
  """Returns what an exception says in one line, with a next step, if it is no fault of the program; else None.

  Args:
    error: a UserError, an OSError, or what a library raises without memory, room or threads.
    memory: what helps if the memory is not enough.
    place: where the work is done, for an error that names no file.
  """
  if isinstance(error, UserError):
    return str(error)
  text = reason(error)
  if place and isinstance(error, OSError) and error.filename is None:
    text = f'{one_line(place)}: {text}'
  if helps := advice(text):
    return f'{text}: {helps}'
  if 'Algorithm not supported' in text and (value := os.environ.get(_PRECISION)):
    return f'{text}: {_PRECISION}={value} in the environment asks for it: leave it out'
  if isinstance(error, MemoryError) or re.search(_MEMORY, text):
    helps = MEMORY_OF_OTHERS if isinstance(error, ImportError) else memory  # a smaller batch does not help to import
    return f'the memory is not enough ({text[:200]}): {helps}'
  return text if isinstance(error, OSError) else None


@contextlib.contextmanager
def plain_troubles(memory: str, place: str | os.PathLike = '') -> Iterator[None]:
  """Raises a machine's trouble inside the block as a UserError; see `trouble`."""
  try:
    yield
  except Exception as error:
    text = trouble(error, memory, place)
    if text is None or isinstance(error, UserError):
      raise
    raise UserError(text) from error


def expanded(path: str | os.PathLike, name: str = '') -> pathlib.Path:
  """Returns what a user wrote as a path of this machine; see `expanded_text`."""
  return pathlib.Path(expanded_text(path, name))


def expanded_text(path: str | os.PathLike, name: str = '') -> str:
  """Returns what a user wrote as a path of this machine, as text that is otherwise unchanged.

  `~` or `~NAME` at the start is the home folder, and `file:///folder` is `/folder`. Every path of a user goes through
  this function before anything is made: flags, keys of recipes, environment variables, arguments in Python.

  Args:
    path: what the user wrote.
    name: flag, key or variable that has this value; an error begins with it.

  Raises:
    UserError: there is no such home folder, or the path is the URL of something else.
  """
  text = os.fsdecode(path)
  given = f'{name}={one_line(path)}' if name else one_line(path)
  scheme, _, rest = text.partition(':')
  # `gs:/bucket` is what pathlib makes of `gs://bucket`, unless there is a folder of that name. Windows has `c:/folder`.
  is_url = rest.startswith('//') or (rest.startswith('/') and not os.path.exists(f'{scheme}:'))
  if is_url and re.fullmatch('[A-Za-z][A-Za-z0-9+.-]+', scheme):
    host, _, rest = rest[2:].partition('/') if rest.startswith('//') else ('', '', rest[1:])
    if scheme.lower() != 'file' or host not in ('', 'localhost'):
      raise UserError(
        f'{given} is a URL, and files must be on this machine: mount the bucket, or copy or download the files'
      )
    from urllib.request import url2pathname  # slow to import

    text = url2pathname(f'/{rest}')
  whole = os.path.expanduser(text)
  home = os.path.expanduser(text.split('/')[0])
  if re.match('~[^/]', text) and whole != text and not os.path.isdir(home):  # some users, such as nobody, have none
    raise UserError(f'{given}: the home folder {home} does not exist: write the whole path')
  if whole.startswith('~') and not os.path.lexists(whole):  # a file may have such a name
    raise UserError(f'{given}: the home folder that ~ stands for is unknown: write the whole path')
  return whole
