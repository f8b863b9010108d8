"""Folders that several processes share; several real processes are in test_many_processes.py."""

import pytest

from googlenet_jax.host import managers, processes, shared
from googlenet_jax.host.errors import UserError


@pytest.fixture
def two(monkeypatch):
  """`two(see)`: two processes, of which this is the first; the other one sees in a folder what `see(value)` returns."""
  waited = []
  monkeypatch.setattr(processes, 'count', lambda: 2)
  monkeypatch.setattr(shared.time, 'sleep', waited.append)

  def set_other(see):
    monkeypatch.setattr(processes, 'gather', lambda value: [value, value and [see(value[0]), 'host1']])
    return waited

  return set_other


def test_one_process_asks_nobody(tmp_path):
  shared.check(tmp_path / 'missing')
  shared.wait_until_alike(tmp_path, None)


def test_a_folder_that_all_see_alike(two, tmp_path):
  waited = two(lambda value: value)
  shared.check(tmp_path)
  shared.wait_until_alike(tmp_path, lambda: [1, 2])
  assert waited == []
  assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_is_late_is_waited_for(two, tmp_path):
  answers = iter([[], [1], [1, 2]])
  waited = two(lambda _: next(answers))
  shared.wait_until_alike(tmp_path, lambda: [1, 2])
  assert waited == [1.0, 1.0]


def test_a_folder_of_each_host_is_refused(two, tmp_path):
  two(lambda _: False)
  with pytest.raises(UserError, match=f'^{tmp_path} is not shared: process 1 on host1 does not see what process 0 on '):
    shared.check(tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_who_failed_to_save_does_not_wait_for_the_others(monkeypatch):
  met = []
  monkeypatch.setattr(managers.ocp.multihost, 'get_barrier_sync_fn', lambda: lambda **place: met.append(place))
  managers._meet(key='a', timeout_ms=1)
  with pytest.raises(OSError, match='full'):  # noqa: PT012
    try:
      raise OSError('full')
    finally:
      managers._meet(key='b', timeout_ms=1)
  assert met == [{'key': 'a', 'timeout_ms': 1}]
