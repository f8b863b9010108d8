import json
import re
import subprocess
import sys

import pytest

from googlenet_jax.host import console


def record(step, split='train'):
  numbers = {'epoch': step / 10, 'loss': 0.5, 'accuracy': 0.75, 'learning_rate': 0.01, 'examples_per_second': 100.0}
  return {'step': step, 'split': split, **numbers}


def test_lines_that_are_no_records_are_dropped_from_the_log(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  good = [json.dumps(record(step)).encode() for step in (1, 2, 3)]
  damaged = [
    b'\xff\x00\xfe',
    b'{}',
    b'5',
    b'[]',
    b'null',
    b'{"step": 2}',
    json.dumps({**record(2), 'step': '2'}).encode(),
  ]
  path.write_bytes(b'\n'.join([good[0], *damaged, good[1], good[2], good[2][:20]]))
  log = console.MetricsLog(tmp_path, 2)  # what came after step 2, the last checkpoint, will be done again
  log.write(record(4))
  log.close()
  assert [json.loads(line) for line in path.read_text().splitlines()] == [record(1), record(2), record(4)]
  assert log.records == [record(1), record(2), record(4)]


def test_the_log_is_never_half_written(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(json.dumps(record(1)) + '\n')

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr('pathlib.Path.replace', killed)
  with pytest.raises(KeyboardInterrupt):
    console.MetricsLog(tmp_path, 1)
  assert json.loads(path.read_text()) == record(1)


@pytest.mark.parametrize('piped', ['stdout', 'stderr', None])
def test_lines_are_written_unless_a_terminal_shows_the_bar(piped, monkeypatch, capsys):
  for name in ('stdout', 'stderr'):
    monkeypatch.setattr(getattr(sys, name), 'isatty', lambda name=name: name != piped)
  progress = console.Progress(0, 20, 10)
  progress.show(record(5))
  progress.close()
  line = 'step 5/20 epoch 0.50/2: loss 0.500, acc 0.750, 100.0 examples/s\n'
  assert capsys.readouterr().out == ('' if piped is None else line)


def test_only_what_the_last_line_says_anyway_is_kept_off_the_screen():
  code = """
import atexit, threading
from googlenet_jax.host import console
console.quieten_libraries()

class Unraisable:
  def __init__(self, error):
    self.error = error
  def __del__(self):
    raise self.error

for error in RuntimeError('Event loop is closed'), RuntimeError('told: another'), OSError(28, 'told: no writer'):
  Unraisable(error)

def fail(text):
  raise OSError(28, text)

for module, text in (('tensorboardX.event_file_writer', 'No space left'), ('orbax', 'told')):
  class Writer(threading.Thread):
    __module__ = module
    def run(self):
      fail(f'{text}: thread')
  thread = Writer()
  thread.start()
  thread.join()
  def cleanup(text=text):
    fail(f'{text}: at exit')
  cleanup.__module__ = module
  atexit.register(cleanup)
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=200)
  errors = re.findall(r'^\w+Error: (.*)', done.stderr, re.MULTILINE)
  assert errors == [
    'told: another',
    '[Errno 28] told: no writer',
    '[Errno 28] told: thread',
    '[Errno 28] told: at exit',
  ]
