import contextlib
import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest

from googlenet_jax.host import checkpoints, files, processes
from googlenet_jax.host.errors import UserError


@pytest.fixture
def second_process(monkeypatch):
  monkeypatch.setattr(processes, '_index', 1)


def test_json_is_replaced_whole(tmp_path):
  path = tmp_path / 'a.json'
  files.write_json(path, {'a': 1})
  files.write_json(path, {'a': 2})
  assert path.read_text() == '{\n  "a": 2\n}\n'
  assert list(tmp_path.iterdir()) == [path]


def test_text_is_replaced_whole(tmp_path):
  path = tmp_path / 'a.md'
  path.write_text('a longer text than the next')
  files.write_text(path, 'é\n')
  assert path.read_bytes() == 'é\n'.encode()
  assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'a.txt'
  files.write_text(path, 'old')

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr('pathlib.Path.replace', killed)
  with pytest.raises(KeyboardInterrupt):
    files.write_text(path, 'new')
  assert path.read_text() == 'old'
  monkeypatch.undo()

  def half():
    with files.replacing(path) as temporary:
      temporary.write_text('ne')
      assert path.read_text() == 'old'
      assert temporary.parent == path.parent
      raise ValueError('half')

  with pytest.raises(ValueError, match='half'):
    half()
  assert path.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [path]  # on a full disk every byte counts
  files.write_text(path, 'new')
  assert path.read_text() == 'new'
  assert list(tmp_path.iterdir()) == [path]


def test_values_that_are_not_json_write_nothing(tmp_path):
  with pytest.raises(TypeError):
    files.write_json(tmp_path / 'a.json', {'a': {1, 2}})
  assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_writes(tmp_path, second_process):
  files.write_text(tmp_path / 'a.txt', 'text')
  files.write_json(tmp_path / 'a.json', {})
  with files.lock(tmp_path), files.lock(tmp_path):  # the processes of one run share a folder
    pass
  assert list(tmp_path.iterdir()) == []


def test_a_workdir_is_written_by_one_run_at_a_time(tmp_path):
  with files.lock(tmp_path):
    with pytest.raises(UserError, match=f'another run is writing in {tmp_path}: '), files.lock(tmp_path):
      pytest.fail('two runs have the lock')
    checkpoints.Checkpoints(tmp_path, read_only=True).close()  # evaluation needs none
  with files.lock(tmp_path):
    assert [path.name for path in tmp_path.iterdir()] == ['.lock']


def test_a_killed_program_leaves_no_lock(tmp_path):
  code = """
import os, sys, fcntl
file = open(sys.argv[1], 'a')
fcntl.flock(file, fcntl.LOCK_EX)
print('locked', flush=True)
sys.stdin.read()
"""
  with subprocess.Popen(
    [sys.executable, '-c', code, str(tmp_path / '.lock')], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  ) as program:
    assert program.stdout.readline() == b'locked\n'
    with pytest.raises(UserError, match='another run is writing'), files.lock(tmp_path):
      pytest.fail('two programs have the lock')
    program.kill()
    program.wait()
  with files.lock(tmp_path):
    assert os.listdir(tmp_path) == ['.lock']


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_without_locks_a_warning_says_so_and_the_run_begins(number, tmp_path, monkeypatch, capsys):
  def refused(*_):
    raise OSError(number, os.strerror(number))

  if number is None:  # Windows
    monkeypatch.setattr(files, 'fcntl', None)
  else:
    monkeypatch.setattr(files.fcntl, 'flock', refused)
  with files.lock(tmp_path), files.lock(tmp_path):
    pass
  reason = os.strerror(number) if number else 'this system has no flock'
  warning = f'warning: {tmp_path} cannot be locked ({reason}): start no second run there meanwhile\n'
  assert capsys.readouterr().err == warning  # once


def test_other_trouble_of_a_lock_is_an_error(tmp_path, monkeypatch):
  def fails(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  monkeypatch.setattr(files.fcntl, 'flock', fails)
  with pytest.raises(OSError, match='Input/output error'), files.lock(tmp_path):
    pytest.fail('locked')


def test_a_folder_that_takes_no_lock_file_is_one_line(tmp_path, monkeypatch):
  (tmp_path / '.lock').mkdir()
  with pytest.raises(UserError, match=f'^{tmp_path} cannot be written .Is a directory.: give another'):
    files.lock(tmp_path).__enter__()
  (tmp_path / '.lock').rmdir()
  (tmp_path / '.lock').touch()
  open_file = pathlib.Path.open

  def not_ours(self, mode):
    if mode != 'rb':
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return open_file(self, mode)

  monkeypatch.setattr(pathlib.Path, 'open', not_ours)
  with files.lock(tmp_path), pytest.raises(UserError, match='another run is writing'):
    files.lock(tmp_path).__enter__()


def test_two_programs_write_the_same_file_at_the_same_time(tmp_path):
  path = tmp_path / 'a.txt'
  with files.replacing(path) as one, files.replacing(path) as other:
    one.write_text('one')
    other.write_text('other')
  assert path.read_text() == 'one'  # whole; the last to be ready wins
  assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_half_written_is_removed_after_a_while(tmp_path):
  old, new, other = (tmp_path / name for name in (f'{files.TEMPORARY}0a', f'{files.TEMPORARY}0b', 'a.txt'))
  for path in (old, new, other):
    path.touch()
  for path in (old, other):
    os.utime(path, (0, 0))
  with files.lock(tmp_path):
    assert {path.name for path in tmp_path.iterdir()} == {'.lock', new.name, other.name}


def test_space_is_taken_whatever_the_system_offers(tmp_path, monkeypatch):
  path = tmp_path / 'a'
  files.take_space(path, 5 * 2**20)
  assert (path.stat().st_size, path.stat().st_blocks * 512 >= 5 * 2**20) == (5 * 2**20, True)
  for number, raised in ((errno.EOPNOTSUPP, False), (errno.EINVAL, False), (errno.ENOSPC, True)):

    def fails(*_, number=number):
      raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, 'posix_fallocate', fails)
    with pytest.raises(OSError, match='No space left') if raised else contextlib.nullcontext():
      files.take_space(path, 2**20 + 1)
      assert path.stat().st_size == 2 * 2**20
  monkeypatch.delattr(os, 'posix_fallocate')  # macOS
  files.take_space(path, 2**20)
  assert path.stat().st_size == 2**20


def test_json_is_readable_by_other_programs(tmp_path):
  value = {'a': [1, 2.5, None, True], 'b': {'c': 'é'}}
  files.write_json(tmp_path / 'a.json', value)
  assert json.loads((tmp_path / 'a.json').read_text(encoding='utf-8')) == value
