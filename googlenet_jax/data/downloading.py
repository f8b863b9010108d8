"""Limits for downloads: a server that does not answer, or only drips, ends in one line and not in a long silence.

TFDS downloads through requests, which chooses the proxy and waits for ever. So requests gets limits for a while.
"""

import contextlib
import logging
import time
from collections.abc import Iterator

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 20.0  # between two pieces of an answer
SLOW_SECONDS, LEAST_BYTES = 60.0, 60_000  # an answer must bring so many bytes in this time
RETRIES, RECONNECTS = 2, 1  # TFDS has 10, which take minutes


class Received:
  """Counts bytes. It is true enough for a line on the screen if several threads add."""

  def __init__(self):
    """Begins at zero."""
    self.bytes = 0

  def __str__(self) -> str:
    return f'{self.bytes / 1e6:.1f} MB received'


@contextlib.contextmanager
def limits() -> Iterator[Received]:
  """Gives every request of this process limits inside the block, and counts what comes.

  What breaks a limit raises `requests.exceptions.RequestException`, as requests' own limits do.
  """
  from requests import adapters

  received, original = Received(), adapters.HTTPAdapter.send
  logger = logging.getLogger('urllib3')  # it warns of every attempt; the last error says the same
  level = logger.level

  def send(adapter, request, *arguments, **options):
    options['timeout'] = options.get('timeout') or (CONNECT_SECONDS, SILENT_SECONDS)
    retries = adapter.max_retries
    total, connect = min(retries.total or 0, RETRIES), min(retries.total or 0, RECONNECTS)
    # A server may ask to come back in an hour.
    adapter.max_retries = retries.new(total=total, connect=connect, respect_retry_after_header=False)
    response = original(adapter, request, *arguments, **options)
    response.iter_content = lambda *_, **__: _pieces(response.raw, received)
    return response

  adapters.HTTPAdapter.send = send
  logger.setLevel(logging.ERROR)
  try:
    yield received
  finally:
    adapters.HTTPAdapter.send = original
    logger.setLevel(level)


def _pieces(raw, received: Received) -> Iterator[bytes]:
  """Yields the body of an answer as it comes. `Response.iter_content` waits until a piece is full."""
  from requests import exceptions
  from urllib3.exceptions import HTTPError

  begin, own = time.monotonic(), 0
  try:
    while piece := raw.read1(1 << 16, decode_content=True):
      received.bytes += len(piece)
      own += len(piece)
      if time.monotonic() - begin > SLOW_SECONDS:
        if own < LEAST_BYTES:
          raise exceptions.ConnectionError(f'only {own} bytes came in {SLOW_SECONDS:g} s')
        begin, own = time.monotonic(), 0
      yield piece
  except HTTPError as error:
    raise exceptions.ConnectionError(error) from error
