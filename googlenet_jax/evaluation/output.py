"""Files of the modes that print their results too: what cannot be written is said once, and the mode goes on."""

import pathlib
from collections.abc import Callable

from googlenet_jax.host import console, files, processes
from googlenet_jax.host.errors import UserError, one_line, reason


class Output:
  """A folder for the files of a mode. After the first one that cannot be written it takes no more."""

  def __init__(self, folder: pathlib.Path, given: bool = False, suffix: str = ''):
    """Makes the folder and tries it.

    Args:
      folder: where the files go.
      given: whether the user named the folder with --output.
      suffix: comes into every name, before its ending.

    Raises:
      UserError: the user named the folder, and it cannot be written.
    """
    self.folder, self._suffix = folder, suffix
    self.written: list[str] = []  # names of files, in order
    if not processes.is_first():
      return
    try:
      folder.mkdir(parents=True, exist_ok=True)
      with files.replacing(folder / '.writable') as temporary:
        temporary.touch()
      (folder / '.writable').unlink()
    except OSError as error:
      if given:
        raise UserError(f'--output={one_line(folder)} cannot be written: {error.strerror}') from error
      self.stop(error)

  @property
  def is_open(self) -> bool:
    """Whether this process writes files and the folder could be written so far."""
    return self.folder is not None and processes.is_first()

  def path(self, name: str) -> pathlib.Path:
    """Returns the path of a file; the folder is open."""
    return self.folder / f'{pathlib.PurePath(name).stem}{self._suffix}{pathlib.PurePath(name).suffix}'

  def write(self, name: str, make: Callable[[pathlib.Path], None]) -> bool:
    """Lets `make(path)` write a file, and returns whether it could.

    A UserError goes through: it is about something else, such as damaged pictures.
    """
    if not self.is_open:
      return False
    path = self.path(name)
    try:
      make(path)
    except UserError:
      raise
    except OSError as error:
      self.stop(error, path)
      return False
    except Exception as error:  # drawing libraries raise any kind
      console.warn_once(f'{one_line(path)} was not written: {reason(error)}; the work goes on')
      return False
    self.note(path)
    return True

  def note(self, path: pathlib.Path) -> None:
    """Notes that a file was written."""
    if path.name not in self.written:
      self.written.append(path.name)

  def stop(self, error: OSError, path: pathlib.Path | None = None) -> None:
    """Warns that no more files are written."""
    what = self.folder if path is None else path
    more = 'no files are' if path is None else 'no more files are'
    console.warn_once(
      f'{one_line(what)} cannot be written ({error.strerror or reason(error)}), so {more}: --output=DIR names another '
      'folder'
    )
    self.folder = None

  def say(self) -> None:
    """Says what was written, if anything was."""
    if self.folder is not None and self.written:
      console.say(f'written to {one_line(self.folder)}: {", ".join(self.written)}')
