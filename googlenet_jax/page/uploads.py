"""The pictures that are sent to a page: where they lie, for how long, and which files an answer may read."""

import contextlib
import pathlib
import shutil
import tempfile
import threading
import time
from typing import Any

from googlenet_jax.host.errors import UserError

MOST_BYTES = 50 << 20  # the largest upload
ROOM = 1 << 30  # bytes of all uploads together
FILE_BYTES = 4096  # what a file takes at least
KEPT_SECONDS = 120  # an upload may wait so long for its answer before it is deleted; looked at four times as often


class Uploads:
  """A temporary folder of pictures, which are deleted after a while.

  Gradio writes them. It could delete them too, but it forgets those whose sender breaks off.

  Attributes:
    folder: where they lie.
  """

  def __init__(self):
    """Makes the folder, and begins to delete what is old."""
    self.folder = pathlib.Path(tempfile.mkdtemp(prefix='googlenet_jax_page_')).resolve()
    self._coming = 0  # bytes of uploads under way
    self._forgotten, self._forgetting = threading.Event(), threading.Lock()
    threading.Thread(target=self._work, args=(KEPT_SECONDS,), daemon=True).start()

  def begin(self, size: int) -> bool:
    """Returns whether there is room for an upload of `size` bytes, and keeps it until `end(size)`."""
    there = sum(max(_size(path), FILE_BYTES) for path in self.folder.rglob('*'))
    if self._forgotten.is_set() or there + self._coming + size > ROOM:
      return False
    self._coming += size
    return True

  def end(self, size: int) -> None:
    """Gives back the room of an upload that has come or has broken off."""
    self._coming -= size

  def find(self, sent: Any) -> tuple[pathlib.Path, str]:
    """Returns the file that a request names, and the name that it has for its sender.

    Args:
      sent: what came as the picture. Anybody can write it by hand, so it may be anything.

    Raises:
      UserError: it is not a file in the folder.
    """
    given = sent if isinstance(sent, dict) else {}
    path, name = given.get('path'), given.get('orig_name')
    with contextlib.suppress(OSError, ValueError):  # too long, or not a path
      found = pathlib.Path(path if isinstance(path, str) else '').resolve()
      if found.is_relative_to(self.folder) and found.is_file():
        return found, name if isinstance(name, str) else ''
    raise UserError('This picture is not here, or not any more: send it again.')

  def forget(self) -> None:
    """Deletes everything; no upload is taken any more. Several threads may call this."""
    self._forgotten.set()
    with self._forgetting:
      for _ in range(10):  # an upload that is under way may write between two looks
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.folder.exists():
          return

  def _work(self, kept: float) -> None:
    while not self._forgotten.wait(kept / 4):
      oldest = time.time() - kept
      for path in sorted(self.folder.rglob('*'), reverse=True):  # files come before their folders
        with contextlib.suppress(OSError):  # deleted meanwhile, or a folder with newer files
          if path.stat().st_mtime < oldest:
            path.rmdir() if path.is_dir() else path.unlink()


def _size(path: pathlib.Path) -> int:
  try:
    return path.stat().st_size
  except OSError:  # deleted meanwhile
    return 0
