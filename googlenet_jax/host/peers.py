"""What the processes of a program tell each other beside JAX, over a connection of each one with process 0.

JAX connects the processes, too. But where one never comes, or dies, JAX aborts the others from C++ after minutes, or
lets them wait. These connections are made before JAX's. The system closes them when a process ends, however it ends. So
the others learn of it at once, and end with a line that says why.
"""

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from googlenet_jax.host.clusters import Place
from googlenet_jax.host.errors import UserError, one_line

GRACE = 1.0  # seconds for a process to report by itself what another one has reported
HELLO_SECONDS = 5.0  # for the first line on a connection
RETRY_SECONDS = 0.2
# A host is lost if it is silent for 10 s and then leaves 4 questions open, one every 5 s; or if it does not take what
# it is sent for 30 s (in milliseconds).
KEEPALIVE = {'TCP_KEEPIDLE': 10, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 4, 'TCP_USER_TIMEOUT': 30_000}
MOST_BYTES = 2**20  # of the first line


class Channel:
  """A connection that carries JSON objects, each as a line."""

  def __init__(self, connection: socket.socket):
    """Takes an open connection."""
    self.socket = connection
    self._lines = connection.makefile('rb')
    self._sending = threading.Lock()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
      if hasattr(socket, name):  # not on all systems
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

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


# Meeting -------------------------------------------------------------------------------------------------------------


