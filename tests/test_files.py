import json
import os
import subprocess
import sys

import jax
import pytest

from googlenet_jax.host import checkpoints, files
from googlenet_jax.host.errors import UserError


@pytest.fixture
def second_process(monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)


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
  files.write_text(path, 'new')  # what the failed write left is no hindrance
  assert path.read_text() == 'new'
  assert list(tmp_path.iterdir()) == [path]


def test_values_that_are_not_json_write_nothing(tmp_path):
  with pytest.raises(TypeError):
    files.write_json(tmp_path / 'a.json', {'a': {1, 2}})
  assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_writes(tmp_path, second_process):
  assert not files.is_writer()
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


def test_json_is_readable_by_other_programs(tmp_path):
  value = {'a': [1, 2.5, None, True], 'b': {'c': 'é'}}
  files.write_json(tmp_path / 'a.json', value)
  assert json.loads((tmp_path / 'a.json').read_text(encoding='utf-8')) == value
