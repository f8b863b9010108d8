"""How the processes of a program meet: each connects with process 0, before JAX connects them.

JAX aborts a process from C++ after minutes if another one does not come. Here everybody waits for a limited time, and
then ends with a line that says who is missing or does not belong here.
"""

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from googlenet_jax.host.clusters import Place
from googlenet_jax.host.errors import UserError, one_line

HELLO_SECONDS = 5.0  # for the first line on a connection
RETRY_SECONDS = 0.2
TRY_SECONDS = 5.0  # for one try to connect
MOST_BYTES = 2**20  # the longest first line
HELLO = {'index': int, 'count': int, 'host': str, 'job': str, 'versions': dict}  # what it holds


class Channel:
  """A connection that carries JSON objects, each as a line."""

  def __init__(self, connection: socket.socket):
    """Takes an open connection."""
    self.socket = connection
    self._lines = connection.makefile('rb')
    self._sending = threading.Lock()

  def send(self, **message: Any) -> None:
    """Sends an object. Nothing is raised if the connection is closed: whoever receives learns that."""
    with self._sending, contextlib.suppress(OSError):
      self.socket.sendall(json.dumps(message).encode() + b'\n')

  def receive(self, seconds: float | None = None, most: int = -1) -> dict[str, Any] | None:
    """Returns the next object; None at the end of the connection.

    Args:
      seconds: how long to wait for it.
      most: bytes that it may have; -1: any number.

    Raises:
      TimeoutError: nothing came in so many seconds.
      ValueError: something else than a JSON object came.
    """
    try:
      self.socket.settimeout(seconds)
      line = self._lines.readline(most)
    except TimeoutError:
      raise
    except OSError:  # such as a lost host, or closed here
      return None
    if not line:
      return None
    message = json.loads(line)
    if not isinstance(message, dict):
      raise ValueError('no object')
    return message

  def close(self) -> None:
    """Closes the connection."""
    with contextlib.suppress(OSError):
      self.socket.shutdown(socket.SHUT_RDWR)  # also ends the thread that receives
    self._lines.close()
    self.socket.close()


def meet(place: Place, hello: dict[str, Any], seconds: float) -> tuple[dict[int, Channel], list[dict[str, Any]]]:
  """Connects every process with process 0, which checks that all belong together.

  Args:
    place: the place of this process.
    hello: what all must know of this process: `host`; `job`, which other programs at the same port do not have; and
      `versions`, which must be equal everywhere.
    seconds: how long to wait for the others.

  Returns:
    The connections by number of the other process, and the `hello` of all. Process 0 is connected with all others, and
    each of these with process 0 only.

  Raises:
    UserError: in every process that came; says who did not come, or what is wrong.
  """
  hello = {**hello, 'index': place.index, 'count': place.count}
  deadline = time.monotonic() + seconds
  return _receive_all(place, hello, seconds, deadline) if place.index == 0 else _come(place, hello, seconds, deadline)


def _receive_all(place: Place, hello: dict[str, Any], seconds: float, deadline: float):
  """Process 0: waits for the others."""
  channels, hellos = {}, {0: hello}
  with _listening(place) as server:
    try:
      while len(hellos) < place.count:
        left = deadline - time.monotonic()
        missing = sorted(set(range(place.count)) - set(hellos))
        if left <= 0:
          elsewhere = '' if _answers(place) else f'; process 0, on {hello["host"]}, cannot reach itself there either'
          raise UserError(
            f'{_numbers(missing)} of {place.count} did not come to {place.coordinator} within {seconds:g} s: read what '
            f'{"they" if missing[1:] else "it"} printed, see whether this address was given there too, or wait longer '
            f'with --start_timeout{elsewhere}'
          )
        ready, _, _ = select.select([server, *(channel.socket for channel in channels.values())], [], [], left)
        for number, channel in channels.items():
          if channel.socket in ready:  # nobody speaks before all have come
            raise UserError(f'{name(number, hellos[number])} has ended before all had come; see what it printed')
        if server in ready:
          channel, theirs = _greet(server.accept()[0])
          if channel is not None and theirs['job'] != hello['job']:
            channel.send(refused=f'process 0 at {place.coordinator} belongs to another job: give another port')
            channel.close()
          elif channel is not None:
            if text := _objection(theirs, hellos, place.count):
              channel.send(refused=text)
              channel.close()
              raise UserError(text)
            hellos[theirs['index']], channels[theirs['index']] = theirs, channel
    except UserError as error:
      for channel in channels.values():
        channel.send(refused=str(error))
        channel.close()
      raise
  everyone = [hellos[number] for number in range(place.count)]
  for channel in channels.values():
    channel.send(everyone=everyone)
  return channels, everyone


