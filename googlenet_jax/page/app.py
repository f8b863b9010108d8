"""`--mode=page`: a page in the browser that tries a run's network on pictures, and shows the run."""

import contextlib
import errno
import ipaddress
import os
import pathlib
import socket
import tempfile
import threading
from typing import Any

from googlenet_jax.host import console
from googlenet_jax.host.errors import UserError, reason
from googlenet_jax.page.live import LiveRun

PORTS = 100  # ports that are tried to suggest a free one
MOST_BYTES = 50 << 20  # of an upload
KEPT_SECONDS = 120  # an upload may wait so long for its answer before it is deleted; looked at four times as often
WAITING = 100  # pictures that may wait for their answer; for more the page says that it is busy
# Gradio reads these when it is imported or a page is made. A user's own values could open the page to others.
SETTINGS = {
  'GRADIO_ANALYTICS_ENABLED': 'False',
  'GRADIO_ALLOWED_PATHS': '',
  'GRADIO_BLOCKED_PATHS': '',
  'GRADIO_DEBUG': '0',
  'GRADIO_VIBE_MODE': '',
  'HF_HUB_DISABLE_TELEMETRY': '1',
  'NO_PROXY': '*',  # Gradio asks its own server whether it has started, and a proxy cannot reach that
  'no_proxy': '*',
}


def serve(
  workdir: pathlib.Path,
  step: int | str | None = None,
  port: int = 7860,
  host: str = '127.0.0.1',
  compare: pathlib.Path | None = None,
) -> None:
  """Shows a run in the browser until a signal ends the program.

  Args:
    workdir: folder of a run or an ensemble, also of one that is training, or a file of weights.
    step: step of the checkpoint, 'best', or None for the newest.
    port: the port to listen on.
    host: the address to listen on. With the default only this machine can see the page.
    compare: another run, whose answers stand beside those of the first.

  Raises:
    UserError: there is no such run, the port is in use, the address is not one of this machine, or Gradio is missing.
  """
  check_address(host, port)
  found = [LiveRun(workdir, step)] + ([LiveRun(compare)] if compare else [])
  page = Page(found, port, host)
  try:
    console.say(f'The page of {workdir} is at {page.address} (Ctrl-C ends it)')
    if not is_of_this_machine(host):
      console.warn_once(
        f'--host={host}: everybody who can reach this machine can use the page, without a password; leave --host out '
        'to let only this machine'
      )
    threading.Event().wait()  # for a signal
  finally:
    page.forget()  # at once: a server that is closed waits for the browsers, and the process ends anyway


class Page:
  """A page that is being served.

  Attributes:
    runs: what it shows.
    address: where it is.
    uploads: folder of the pictures that were sent.
  """

  def __init__(self, found: list[LiveRun], port: int, host: str = '127.0.0.1'):
    """Starts the server, and then the work in the background.

    Args:
      found: the run, and perhaps another one to compare with.
      port: the port to listen on.
      host: the address to listen on.

    Raises:
      UserError: Gradio is missing, or the server does not start.
    """
    self.runs = found
    self._folder = tempfile.TemporaryDirectory(prefix='googlenet_jax_page_')
    self.uploads = pathlib.Path(self._folder.name)
    self._stack = contextlib.ExitStack()
    try:
      self._stack.enter_context(_environment(SETTINGS | {'GRADIO_TEMP_DIR': self._folder.name}))
      self._blocks = self._serve(port, host)
    except BaseException:
      self.forget()
      self._stack.close()
      raise
    shown = host if host not in ('0.0.0.0', '::', '') else socket.gethostname()
    self.address = f'http://{f"[{shown}]" if ":" in shown else shown}:{port}'
    for run in found:
      run.start()

  def _serve(self, port: int, host: str) -> Any:
    try:
      import gradio
    except ImportError as error:
      raise UserError(f"--mode=page needs the package gradio: pip install -e '.[page]' ({reason(error)})") from error
    from googlenet_jax.page import guard, layout

    blocks = layout.build(self.runs, KEPT_SECONDS)
    blocks.queue(max_size=WAITING)
    try:
      blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MOST_BYTES,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        root_path='',
        app_kwargs={'middleware': guard.middleware(), 'docs_url': None, 'redoc_url': None},
        theme=gradio.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']),
        head=layout.HEAD,
      )
    except (OSError, RuntimeError, ValueError) as error:
      raise UserError(f'the page cannot be served at {host}, port {port}: {reason(error)}') from error
    return blocks

  def forget(self) -> None:
    """Deletes what was uploaded."""
    self._folder.cleanup()

  def close(self) -> None:
    """Ends the server and the work in the background, for a program that goes on."""
    for run in self.runs:
      run.close()
    self._blocks.close(verbose=False)
    self.forget()
    self._stack.close()


@contextlib.contextmanager
def _environment(values: dict[str, str]):
  """Sets environment variables inside the block."""
  before = {name: os.environ.get(name) for name in values}
  os.environ.update(values)
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        os.environ.pop(name, None)
      else:
        os.environ[name] = value


# Addresses ------------------------------------------------------------------------------------------------------------


def check_address(host: str, port: int) -> None:
  """Refuses an address that cannot be listened on.

  Raises:
    UserError: the port is in use, and the text has the next free one; or the address is not one of this machine.
  """
  error = _trouble(host, port)
  if error is None:
    return
  if isinstance(error, socket.gaierror) or error.errno not in (errno.EADDRINUSE, errno.EACCES):
    raise UserError(
      f'--host={host}: this machine cannot listen there ({reason(error)}): leave --host out, or give one '
      'of its addresses'
    ) from error
  free = next((other for other in range(port + 1, min(port + PORTS, 65536)) if _trouble(host, other) is None), None)
  advice = f'give another one, such as --port={free}' if free else 'give another --port'
  raise UserError(f'port {port} cannot be used ({reason(error)}): {advice}') from error


def _trouble(host: str, port: int) -> OSError | None:
  """Returns why nothing can listen at an address, and None if it can."""
  try:
    for address in dict.fromkeys((host, '127.0.0.1')):  # Gradio looks at the second one too
      for family, kind, protocol, _, place in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[:1]:
        with socket.socket(family, kind, protocol) as trial:
          trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
          trial.bind(place)
  except OSError as error:
    return error
  return None


def is_of_this_machine(host: str) -> bool:
  """Returns whether only this machine can reach an address."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost'
