"""Folders that several processes share: each must see what the first one wrote there, perhaps a little later."""

import pathlib
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

from googlenet_jax.host import files, processes
from googlenet_jax.host.errors import UserError, one_line

TRIES = 70  # a second apart: NFS may show a folder as it was a minute ago


def check(folder: pathlib.Path) -> None:
  """Checks that all processes that work on a run see the same folder. All of them must call it.

  Raises:
    UserError: in every process; names one that has another folder, or sees none.
  """
  if processes.count() == 1:
    return
  token = processes.of_first(secrets.token_hex(6))
  path = folder / f'{files.TEMPORARY}{token}'
  if processes.is_first():
    path.touch()
  try:
    processes.of_first(None)  # it is there now
    # Nobody has asked for this name before, so no system remembers that it was not there.
    wait_until_alike(folder, path.exists, tries=5)
  finally:
    if processes.is_first():
      path.unlink(missing_ok=True)


def wait_until_alike(folder: pathlib.Path, look: Callable[[], Any], tries: int = TRIES) -> None:
  """Waits until all processes that work on a run see the same in a folder. All of them must call it.

  Args:
    folder: the folder, for what is said of it.
    look: returns what this process sees, as for `processes.gather`.
    tries: how often to look, once a second.

  Raises:
    UserError: as `check`.
  """
  if processes.count() == 1:
    return
  for number in range(tries):
    if number:
      time.sleep(1.0)
    seen = processes.gather([look(), socket.gethostname()])
    others = [index for index, (what, _) in enumerate(seen) if what != seen[0][0]]
    if not others:
      return
  raise UserError(
    f'{one_line(folder)} is not shared: process {others[0]} on {seen[others[0]][1]} does not see what process 0 on '
    f'{seen[0][1]} wrote there: give a --workdir that all hosts share, such as on NFS'
  )
