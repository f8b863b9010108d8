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

  def come(place, index, count, versions, job='7.0'):
    try:
      where = clusters.Place(f'127.0.0.1:{port}', count, index, 'the flags')
      hello = {'host': f'node{place}', 'job': job, 'versions': versions}
      found[place] = meeting.meet(where, hello, seconds)
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
  assert first == (
    f'process 1 of 3 did not come to 127.0.0.1:{port} within 1 s: read what it printed, see whether this address was '
    'given there too, or wait longer with --start_timeout'
  )
  assert time.monotonic() - begin < 5


def test_a_coordinator_that_is_not_there_is_named_in_time(port):
  (text,) = meet(port, (1, 2, VERSIONS), seconds=0.5)
  assert text == (
    f'process 0 cannot be reached at 127.0.0.1:{port} within 0.5 s (Connection refused): see whether it runs there, '
    'with the same --coordinator'
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


def test_a_process_of_another_job_is_sent_away_and_disturbs_nobody(port):
  found = []
  first = threading.Thread(target=lambda: found.extend(meet(port, (0, 2, VERSIONS))))
  first.start()
  (stray,) = meet(port, (1, 2, VERSIONS, '8.0'))
  assert stray == f'process 0 at 127.0.0.1:{port} belongs to another job: give another port'
  second = meet(port, (1, 2, VERSIONS))
  first.join()
  assert [sorted(channels) for channels, _ in found + second] == [[1], [0]]
  found += second
  close(found)


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
  other = b'{"refused": "process 0 does not understand this process: install the same version everywhere"}\n'
  assert sorted(answers) == [b'', b'', other]
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
    channel.send(index=1, count=3, host='node7', job='7.0', versions=VERSIONS)
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
  ends = [lambda text, status, index=index: texts[index].append((text, status)) for index in range(3)]
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
    assert texts[index] == [(f'{killed}; the same command continues', peers.LOST)]


def test_a_process_that_fails_says_why_everywhere(team):
  processes, _, texts = team
  processes[1].fail('the disk is full', 2)
  assert wait_for(texts, 0, 2) == {('process 1 on node1: the disk is full', 2)}


def test_each_process_says_a_trouble_that_all_have(team):
  processes, _, texts = team
  threads = [
    threading.Thread(target=lambda index=index: processes[index].fail('no such file', 2)) for index in range(3)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  time.sleep(0.3)
  assert texts == {0: [], 1: [], 2: []}


def test_processes_that_leave_wait_for_the_last_one(team):
  processes, found, texts = team
  threads = [threading.Thread(target=processes[index].leave, daemon=True) for index in (0, 2)]
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
    for call in range(1, 100_000):
      with changed:
        begun[index] = call
        changed.notify_all()
        changed.wait_for(lambda: min(begun) >= call - ahead)  # noqa: B023
      number = processes[index].asked_to_stop(signal.SIGTERM if index in asked and call > 20 else 0, ahead)
      if number:
        stopped[index] = (call, number)
        break
    with changed:
      begun[index] = 1_000_000
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


def test_a_process_that_is_stopped_counts_as_lost(port, monkeypatch):
  monkeypatch.setattr(peers, 'SILENT_SECONDS', 0.5)
  monkeypatch.setattr(peers, 'PING_SECONDS', 0.1)
  found, ended = meet(port, (0, 2, VERSIONS), (1, 2, VERSIONS)), []
  peers.Peers(0, ['process 0 on a', 'process 1 on b'], found[0][0], lambda *what: ended.append(what))  # 1 says nothing
  deadline = time.monotonic() + 5
  while not ended and time.monotonic() < deadline:
    time.sleep(0.01)
  close(found)
  text = 'process 1 on b has ended: it was killed, or its host or its connection was lost; the same command continues'
  assert ended == [(text, 75)]


def test_a_process_that_dies_while_it_waits_for_the_last_one_is_missed(team):
  processes, found, texts = team
  threading.Thread(target=processes[2].leave, daemon=True).start()
  time.sleep(0.1)
  for channel in found[2][0].values():
    channel.send = lambda **_: None
    channel.socket.shutdown(socket.SHUT_RDWR)
  deadline = time.monotonic() + 5
  while not (texts[0] and texts[1]) and time.monotonic() < deadline:
    time.sleep(0.01)
  assert texts[0] == texts[1] != []
  assert texts[0][0][1] == peers.LOST


def test_values_are_exchanged_in_order(team):
  processes, _, _ = team
  found = {}

  def work(index):
    found[index] = [processes[index].gather([index, turn, 'é']) for turn in range(50)]

  threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=10)
  assert found[0] == found[1] == found[2] == [[[index, turn, 'é'] for index in range(3)] for turn in range(50)]


def test_a_process_that_has_nothing_more_to_do_is_not_waited_for(team):
  processes, _, _ = team
  threading.Thread(target=processes[1].leave, daemon=True).start()
  processes[2]._tell(value='more')
  with pytest.raises(UserError) as error:
    processes[0].gather('more')
  assert str(error.value) == (
    'process 1 on node1 has nothing more to do, and process 0 on node0 has: start all with the same command and the '
    'same files'
  )


@pytest.mark.parametrize(
  ('place', 'gpus', 'expected'),
  [
    (1, [['0', '1', '2', '3']] * 2, [2, 3]),
    (3, [['nvidia0', 'nvidia1', 'nvidia2', 'nvidia3']] * 4, [3]),
    (0, [['0', '1'], ['2', '3']], None),  # the launcher has divided them
    (0, [None, None], None),
    (0, [[], []], None),
    (0, [['0', '1']], None),  # one process takes all
    (1, [['0']] * 2, None),  # they share one
  ],
)
def test_the_gpus_of_a_machine_are_divided_unless_the_launcher_did(place, gpus, expected):
  assert distributed.share_of_gpus(place, gpus) == expected


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
