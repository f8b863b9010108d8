"""Processes that meet, and learn of each other's end: threads and sockets stand for them."""

import signal
import socket
import threading
import time

import pytest

from googlenet_jax.host import clusters, distributed, meeting, peers
from googlenet_jax.host.errors import UserError

VERSIONS = {'googlenet_jax': '0.2.0', 'jax': '0.10.2'}


@pytest.fixture
def port():
  """A free port."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


def meet(port, *comers, seconds=5.0):
  """Lets processes meet, each given as its number, their count and its versions, and returns what each one gets."""
  found = [None] * len(comers)

  def come(place, index, count, versions):
    try:
      where = clusters.Place(f'127.0.0.1:{port}', count, index, 'the flags')
      found[place] = meeting.meet(where, {'host': f'node{place}', 'versions': versions}, seconds)
    except UserError as error:
      found[place] = str(error)

  threads = [threading.Thread(target=come, args=(place, *comer)) for place, comer in enumerate(comers)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=30)
    assert not thread.is_alive()
  return found


def close(found):
  for channels, _ in found:
    for channel in channels.values():
      channel.close()


def test_all_learn_of_all_and_process_0_is_connected_with_each(port):
  found = meet(port, (2, 3, VERSIONS), (0, 3, VERSIONS), (1, 3, VERSIONS))
  assert [sorted(channels) for channels, _ in found] == [[0], [1, 2], [0]]
  for _, everyone in found:
    assert [one['host'] for one in everyone] == ['node1', 'node2', 'node0']
  close(found)


def test_a_process_that_never_comes_is_named_everywhere_in_time(port):
  begin = time.monotonic()
  first, third = meet(port, (0, 3, VERSIONS), (2, 3, VERSIONS), seconds=1.0)
  assert first == third
  assert first.startswith(f'process 1 of 3 did not come to 127.0.0.1:{port} within 1 s: see what')
  assert time.monotonic() - begin < 5


def test_a_coordinator_that_is_not_there_is_named_in_time(port):
  (text,) = meet(port, (1, 2, VERSIONS), seconds=0.5)
  assert text == (
    f'process 1 cannot reach process 0 at 127.0.0.1:{port} within 0.5 s (Connection refused): see whether it runs '
    'there, and whether the port is open'
  )


@pytest.mark.parametrize(
  ('comers', 'expected'),
  [
    (
      [(0, 3, VERSIONS), (1, 3, VERSIONS), (1, 3, VERSIONS)],
      r'there are two processes 1, on node[12] and on node[12]: give each its own --process_id',
    ),
    (
      [(0, 2, VERSIONS), (1, 3, VERSIONS)],
      'process 1 on node1 was started as one of 3 processes, and process 0 as one of 2',
    ),
    (
      [(0, 2, VERSIONS), (1, 2, {**VERSIONS, 'jax': '0.9'})],
      'jax is 0.10.2 in process 0 on node0, and 0.9 in process 1 on node1: install the same everywhere',
    ),
  ],
)
def test_processes_that_do_not_belong_together_are_told_all_the_same(port, comers, expected):
  found = meet(port, *comers)
  assert len(set(found)) == 1
  with pytest.raises(UserError, match=f'^{expected}$'):
    raise UserError(found[0])


def test_two_processes_0_on_one_host(port):
  with socket.create_server(('', port)):
    (text,) = meet(port, (0, 2, VERSIONS))
  assert text.startswith(f'process 0 cannot listen on port {port} (Address already in use')
  assert text.endswith('if another process 0 runs on this host, give each its own --process_id')


def test_strangers_at_the_port_are_sent_away(port):
  answers = []

  def visit(text):
    for _ in range(100):
      try:
        with socket.create_connection(('127.0.0.1', port)) as stranger:
          stranger.sendall(text)
          answers.append(stranger.recv(100))
          return
      except ConnectionRefusedError:
        time.sleep(0.01)

  visitors = [
    threading.Thread(target=visit, args=(text,)) for text in (b'GET / HTTP/1.1\r\n\r\n', b'{"a": 1}\n', b'[]\n')
  ]
  for visitor in visitors:
    visitor.start()
  first = threading.Thread(target=lambda: answers.append(meet(port, (0, 2, VERSIONS))))
  first.start()
  for visitor in visitors:
    visitor.join()
  assert answers == [b''] * 3
  found = meet(port, (1, 2, VERSIONS))
  first.join()
  close(found + answers[-1])


def test_something_else_answers_at_the_address(port):
  def answer(server):
    with server.accept()[0] as connection:
      connection.recv(1000)
      connection.sendall(b'HTTP/1.1 400 Bad Request\r\n\r\n')

  with socket.create_server(('127.0.0.1', port)) as server:
    threading.Thread(target=answer, args=(server,)).start()
    (text,) = meet(port, (1, 2, VERSIONS))
  assert text == f'what answers at 127.0.0.1:{port} is not process 0 of this program'


def test_a_process_that_ends_while_others_are_awaited_is_named(port):
  def come_and_go():
    for _ in range(100):
      try:
        channel = meeting.Channel(socket.create_connection(('127.0.0.1', port)))
        break
      except ConnectionRefusedError:
        time.sleep(0.01)
    channel.send(index=1, count=3, host='node7', versions=VERSIONS)
    time.sleep(0.2)
    channel.close()

  threading.Thread(target=come_and_go).start()
  (text,) = meet(port, (0, 3, VERSIONS))
  assert text == 'process 1 on node7 has ended before all had come; see what it printed'


# Afterwards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def team(port, monkeypatch):
  """Three processes that have met, and the texts with which each was ended."""
  monkeypatch.setattr(peers, 'GRACE', 0.2)
  found = meet(port, *((index, 3, VERSIONS) for index in range(3)))
  texts = {index: [] for index in range(3)}
  names = [meeting.name(index, hello) for index, hello in enumerate(found[0][1])]
  ends = [lambda text, killed, index=index: texts[index].append((text, killed)) for index in range(3)]
  yield [peers.Peers(index, names, found[index][0], ends[index]) for index in range(3)], found, texts
  close(found)


def wait_for(texts, *indices):
  """Waits until these processes were ended, and returns their texts; the others were not."""
  deadline = time.monotonic() + 5
  while not all(texts[index] for index in indices) and time.monotonic() < deadline:
    time.sleep(0.01)
  assert [len(texts[index]) for index in range(3)] == [index in indices for index in range(3)]
  return {texts[index][0] for index in indices}


@pytest.mark.parametrize('victim', [0, 2])
def test_a_killed_process_ends_the_others_at_once(team, victim):
  _, found, texts = team
  others = [index for index in range(3) if index != victim]
  for channel in found[victim][0].values():
    channel.send = lambda **_: None  # it is dead
  for channel in found[victim][0].values():  # as the system does after kill -9
    channel.socket.shutdown(socket.SHUT_RDWR)
  killed = f'process {victim} on node{victim} has ended: it was killed, or its host or its connection was lost'
  texts[victim].clear()
  deadline = time.monotonic() + 5
  while not all(texts[index] for index in others) and time.monotonic() < deadline:
    time.sleep(0.01)
  for index in others:
    assert texts[index] == [(f'{killed}; the same command continues', True)]


def test_a_process_that_fails_says_why_everywhere(team):
  processes, _, texts = team
  assert processes[1].fail('the disk is full')
  assert wait_for(texts, 0, 2) == {('process 1 on node1 has ended: the disk is full', False)}


def test_a_trouble_of_all_is_said_by_process_0_only(team):
  processes, _, texts = team
  said = {}
  threads = [
    threading.Thread(target=lambda index=index: said.update({index: processes[index].fail('no such file')}))
    for index in range(3)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert said == {0: True, 1: False, 2: False}
  assert texts == {0: [], 1: [], 2: []}


def test_processes_that_leave_wait_for_the_last_one(team):
  processes, found, texts = team
  threads = [threading.Thread(target=processes[index].leave) for index in (0, 2)]
  for thread in threads:
    thread.start()
  time.sleep(0.1)
  assert all(thread.is_alive() for thread in threads)
  processes[1].leave()
  for thread in threads:
    thread.join(timeout=5)
    assert not thread.is_alive()
  close(found)
  time.sleep(0.1)
  assert texts == {0: [], 1: [], 2: []}


@pytest.mark.parametrize('asked', [[0], [2], [0, 1, 2]])
def test_after_a_signal_to_some_all_stop_after_the_same_call(team, asked):
  """Each call needs all processes: it ends when all have begun it. A process begins at most `ahead` calls more."""
  processes, _, _ = team
  ahead, begun, changed, stopped = 2, [0, 0, 0], threading.Condition(), {}

  def train(index):
    for call in range(1, 500):
      with changed:
        begun[index] = call
        changed.notify_all()
        changed.wait_for(lambda: min(begun) >= call - ahead)  # noqa: B023
      number = processes[index].asked_to_stop(signal.SIGTERM if index in asked and call > 20 else 0, ahead)
      if number:
        stopped[index] = (call, number)
        break
    with changed:
      begun[index] = 1000
      changed.notify_all()

  threads = [threading.Thread(target=train, args=(index,)) for index in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=20)
  assert set(stopped) == {0, 1, 2}
  assert len(set(stopped.values())) == 1
  assert stopped[0][0] > 20
  assert stopped[0][1] == signal.SIGTERM


# Flags ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('flags', 'text'),
  [
    (('node1', 2, 0), '--coordinator=node1: give host and port of process 0, such as node1:1234'),
    (('node1:99999', 2, 0), '--coordinator=node1:99999: give host and port of process 0, such as node1:1234'),
    (('http://node1:80', 2, 0), '--coordinator=http://node1:80: give host and port of process 0, such as node1:1234'),
    (
      ('node1:80', 2, None),
      '--process_id=I is missing: --coordinator=HOST:PORT, --num_processes=N and --process_id=I go together',
    ),
    (
      ('node1:80', None, 1),
      '--num_processes=N is missing: --coordinator=HOST:PORT, --num_processes=N and --process_id=I go together',
    ),
    (('node1:80', 2, 2), '--process_id=2: processes have the numbers 0 to 1 (--num_processes=2)'),
    ((None, 2, 1), '--coordinator=HOST:PORT is missing: give the host of process 0, and a free port there'),
  ],
)
def test_flags_that_are_wrong(flags, text):
  with pytest.raises(UserError) as error:
    distributed.place(*flags)
  assert str(error.value) == text


def test_flags_that_are_right(monkeypatch):
  monkeypatch.setattr(distributed.os, 'environ', {})
  assert distributed.place('[fe80::1]:80', 3, 1) == ('[fe80::1]:80', 3, 1, 'the flags')
  assert distributed.place('node1:80', 1, 0) is None
  assert distributed.place() is None
