"""Servers that do not answer, or not as they should, end in seconds with a reason."""

import contextlib
import http.server
import threading
import time

import pytest
import requests
from requests import adapters
from urllib3.util.retry import Retry

from googlenet_jax.data import downloading

BODY = b'0123456789' * 10_000


@contextlib.contextmanager
def server(behaviour):
  """A server on this machine; `behaviour(handler, attempt)` answers a request."""
  over, attempts = threading.Event(), []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      attempts.append(self.path)
      with contextlib.suppress(OSError):  # the client has gone
        behaviour(self, over)

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as running:
    running.daemon_threads = False  # its end waits for them
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f'http://127.0.0.1:{running.server_port}/file', attempts
    over.set()
    running.shutdown()


def head(handler, status=200, **headers):
  handler.send_response(status)
  for name, value in {'Content-Length': len(BODY), **headers}.items():
    handler.send_header(name, str(value))
  handler.end_headers()


def silent(handler, over):
  over.wait(9)


def busy(handler, over):
  head(handler, 503, **{'Content-Length': 0, 'Retry-After': 3600})


def dripping(handler, over):
  head(handler)
  while not over.wait(0.02):
    handler.wfile.write(b'.')


def ending_half_way(handler, over):
  head(handler)
  handler.wfile.write(BODY[:50_000])


def stopping_half_way(handler, over):
  head(handler)
  handler.wfile.write(BODY[:50_000])
  over.wait(9)


def slow_but_well(handler, over):
  head(handler)
  for start in range(0, len(BODY), 20_000):
    handler.wfile.write(BODY[start : start + 20_000])
    over.wait(0.08)


def fetch(url):
  with requests.Session() as session:
    retries = Retry(total=10, backoff_factor=0.02, status_forcelist=[503], raise_on_status=True)  # as TFDS does
    session.mount('http://', adapters.HTTPAdapter(max_retries=retries))
    with session.get(url, stream=True) as response:
      return b''.join(response.iter_content(chunk_size=8192))


@pytest.fixture(autouse=True)
def short(monkeypatch):
  monkeypatch.setattr(downloading, 'SILENT_SECONDS', 0.15)
  monkeypatch.setattr(downloading, 'SLOW_SECONDS', 0.2)


@pytest.mark.parametrize(
  ('behaviour', 'text', 'attempts'),
  [
    (silent, 'Read timed out', 3), (busy, 'too many 503 error responses', 3), (dripping, r'only \d+ bytes came', 1),
    (ending_half_way, r'IncompleteRead\(50000 bytes read', 1), (stopping_half_way, 'Read timed out', 1),
  ],
)  # fmt: skip
def test_limits(behaviour, text, attempts):
  begin = time.monotonic()
  with (
    server(behaviour) as (url, asked),
    pytest.raises(requests.exceptions.RequestException, match=text),
    downloading.limits(),
  ):
    fetch(url)
  assert time.monotonic() - begin < 2
  assert len(asked) == attempts


def test_a_slow_server_is_waited_for_and_what_comes_is_counted(monkeypatch):
  original = adapters.HTTPAdapter.send
  with server(slow_but_well) as (url, _), downloading.limits() as received:
    assert fetch(url) == BODY
    assert str(received) == '0.1 MB received'
  assert adapters.HTTPAdapter.send is original


def test_the_proxy_is_the_one_that_requests_chooses(monkeypatch):
  with server(lambda handler, over: (head(handler), handler.wfile.write(BODY))) as (url, asked):
    address = url.split('/')[2]
    monkeypatch.setenv('http_proxy', address)  # without a scheme, as many users write it
    monkeypatch.delenv('no_proxy', raising=False)
    monkeypatch.delenv('NO_PROXY', raising=False)
    with downloading.limits():
      assert fetch('http://data.example/file') == BODY
  assert asked == ['http://data.example/file']
