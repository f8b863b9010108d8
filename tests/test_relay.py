"""JAX's connection with process 0 stays open when process 0 ends."""

import socket
import threading
import time

import pytest

from googlenet_jax.host import relay


def test_bytes_pass_both_ways_and_the_end_of_the_far_side_is_not_seen():
  with socket.create_server(('127.0.0.1', 0)) as server:
    near = socket.create_connection(('127.0.0.1', relay.start(*server.getsockname())), timeout=60)
    far, _ = server.accept()
    near.sendall(b'question')
    assert far.recv(100) == b'question'
    far.sendall(b'answer')
    assert near.recv(100) == b'answer'
    far.close()
    near.settimeout(0.3)
    with near, pytest.raises(TimeoutError):  # not b'', which is the end
      near.recv(100)


def test_the_end_of_the_near_side_is_passed_on():
  with socket.create_server(('127.0.0.1', 0)) as server:
    near = socket.create_connection(('127.0.0.1', relay.start(*server.getsockname())), timeout=60)
    far, _ = server.accept()
    near.sendall(b'question')
    assert far.recv(100) == b'question'
    far.sendall(b'answer')
    assert near.recv(100) == b'answer'  # so both threads are reading
    time.sleep(0.1)
    near.close()
    far.settimeout(60)
    with far:
      assert far.recv(100) == b''


def test_a_connection_is_closed_while_process_0_does_not_listen():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = free.getsockname()
  port = relay.start(*address)
  with socket.create_connection(('127.0.0.1', port), timeout=60) as near:
    assert near.recv(100) == b''
  assert any(thread.name.endswith('(_serve)') for thread in threading.enumerate())  # it goes on