def meet(place: Place, hello: dict[str, Any], seconds: float) -> tuple[dict[int, Channel], list[dict[str, Any]]]:
  """Connects every process with process 0, which checks that all belong together.

  Args:
    place: the place of this process.
    hello: what all must know of this process: `host`, and `versions`, which must be equal everywhere.
    seconds: how long to wait for the others.

  Returns:
    The connections, by process: of process 0 with all others, or of another with process 0. And the `hello` of all.

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
            f'{_numbers(missing)} of {place.count} did not come to {place.coordinator} within {seconds:g} s: see what '
            f'they printed, whether they can reach this host and port, and --start_timeout{elsewhere}'
          )
        ready, _, _ = select.select([server, *(channel.socket for channel in channels.values())], [], [], left)
        for number, channel in channels.items():
          if channel.socket in ready:  # nobody speaks before all have come
            raise UserError(f'{name(number, hellos[number])} has ended before all had come; see what it printed')
        if server in ready:
          channel, theirs = _greet(server.accept()[0])
          if channel is not None:
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
  port = int(place.coordinator.rpartition(':')[2])
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
  host, _, port = place.coordinator.rpartition(':')
  try:
    socket.create_connection((host.strip('[]'), int(port)), timeout=HELLO_SECONDS).close()
    return True
  except OSError:
    return False


def _greet(connection: socket.socket) -> tuple[Channel | None, dict[str, Any]]:
  """Reads the first line of a connection; None for a stranger, such as a scanner of ports."""
  channel = Channel(connection)
  try:
    hello = channel.receive(HELLO_SECONDS, MOST_BYTES)
    if hello and type(hello.get('index')) is int and isinstance(hello.get('versions'), dict):
      return channel, hello
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
  host, _, port = place.coordinator.rpartition(':')
  while True:
    left = deadline - time.monotonic()
    try:
      return Channel(socket.create_connection((host.strip('[]'), int(port)), timeout=max(left, RETRY_SECONDS)))
    except OSError as error:  # names of hosts may come late, too
      if left < RETRY_SECONDS:
        raise UserError(
          f'process {place.index} cannot reach process 0 at {place.coordinator} within {seconds:g} s '
          f'({error.strerror or error}): see whether it runs there, and whether the port is open'
        ) from error
    time.sleep(RETRY_SECONDS)


def name(number: int, hello: dict[str, Any]) -> str:
  """Names a process, such as `process 3 on node7`."""
  return f'process {number} on {one_line(str(hello["host"]))}'


def _numbers(missing: Sequence[int]) -> str:
  shown = ', '.join(map(str, missing[:8])) + (f' and {len(missing) - 8} more' if len(missing) > 8 else '')
  return f'process{"es" if len(missing) > 1 else ""} {shown}'


# Afterwards ----------------------------------------------------------------------------------------------------------


class Peers:
  """The other processes. Threads listen to them: process 0 to all, each other one to process 0."""

  def __init__(self, index: int, names: Sequence[str], channels: dict[int, Channel], end: Callable[[str, bool], Any]):
    """Begins to listen.

    Args:
      index: number of this process.
      names: of all processes.
      channels: from `meet`.
      end: called in a thread if another process has ended; it must end this one. Its arguments are a text, and
        whether the other process was killed or lost.
    """
    self._index, self._names, self._channels, self._end = index, names, channels, end
    self._changed = threading.Condition()  # guards what follows
    self._left: set[int] = set()  # processes that have nothing more to do
    self._agreed: set[int] = set()  # processes that know when to stop
    self._texts: dict[int, str] = {}  # why processes failed
    self._ending = False  # whether this process says why it ends
    self._wanted = self._signal = 0  # a signal that some process got; the one that all stop for
    self._calls, self._stop_at = 0, None  # of the training step
    self._values: dict[int, Any] = {}  # what processes have sent to `gather`
    for number, channel in channels.items():
      threading.Thread(target=self._listen, args=(number, channel), daemon=True).start()

  def _listen(self, number: int, channel: Channel) -> None:
    try:
      while message := channel.receive():
        self._hear(number, message)
    except ValueError:
      pass  # as if it had ended
    with self._changed:
      lost = number not in self._left and number not in self._texts
    if lost:
      self._fail_because_of(number, '')

  def _hear(self, number: int, message: dict[str, Any]) -> None:
    if 'failed' in message:
      self._fail_because_of(message['failed'], message['text'])
    with self._changed:
      if 'left' in message:
        self._left.add(number)
      if 'signal' in message and not self._wanted:
        self._want(message['signal'])
      if 'stop_at' in message:
        self._stop_at, self._signal = message['stop_at'], message['of']
        self._channels[0].send(agreed=True)
      if 'agreed' in message:
        self._agreed.add(number)
      if 'value' in message:
        self._values[number] = message['value']
      self._changed.notify_all()

  def _tell(self, **message: Any) -> None:
    """Tells process 0; or, in process 0, all others."""
    for channel in self._channels.values():
      channel.send(**message)

  # The end of one is the end of all.

  def _fail_because_of(self, number: int, text: str) -> None:
    """Ends this process after another one has ended."""
    with self._changed:
      self._texts[number] = text
      self._changed.notify_all()
      if self._ending:
        return
    if self._index == 0:
      self._tell(failed=number, text=text)
    if text:
      time.sleep(GRACE)  # this process may have the same trouble
    with self._changed:
      if self._ending:
        return
      self._ending = True
    why = text or 'it was killed, or its host or its connection was lost; the same command continues'
    self._end(f'{self._names[number]} has ended: {why}', not text)

  def fail(self, text: str) -> bool:
    """Tells the others that this process ends because of a trouble, and which.

    Returns:
      Whether this process must say it. Process 0 says it for all that have the same trouble.
    """
    with self._changed:
      self._changed.wait_for(lambda: self._texts, GRACE)
      if set(self._texts.values()) - {text}:  # the cause: a thread ends this process, and says it
        self._changed.wait_for(lambda: False, 10 * GRACE)
      self._ending = True
    self._tell(failed=self._index, text=text)
    with self._changed:
      return self._index == 0 or not self._changed.wait_for(lambda: self._texts.get(0) == text, GRACE)

  def tell(self, text: str) -> None:
    """Tells the others why this process ends now."""
    self._tell(failed=self._index, text=text)

  def leave(self) -> None:
    """Waits until all processes have nothing more to do."""
    if self._index:
      self._tell(left=True)
    with self._changed:
      self._changed.wait_for(lambda: self._left >= set(self._channels))
      self._ending = True
    if self._index == 0:
      self._tell(left=True)

  def gather(self, value: Any) -> list[Any]:
    """Returns the values of all processes, in their order. All of them must call it, and wait for the last one.

    Args:
      value: what JSON can say.
    """
    if self._index:
      self._tell(value=value)
    with self._changed:
      self._changed.wait_for(lambda: self._values.keys() >= set(self._channels))
      values, self._values = self._values, {}
    if self._index:
      return values[0]
    everyone = [json.loads(json.dumps(value)), *(values[number] for number in sorted(values))]
    self._tell(value=everyone)
    return everyone

  # A signal to one is a signal to all.

  def signal_of_any(self, signal: int) -> int:
    """Returns the number of a signal that some process got, or 0; for processes that train apart.

    Args:
      signal: number of the signal that this process got, or 0.
    """
    with self._changed:
      if signal and not self._wanted:
        self._want(signal)
      return self._wanted

  def _want(self, signal: int) -> None:
    self._wanted = signal
    self._tell(signal=signal)  # process 0 tells the others

  def asked_to_stop(self, signal: int, ahead: int) -> int:
    """Returns the number of the signal for which all processes stop now, or 0. All stop after the same call.

    Every process asks this after each call of the training step. Process 0 decides after which call to stop. It goes
    on when all know it: until then no process can be further, because each step needs all of them.

    Args:
      signal: number of the signal that this process got, or 0.
      ahead: how many calls a process may start before an earlier one has ended.
    """
    self._calls += 1
    with self._changed:
      if signal and not self._wanted:
        self._want(signal)
      decides = self._index == 0 and self._wanted and self._stop_at is None
      if decides:
        self._stop_at, self._signal = self._calls + ahead + 1, self._wanted
    if decides:
      self._tell(stop_at=self._stop_at, of=self._signal)
      with self._changed:
        self._changed.wait_for(lambda: self._agreed >= set(self._channels))
    with self._changed:
      return self._signal if self._stop_at == self._calls else 0