@contextlib.contextmanager
def _listening(place: Place) -> Iterator[socket.socket]:
  _, port = place.address
  dual = socket.has_dualstack_ipv6()
  try:
    server = socket.create_server(
      ('', port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=place.count
    )
  except OSError as error:
    raise UserError(
      f'process 0 cannot listen on port {port} ({error.strerror}): give another port in --coordinator=HOST:PORT; if '
      'another process 0 runs on this host, give each its own --process_id'
    ) from error
  with server:
    yield server


def _answers(place: Place) -> bool:
  """Returns whether process 0 reaches itself at its own address."""
  try:
    socket.create_connection(place.address, timeout=HELLO_SECONDS).close()
    return True
  except OSError:
    return False


def _greet(connection: socket.socket) -> tuple[Channel | None, dict[str, Any]]:
  """Reads the first line of a connection; None for a stranger, such as a scanner of ports."""
  channel = Channel(connection)
  try:
    hello = channel.receive(HELLO_SECONDS, MOST_BYTES)
    if hello and all(isinstance(hello.get(key), kind) for key, kind in HELLO.items()):
      return channel, hello
    if hello:
      channel.send(refused='process 0 does not understand this process: install the same version everywhere')
  except (ValueError, OSError):
    pass  # not one of ours
  channel.close()
  return None, {}


def _objection(theirs: dict[str, Any], hellos: dict[int, dict[str, Any]], count: int) -> str:
  """Says why a process does not belong to those that have come; empty if it does."""
  number, ours = theirs['index'], hellos[0]
  who, text = name(number, theirs), ''
  if theirs['count'] != count:
    text = f'{who} was started as one of {theirs["count"]} processes, and process 0 as one of {count}'
  elif number in hellos:
    places = f'on {hellos[number]["host"]} and on {theirs["host"]}'
    text = f'there are two processes {number}, {places}: give each its own --process_id'
  for package, version in ours['versions'].items():
    other = theirs['versions'].get(package)
    if other != version and not text:
      text = f'{package} is {version} in process 0 on {ours["host"]}, and {other} in {who}: install the same everywhere'
  return text


def _come(place: Place, hello: dict[str, Any], seconds: float, deadline: float):
  """Another process: connects with process 0."""
  channel = _connected(place, seconds, deadline)
  channel.send(**hello)
  try:
    answer = channel.receive(max(deadline - time.monotonic(), 0) + 2 * HELLO_SECONDS)
  except TimeoutError:
    answer = {'refused': f'process 0 at {place.coordinator} did not answer within {seconds:g} s'}
  except ValueError:
    answer = {'refused': f'what answers at {place.coordinator} is not process 0 of this program'}
  if answer is None:
    answer = {'refused': f'process 0 at {place.coordinator} has ended; see what it printed'}
  if 'everyone' not in answer:
    channel.close()
    raise UserError(str(answer.get('refused')))
  return {0: channel}, answer['everyone']


def _connected(place: Place, seconds: float, deadline: float) -> Channel:
  while True:
    left = deadline - time.monotonic()
    try:
      seconds_now = min(max(left, RETRY_SECONDS), TRY_SECONDS)
      return Channel(socket.create_connection(place.address, timeout=seconds_now))
    except OSError as error:  # names of hosts may come late, too
      if left < RETRY_SECONDS:
        raise UserError(
          f'process 0 cannot be reached at {place.coordinator} within {seconds:g} s ({error.strerror or error}): see '
          'whether it runs there, with the same --coordinator'
        ) from error
    time.sleep(RETRY_SECONDS)


def name(number: int, hello: dict[str, Any]) -> str:
  """Names a process, such as `process 3 on node7`."""
  return f'process {number} on {one_line(str(hello["host"]))}'


def _numbers(missing: Sequence[int]) -> str:
  shown = ', '.join(map(str, missing[:8])) + (f' and {len(missing) - 8} more' if len(missing) > 8 else '')
  return f'process{"es" if len(missing) > 1 else ""} {shown}'
