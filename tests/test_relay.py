"""JAX's connection with process 0 stays open when process 0 ends."""

import socket
import threading
import time

import pytest

from googlenet_jax.host import relay


@pytest.fixture
def ends():
  """Both ends of a connection through the relay, which has passed bytes both ways, so both its threads are reading."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    near = socket.create_connection(('127.0.0.1', relay.start(*server.getsockname())), timeout=60)
    far, _ = server.accept()
    near.sendall(b'question')
    assert far.recv(100) == b'question'
    far.sendall(b'answer')
    assert near.recv(100) == b'answer'
    with near, far:
      yield near, far


def test_the_end_of_the_far_side_is_not_seen(ends):
  near, far = ends
  far.close()
  near.settimeout(0.3)
  with pytest.raises(TimeoutError):  # not b'', which is the end
    near.recv(100)


def test_the_end_of_the_near_side_is_passed_on(ends):
  near, far = ends
  time.sleep(0.1)  # until both threads read again
  near.close()
  far.settimeout(60)
  assert far.recv(100) == b''


def test_a_connection_is_closed_while_process_0_does_not_listen():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = free.getsockname()
  port = relay.start(*address)
  with socket.create_connection(('127.0.0.1', port), timeout=60) as near:
    assert near.recv(100) == b''
  assert any(thread.name.endswith('(_serve)') for thread in threading.enumerate())  # it goes on
