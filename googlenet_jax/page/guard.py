"""What the page's server refuses, though Gradio would do it: to fetch from other hosts for whoever asks."""

from typing import Any

OUTWARD = ('/file=http:', '/file=https:', '/proxy=', '/file=//')


def middleware() -> list[Any]:
  """Returns the layers that stand before Gradio's routes."""
  from starlette.middleware import Middleware

  return [Middleware(Guard)]


class Guard:
  """Answers 403 to requests by which the server would fetch something from another host."""

  def __init__(self, app: Any):
    """Stands before an ASGI application."""
    self._app = app

  async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Handles a request."""
    path = scope.get('path', '').lower()
    if scope['type'] == 'http' and any(part in path for part in OUTWARD):
      await send({'type': 'http.response.start', 'status': 403, 'headers': [(b'content-type', b'text/plain')]})
      await send({'type': 'http.response.body', 'body': b'This page fetches nothing from other hosts.'})
      return
    await self._app(scope, receive, send)
