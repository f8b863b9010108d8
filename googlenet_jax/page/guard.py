"""What the page's server refuses, though Gradio would do it."""

import re
import urllib.parse
from typing import Any

from googlenet_jax.page import addresses, uploads
from googlenet_jax.page.uploads import Uploads

OUTWARD = ('/file=http:', '/file=https:', '/proxy=', '/file=//')  # the server would fetch from another host
# The page sends only this to Gradio. Other requests may write files outside the folder of uploads.
UPLOAD = '/gradio_api/upload'
SENT = re.compile(rf'{UPLOAD}|/gradio_api/(cancel|reset|queue/join|(call|run)/.*)')
AROUND = 1 << 16  # bytes of a request around a file


def middleware(found: Uploads, is_open: bool) -> list[Any]:
  """Returns the layers that stand before Gradio's routes.

  Args:
    found: where uploads go.
    is_open: whether other machines can reach the page.
  """
  from starlette.middleware import Middleware

  return [Middleware(Guard, found=found, is_open=is_open)]


class Guard:
  """Refuses requests that read or write what is not theirs."""

  def __init__(self, app: Any, found: Uploads, is_open: bool):
    """Stands before an ASGI application; see `middleware`."""
    self._app, self._uploads, self._is_open = app, found, is_open

  async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Handles a request."""
    if scope['type'] == 'lifespan':
      await self._app(scope, receive, send)
    elif scope['type'] == 'http':  # Gradio has no other kind
      await self._handle(scope, receive, send)

  async def _handle(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
    headers, path = dict(scope['headers']), scope['path'].lower()
    if not self._is_open and not _is_here(headers.get(b'host', b'')):
      # Another site can give its name the address of this machine, and then read the page in the user's browser.
      await _refuse(send, 403, 'This page is for this machine only: open it at 127.0.0.1 or localhost.')
    elif any(part in path for part in OUTWARD):
      await _refuse(send, 403, 'This page fetches nothing from other hosts.')
    elif scope['method'] in ('GET', 'HEAD', 'OPTIONS'):
      await self._app(scope, receive, send)
    elif headers.get(b'sec-fetch-site') == b'cross-site':  # it cannot read the answer, but could fill the room
      await _refuse(send, 403, 'This page takes nothing from pages of other sites.')
    elif not SENT.fullmatch(path.rstrip('/')):
      await _refuse(send, 403, 'This page does not take that.')
    else:
      await self._take(scope, receive, send, headers.get(b'content-length', b'').decode('latin-1'))

  async def _take(self, scope: dict[str, Any], receive: Any, send: Any, length: str) -> None:
    """Handles a request that sends something: at most a file, and a file only while there is room."""
    most = uploads.MOST_BYTES + AROUND
    size = min(int(length), most) if length.isdecimal() else most
    size = size if scope['path'].lower().startswith(UPLOAD) else 0
    if size and not self._uploads.begin(size):
      await _refuse(send, 503, 'Too many pictures are waiting: try again in a few minutes.')
      return
    from starlette.requests import ClientDisconnect

    async def receive_bounded() -> dict[str, Any]:
      nonlocal most
      message = await receive()
      most -= len(message.get('body', b''))
      return message if most >= 0 else {'type': 'http.disconnect'}

    try:
      await self._app(scope, receive_bounded, send)
    except ClientDisconnect:  # nobody waits for the answer, or it is this:
      if most < 0:
        await _refuse(send, 413, f'A request exceeds the maximum allowed size of {uploads.MOST_BYTES} bytes.')
    finally:
      self._uploads.end(size)


def _is_here(host: bytes) -> bool:
  """Returns whether the header Host names this machine, at any port: it may be forwarded."""
  try:
    name = urllib.parse.urlsplit(f'//{host.decode("latin-1")}').hostname
  except ValueError:
    return False
  return name is not None and addresses.is_of_this_machine(name)


async def _refuse(send: Any, status: int, text: str) -> None:
  await send({'type': 'http.response.start', 'status': status, 'headers': [(b'content-type', b'text/plain')]})
  await send({'type': 'http.response.body', 'body': text.encode()})
