import contextlib
import errno
import fcntl
import io
import os
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from googlenet_jax.host import console
from googlenet_jax.host.errors import UserError


def record(step, split='train'):
  numbers = {'epoch': step / 10, 'loss': 0.5, 'accuracy': 0.75, 'learning_rate': 0.01, 'examples_per_second': 100.0}
  return {'step': step, 'split': split, **numbers}


@pytest.mark.parametrize('piped', ['stdout', 'stderr', None])
def test_lines_are_written_unless_a_terminal_shows_the_bar(piped, monkeypatch, capsys):
  for name in ('stdout', 'stderr'):
    monkeypatch.setattr(getattr(sys, name), 'isatty', lambda name=name: name != piped)
  progress = console.Progress(0, 20, 10)
  progress.show(record(5))
  progress.close()
  line = 'step 5/20 epoch 0.50/2: loss 0.500, acc 0.750, 100.0 examples/s\n'
  assert capsys.readouterr().out == ('' if piped is None else line)


def test_the_rate_of_decoding_stands_beside_that_of_training(terminal, capsys):
  of_disk = {**record(5), 'decoded_per_second': 310.4}
  console.Progress(0, 20, 10).show(of_disk)
  assert capsys.readouterr().out.endswith(', 100.0 examples/s (decoding up to 310/s)\n')
  screen = terminal(100)
  progress = console.Progress(0, 20, 10)
  progress.advance(5)
  progress.show(of_disk)
  progress.close()
  assert ', 100 img/s (decoding up to 310/s)' in screen.close()[0][-1]


class Terminal:
  """A pseudo-terminal in the place of stdout and stderr."""

  def __init__(self, columns, patch):
    self._master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    self._file = os.fdopen(slave, 'w', encoding='utf-8')
    patch.setattr(sys, 'stdout', self._file)
    patch.setattr(sys, 'stderr', self._file)
    self._bytes = b''
    self._reader = threading.Thread(target=self._read)
    self._reader.start()

  def _read(self):
    with contextlib.suppress(OSError):  # the end of a pseudo-terminal
      while block := os.read(self._master, 4096):
        self._bytes += block

  def close(self):
    """Returns the lines on the screen, and every text that was ever written in one place."""
    self._file.close()
    self._reader.join()
    os.close(self._master)
    lines, row, column, texts = [''], 0, 0, []
    for token in re.findall(r'\r|\n|\x1b\[A|[^\r\n\x1b]+', self._bytes.decode()):
      if token == '\r':
        column = 0
      elif token == '\n':
        row += 1
        lines += [''] * (row == len(lines))
      elif token == '\x1b[A':
        row -= 1
      else:
        lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
        column += len(token)
        texts.append(token.rstrip())
    return [line.rstrip() for line in lines if line.rstrip()], [text for text in texts if text]


@pytest.fixture
def terminal(monkeypatch):
  return lambda columns: Terminal(columns, monkeypatch)


LONG_RUN = {**record(12000), 'epoch': 25.6, 'examples_per_second': 12345.6}


@pytest.mark.parametrize(
  ('columns', 'shown'),
  [
    (40, 'loss 0.500'),
    (60, 'loss 0.500 acc 0.750 9h41m left'),
    (80, 'loss 0.500, acc 0.750, 12346 img/s, 9h41m left'),
    (120, '12000/46900, loss 0.500, acc 0.750, 12346 img/s, 9h41m left'),
  ],
)
def test_the_bar_fits_the_terminal(columns, shown, terminal, monkeypatch):
  now = 0.0
  monkeypatch.setattr(time, 'perf_counter', lambda: now)
  screen = terminal(columns)
  progress = console.Progress(11990, 46900, 469)
  now = 1000.0  # the first step compiles
  for step in range(11991, 12001):
    now += 1.0
    progress.advance(step)
  progress.show(LONG_RUN)
  console.say('epoch 25: a line above the bar')
  progress.close()
  lines, texts = screen.close()
  assert lines[0] == 'epoch 25: a line above the bar'
  assert len(lines) == 2
  assert re.fullmatch(rf'epoch 25\.6/100 \|.{{10,}}\| {shown}', lines[1])
  assert max(map(len, texts)) == columns - 1


def test_the_bar_of_a_short_run_has_room_for_everything(terminal):
  screen = terminal(80)
  progress = console.Progress(0, 132, 22)
  for step in (1, 2, 3):
    progress.advance(step)
  progress.show(record(3))
  progress.close()
  (line,), _ = screen.close()
  assert re.fullmatch(r'epoch 0\.1/6 \|.{10,}\| 3/132, loss 0\.500, acc 0\.750, 100 img/s, \d+s left', line)


def test_a_line_for_every_width():
  parts = {'epoch': 'epoch 1.0/6', 'step': '22/132', 'loss': 'loss 0.5', 'accuracy': 'acc 0.7', 'left': '1h00m left'}
  for width in range(12, 150):
    line = console._bar_line(width, 0.5, parts)
    assert len(line) == width
    assert len(re.search(r'\|(.*)\|', line)[1]) >= console.BAR
  assert '##' in console._bar_line(40, 1.0, parts, ascii_only=True)


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(0.4, '0s'), (59.6, '1m00s'), (725, '12m05s'), (3599.7, '1h00m'), (4980, '1h23m'), (273600, '3d04h')],
)
def test_durations_have_two_units(seconds, text):
  assert console._short_duration(seconds) == text


