"""`--mode=page`: a page in the browser that tries a run's network on pictures, and shows the run."""

import contextlib
import os
import pathlib
import signal
import socket
import threading
from collections.abc import Mapping
from typing import Any

from googlenet_jax.host import console, signals
from googlenet_jax.host.errors import UserError, reason
from googlenet_jax.page import addresses, guard, uploads
from googlenet_jax.page.live import LiveRun
from googlenet_jax.page.subject import of_both
from googlenet_jax.page.uploads import Uploads

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
  data: Mapping[str, str] | None = None,
) -> None:
  """Shows a run in the browser until a signal ends the program.

  Args:
    workdir: folder of a run or an ensemble, also of one that is training, or a file of weights.
    step: step of the checkpoint, 'best', or None for the newest.
    port: the port to listen on.
    host: the address to listen on. With the default only this machine can see the page.
    compare: another run, whose answers stand beside those of the first.
    data: where the images of the run are now, as for `loading.load`; of the other one too, if they are the same.

  Raises:
    UserError: there is no such run, the port is in use, the address is not one of this machine, or Gradio is missing.
  """
  addresses.check(host, port)
  found = [LiveRun(workdir, step, data)]
  if compare:
    found.append(LiveRun(compare, data=of_both(data, workdir, compare)))
  sent = Uploads()
  signals.farewell = lambda: _forget(sent)
  try:
    page = Page(found, port, host, sent)
    console.say(f'The page of {workdir} is at {page.address} (Ctrl-C ends it)')
    if not addresses.is_of_this_machine(host):
      console.warn_once(
        f'--host={host}: everybody who can reach this machine can use the page, without a password; leave --host out '
        'to let only this machine'
      )
    threading.Event().wait()  # for a signal
  finally:
    _forget(sent)  # at once: a server that is closed waits for the browsers, and the process ends anyway


def _forget(sent: Uploads) -> str:
  """Deletes the pictures that were sent, also if a second signal follows the first; returns what a user should know."""
  before = {}
  if threading.current_thread() is threading.main_thread():
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals.caught()}
  sent.forget()
  for number, handler in before.items():
    signal.signal(number, handler)
  return 'The page has ended; pictures that were sent to it are deleted.'


class Page:
  """A page that is being served.

  Attributes:
    runs: what it shows.
    address: where it is.
    uploads: the pictures that were sent.
  """

  def __init__(self, found: list[LiveRun], port: int, host: str, sent: Uploads):
    """Starts the server, and then the work in the background.

    Args:
      found: the run, and perhaps another one to compare with.
      port: the port to listen on.
      host: the address to listen on.
      sent: where pictures go.

    Raises:
      UserError: Gradio is missing, or the server does not start.
    """
    self.runs = found
    self.uploads = sent
    self._stack = contextlib.ExitStack()
    try:
      self._stack.enter_context(_environment(SETTINGS | {'GRADIO_TEMP_DIR': str(sent.folder)}))
      self._blocks = self._serve(port, host)
    except BaseException:
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
    from googlenet_jax.page import layout

    blocks = layout.build(self.runs, self.uploads)
    blocks.queue(max_size=WAITING)
    layers = guard.middleware(self.uploads, is_open=not addresses.is_of_this_machine(host))
    try:
      blocks.launch(
        server_name=f'[{host}]' if ':' in host else host,  # it becomes a part of an address
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=uploads.MOST_BYTES,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        root_path='',
        app_kwargs={'middleware': layers, 'docs_url': None, 'redoc_url': None},
        theme=gradio.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']),
        head=layout.HEAD,
      )
    except (OSError, RuntimeError, ValueError) as error:
      raise UserError(f'the page cannot be served at {host}, port {port}: {reason(error)}') from error
    return blocks

  def close(self) -> None:
    """Ends the server and the work in the background, for a program that goes on."""
    for run in self.runs:
      run.close()
    self._blocks.close(verbose=False)
    self.uploads.forget()
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
