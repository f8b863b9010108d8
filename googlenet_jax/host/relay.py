"""Passes on JAX's connection with process 0, and keeps it open when process 0 ends.

When this connection closes, JAX aborts a process from C++ at once, with a page of text and no setting against it. With
the relay JAX sees silence instead, and `peers.py` has the time to end the process with a line.
"""

import contextlib
import socket
import threading

CHUNK = 2**16  # bytes


def start(host: str, port: int) -> int:
  """Starts to pass connections on to `host`, until the process ends.

  Returns:
    The port of this machine to connect to instead.
  """
  server = socket.create_server(('127.0.0.1', 0))
  threading.Thread(target=_serve, args=(server, (host, port)), daemon=True).start()
  return server.getsockname()[1]


def _serve(server: socket.socket, address: tuple[str, int]) -> None:
  while True:
    near, _ = server.accept()
    try:
      far = socket.create_connection(address)
    except OSError:  # process 0 does not listen yet: JAX tries again
      near.close()
      continue
    threading.Thread(target=_pass_on, args=(near, far, True), daemon=True).start()
    threading.Thread(target=_pass_on, args=(far, near, False), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket, closes: bool) -> None:
  with contextlib.suppress(OSError):
    while data := source.recv(CHUNK):
      target.sendall(data)
  if closes:
    with contextlib.suppress(OSError):
      target.shutdown(socket.SHUT_RDWR)  # the other thread reads from it, and a close alone would wait for that
    target.close()
