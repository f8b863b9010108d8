import errno
import fcntl
import io
import os
import re
import select
import subprocess
import sys

import pytest
from helpers import start_main

from googlenet_jax.host import console, progress
from googlenet_jax.host.errors import UserError

RECORD = {'step': 1, 'split': 'train', 'epoch': 0.1, 'loss': 0.5, 'accuracy': 0.75, 'examples_per_second': 100.0}


def unread_pipe():
  reading, writing = os.pipe()
  os.close(reading)
  return open(writing, 'w')


def closed_file(tmp_path):
  stream = (tmp_path / 'closed').open('w')
  stream.close()
  return stream


class Unplugged(io.StringIO):
  """A stream without a file descriptor, whose other end is gone."""

  def write(self, _):
    raise OSError(5, 'Input/output error')


LOST = {
  'pipe': (lambda _: unread_pipe(), 'Broken pipe'),
  'full disk': (lambda _: open('/dev/full', 'w'), 'No space left on device'),  # noqa: SIM115
  'closed': (closed_file, 'I/O operation on closed file.'),
  'closed at the start': (lambda _: None, 'it was closed at the start'),
  'unplugged': (lambda _: Unplugged(), 'Input/output error'),
}


@pytest.mark.parametrize('kind', LOST)
def test_work_goes_on_though_nobody_reads(kind, tmp_path, monkeypatch, capsys):
  make, why = LOST[kind]
  stream = make(tmp_path)
  monkeypatch.setattr(sys, 'stdout', stream)
  monkeypatch.setattr(sys, '__stdout__', stream)
  console.say('one')
  with progress.waiting('compiling'):
    console.say('two')
  bar = progress.Progress(0, 20, 10)
  bar.advance(1)
  bar.show(RECORD)
  bar.close()
  gone = 'the output cannot be written' if kind in ('full disk', 'unplugged') else 'nobody reads the output any more'
  assert capsys.readouterr().err == f'warning: {gone} ({why}); the work goes on\n'
  if stream is not None:
    stream.close()  # as at exit: what is left is written, quietly


@pytest.fixture
def standard_output(monkeypatch):
  """`standard_output(descriptor)` is a standard output of its own."""

  def make(descriptor):
    stream = open(descriptor, 'w')  # noqa: SIM115
    monkeypatch.setattr(sys, 'stdout', stream)
    monkeypatch.setattr(sys, '__stdout__', stream)
    return stream

  return make


def test_a_disk_that_was_full_for_a_while_loses_only_those_lines(standard_output, tmp_path, capsys):
  path = tmp_path / 'log'
  stream = standard_output(os.open(path, os.O_WRONLY | os.O_CREAT))
  disk, full = os.dup(stream.fileno()), os.open('/dev/full', os.O_WRONLY)
  for place, lines in ((disk, 'one\ntwo'), (full, 'three\nfour'), (full, 'five'), (disk, 'six')):
    os.dup2(place, stream.fileno())
    console.say(lines)
  stream.close()
  os.close(disk)
  os.close(full)
  assert path.read_text() == 'one\ntwo\nsix\n'
  why = os.strerror(errno.ENOSPC)
  assert capsys.readouterr().err == f'warning: the output cannot be written ({why}); the work goes on\n'


@pytest.mark.parametrize('reads_soon', [True, False])
def test_a_reader_that_is_behind_is_waited_for(reads_soon, standard_output, monkeypatch, capsys):
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  stream = standard_output(writing)
  size = fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ)
  os.write(writing, bytes(size))
  waited = []

  def wait(_, streams, __, seconds):
    waited.append(seconds)
    if reads_soon:
      os.read(reading, size)

  monkeypatch.setattr(select, 'select', wait)
  console.say('one')
  assert waited == [console.LATE_SECONDS]
  if not reads_soon:
    os.read(reading, size)
  console.say('two')
  stream.close()
  with open(reading) as read:
    assert read.read() == ('one\ntwo\n' if reads_soon else 'two\n')
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize('kind', LOST)
def test_complaints_that_nobody_reads_do_no_harm(kind, tmp_path, monkeypatch, capsys):
  stream = LOST[kind][0](tmp_path)
  monkeypatch.setattr(sys, 'stderr', stream)
  monkeypatch.setattr(sys, '__stderr__', stream)
  console.complain('one')
  console.warn_once('two')
  with progress.waiting('compiling'):
    console.say('three')
  assert capsys.readouterr().out == 'compiling ...\nthree\ncompiling: 0 s\n'
  if stream is not None:
    stream.close()


def test_letters_that_the_output_lacks_become_escapes(monkeypatch):
  written = io.BytesIO()
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, encoding='ascii'))
  console.say('日\udcff')
  assert written.getvalue() == rb'\u65e5\udcff' + b'\n'


def test_a_warning_comes_once(capsys):
  for text in ('one', 'two', 'one'):
    console.warn_once(text)
  assert capsys.readouterr().err == 'warning: one\nwarning: two\n'


@pytest.mark.parametrize(
  ('error', 'why'),
  [
    (OSError(28, 'No space left on device', 'a\nb.png'), r'a\nb.png: No space left on device'),
    (OSError(9, 'Bad file descriptor', 3), 'Bad file descriptor'),
    (KeyError(), 'KeyError'),
    (RuntimeError('two\n lines'), 'two lines'),
  ],
)
def test_a_picture_that_fails_only_warns_once(error, why, capsys):
  for _ in range(2):
    with console.side_output('curves.png'):
      raise error
  assert capsys.readouterr().err == f'warning: curves.png was not written: {why}; the work goes on\n'


@pytest.mark.parametrize('error', [UserError('damaged'), KeyboardInterrupt()])
def test_a_picture_does_not_hide_what_is_not_about_it(error):
  with pytest.raises(type(error)), console.side_output('curves.png'):
    raise error


def test_only_what_the_last_line_says_anyway_is_kept_off_the_screen():
  code = """
import atexit, threading
from googlenet_jax.host import console
from googlenet_jax.host.errors import UserError
console.quieten_libraries()

class Unraisable:
  def __init__(self, error):
    self.error = error
  def __del__(self):
    raise self.error

for error in RuntimeError('Event loop is closed'), RuntimeError('told: another'), OSError(28, 'told: no writer'):
  Unraisable(error)
Unraisable(KeyboardInterrupt(15))
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=200)
  errors = re.findall(r'^\w+(?:Error|Interrupt): (.*)', done.stderr, re.MULTILINE)
  assert errors == ['told: another', '[Errno 28] told: no writer']


def test_help_that_nobody_reads_to_its_end_is_no_mistake():
  with unread_pipe() as gone:  # `head` or a pager may be gone before the text comes
    done = start_main('--help', capture_output=False, stdout=gone, stderr=subprocess.PIPE)
  assert (done.returncode, done.stderr) == (0, '')


def test_devices_have_the_names_of_pytorch(mesh_of):
  assert console.device_name(mesh_of(1)) == 'cpu:0'
  assert console.device_name(mesh_of(8)) == '8 x cpu'