def test_seconds_count_up_on_a_terminal(terminal, monkeypatch):
  monkeypatch.setattr(console, 'LIVE_SECONDS', 0.01)
  screen, threads = terminal(80), threading.active_count()
  with console.waiting('compiling the training step', 'once; later about 10 s') as watch:
    time.sleep(0.05)
    console.say('another line')
    time.sleep(0.05)
  assert 0.1 <= watch.seconds < 5
  assert threading.active_count() == threads
  lines, texts = screen.close()
  assert lines == ['another line', f'compiling the training step: {watch.seconds:.0f} s']
  assert texts.count('compiling the training step (once; later about 10 s) ... 0 s') > 3


@pytest.mark.parametrize(
  ('columns', 'shown'), [(60, 'compiling the training step ... 0 s'), (20, 'compiling t ... 0 s')]
)
def test_seconds_are_seen_on_a_narrow_terminal(columns, shown, terminal):
  screen = terminal(columns)
  with console.waiting('compiling the training step', 'once; later about 10 s'):
    pass
  assert screen.close()[1][0] == shown


def test_compiling_under_the_bar_leaves_the_bar_whole(terminal):
  screen = terminal(80)
  progress = console.Progress(0, 20, 10)
  progress.advance(1)
  with console.waiting('compiling the evaluation'):
    console.say('another line')
  progress.close()
  lines, _ = screen.close()
  assert lines[:2] == ['another line', 'compiling the evaluation: 0 s']
  assert re.fullmatch(r'epoch 0\.1/2 \|.+\| 1/20', lines[2])
  assert len(lines) == 3


@pytest.mark.parametrize('prefix', ['', '1: '])
def test_seconds_are_plain_lines_without_a_terminal_or_with_a_prefix(prefix, terminal, monkeypatch, capsys):
  screen = terminal(80) if prefix else None
  monkeypatch.setattr(console, 'QUIET_SECONDS', 0.005)
  token = console.prefix.set(prefix)
  try:
    with console.waiting('compiling the training step', 'once'):
      time.sleep(0.1)
    counts = iter(range(1, 1000))
    with console.waiting('decoding', status=lambda: f'{next(counts)} of 9'):
      time.sleep(0.1)
  finally:
    console.prefix.reset(token)
  lines = screen.close()[0] if prefix else capsys.readouterr().out.splitlines()
  second = lines.index(f'{prefix}decoding ...')
  assert lines[second + 1 : second + 3] == [f'{prefix}decoding ... {count} of 9, 0 s' for count in (1, 2)]
  lines = lines[:second]
  assert lines[0] == f'{prefix}compiling the training step (once) ...'
  assert len(lines) > 3
  assert set(lines[1:-1]) == {f'{prefix}compiling the training step ... 0 s'}
  assert lines[-1] == f'{prefix}compiling the training step: 0 s'


@pytest.mark.parametrize('live', [True, False])
@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_waiting_ends_cleanly_on_an_exception(error, live, terminal, capsys):
  screen, threads = terminal(80) if live else None, threading.active_count()
  with pytest.raises(error), console.waiting('compiling') as watch:
    raise error
  assert watch.seconds > 0
  assert threading.active_count() == threads
  lines = screen.close()[0] if live else capsys.readouterr().out.splitlines()
  assert lines[-1] == 'compiling: stopped after 0 s'


def test_waiting_is_not_part_of_the_time_left(terminal, monkeypatch):
  now = 0.0
  monkeypatch.setattr(time, 'perf_counter', lambda: now)
  screen = terminal(80)
  progress = console.Progress(0, 20, 10)
  progress.advance(1)
  now += 3.0
  progress.advance(2)
  with console.waiting('compiling the evaluation'):
    now += 100.0
  progress.close()
  assert screen.close()[0][-1].endswith('2/20, 54s left')


def test_the_time_left_counts_from_the_end_of_the_first_call(terminal, monkeypatch):
  now = 0.0
  monkeypatch.setattr(time, 'perf_counter', lambda: now)
  screen = terminal(80)
  progress = console.Progress(0, 40, 10)
  now = 100.0  # the first call compiles, and takes ten steps
  progress.advance(10)
  now += 5.0
  progress.advance(20)
  progress.close()
  assert screen.close()[0][-1].endswith('20/40, 10s left')


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
  with console.waiting('compiling'):
    console.say('two')
  progress = console.Progress(0, 20, 10)
  progress.advance(1)
  progress.show(record(1))
  progress.close()
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
  with console.waiting('compiling'):
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


def test_devices_have_the_names_of_pytorch(mesh_of):
  assert console.device_name(mesh_of(1)) == 'cpu:0'
  assert console.device_name(mesh_of(8)) == '8 x cpu'
