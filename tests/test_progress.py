import contextlib
import fcntl
import io
import os
import re
import struct
import sys
import termios
import threading
import time
import types

import pytest

from googlenet_jax.host import console, progress


def record(step, split='train'):
  numbers = {'epoch': step / 10, 'loss': 0.5, 'accuracy': 0.75, 'learning_rate': 0.01, 'examples_per_second': 100.0}
  return {'step': step, 'split': split, **numbers}


@pytest.mark.parametrize('piped', ['stdout', 'stderr', None])
def test_lines_are_written_unless_a_terminal_shows_the_bar(piped, monkeypatch, capsys):
  for name in ('stdout', 'stderr'):
    monkeypatch.setattr(getattr(sys, name), 'isatty', lambda name=name: name != piped)
  bar = progress.Progress(0, 20, 10)
  bar.show(record(5))
  bar.close()
  line = 'step 5/20 epoch 0.50/2: loss 0.500, acc 0.750, 100.0 examples/s\n'
  assert capsys.readouterr().out == ('' if piped is None else line)


def test_the_rate_of_decoding_stands_beside_that_of_training(terminal, capsys):
  of_disk = {**record(5), 'decoded_per_second': 310.4}
  progress.Progress(0, 20, 10).show(of_disk)
  assert capsys.readouterr().out.endswith(', 100.0 examples/s (decoding up to 310/s)\n')
  screen = terminal(100)
  bar = progress.Progress(0, 20, 10)
  bar.advance(5)
  bar.show(of_disk)
  bar.close()
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
    self._reader = threading.Thread(target=self._read, daemon=True)
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
  bar = progress.Progress(11990, 46900, 469)
  now = 1000.0  # the first step compiles
  for step in range(11991, 12001):
    now += 1.0
    bar.advance(step)
  bar.show(LONG_RUN)
  console.say('epoch 25: a line above the bar')
  bar.close()
  lines, texts = screen.close()
  assert lines[0] == 'epoch 25: a line above the bar'
  assert len(lines) == 2
  assert re.fullmatch(rf'epoch 25\.6/100 \|.{{10,}}\| {shown}', lines[1])
  assert max(map(len, texts)) == columns - 1


def test_the_bar_of_a_short_run_has_room_for_everything(terminal):
  screen = terminal(80)
  bar = progress.Progress(0, 132, 22)
  for step in (1, 2, 3):
    bar.advance(step)
  bar.show(record(3))
  bar.close()
  (line,), _ = screen.close()
  assert re.fullmatch(r'epoch 0\.1/6 \|.{10,}\| 3/132, loss 0\.500, acc 0\.750, 100 img/s, \d+s left', line)


def test_a_line_for_every_width():
  parts = {'epoch': 'epoch 1.0/6', 'step': '22/132', 'loss': 'loss 0.5', 'accuracy': 'acc 0.7', 'left': '1h00m left'}
  for width in range(12, 150):
    line = progress._bar_line(width, 0.5, parts)
    assert len(line) == width
    assert len(re.search(r'\|(.*)\|', line)[1]) >= progress.BAR
  assert '##' in progress._bar_line(40, 1.0, parts, ascii_only=True)


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(0.4, '0s'), (59.6, '1m00s'), (725, '12m05s'), (3599.7, '1h00m'), (4980, '1h23m'), (273600, '3d04h')],
)
def test_durations_have_two_units(seconds, text):
  assert progress._short_duration(seconds) == text


def test_seconds_count_up_on_a_terminal(terminal, monkeypatch):
  monkeypatch.setattr(progress, 'LIVE_SECONDS', 0.01)
  screen, threads = terminal(80), threading.active_count()
  with progress.waiting('compiling the training step', 'once; later about 10 s') as watch:
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
  with progress.waiting('compiling the training step', 'once; later about 10 s'):
    pass
  assert screen.close()[1][0] == shown


def test_compiling_under_the_bar_leaves_the_bar_whole(terminal):
  screen = terminal(80)
  bar = progress.Progress(0, 20, 10)
  bar.advance(1)
  with progress.waiting('compiling the evaluation'):
    console.say('another line')
  bar.close()
  lines, _ = screen.close()
  assert lines[:2] == ['another line', 'compiling the evaluation: 0 s']
  assert re.fullmatch(r'epoch 0\.1/2 \|.+\| 1/20', lines[2])
  assert len(lines) == 3


@pytest.mark.parametrize('prefix', ['', '1: '])
def test_seconds_are_plain_lines_without_a_terminal_or_with_a_prefix(prefix, terminal, monkeypatch, capsys):
  screen = terminal(80) if prefix else None
  monkeypatch.setattr(progress, 'QUIET_SECONDS', 0.005)
  token = console.prefix.set(prefix)
  try:
    with progress.waiting('compiling the training step', 'once'):
      time.sleep(0.1)
    counts = iter(range(1, 1000))
    with progress.waiting('decoding', status=lambda: f'{next(counts)} of 9'):
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
  with pytest.raises(error), progress.waiting('compiling') as watch:
    raise error
  assert watch.seconds > 0
  assert threading.active_count() == threads
  lines = screen.close()[0] if live else capsys.readouterr().out.splitlines()
  assert lines[-1] == 'compiling: stopped after 0 s'


def test_waiting_is_not_part_of_the_time_left(terminal, monkeypatch):
  now = 0.0
  monkeypatch.setattr(time, 'perf_counter', lambda: now)
  screen = terminal(80)
  bar = progress.Progress(0, 20, 10)
  bar.advance(1)
  now += 3.0
  bar.advance(2)
  with progress.waiting('compiling the evaluation'):
    now += 100.0
  bar.close()
  assert screen.close()[0][-1].endswith('2/20, 54s left')


def test_the_time_left_counts_from_the_end_of_the_first_call(terminal, monkeypatch):
  now = 0.0
  monkeypatch.setattr(time, 'perf_counter', lambda: now)
  screen = terminal(80)
  bar = progress.Progress(0, 40, 10)
  now = 100.0  # the first call compiles, and takes ten steps
  bar.advance(10)
  now += 5.0
  bar.advance(20)
  bar.close()
  assert screen.close()[0][-1].endswith('20/40, 10s left')


def test_a_notebook_rewrites_one_line_a_few_times_in_a_second(monkeypatch):
  shown, now = [], 0.0

  class OutStream(io.StringIO):
    __module__ = 'ipykernel.iostream'

  def show(content, **options):
    shown.append([content['text/plain']])
    assert options == {'raw': True, 'display_id': True}
    return types.SimpleNamespace(update=lambda content, raw: shown[-1].append(content['text/plain']))

  monkeypatch.setattr(time, 'monotonic', lambda: now)
  monkeypatch.setattr('IPython.display.display', show)
  monkeypatch.setattr(sys, 'stdout', OutStream())
  bar = progress.Progress(0, 20, 10)
  for step in range(1, 11):
    now += 0.3
    bar.advance(step)
  bar.show(record(10))
  bar.close()
  with progress.waiting('compiling', 'once'):
    pass
  line, counted = shown
  assert [text.split()[-1] for text in line[:2]] == ['0/20', 'left']
  assert len(line) == 1 + 5 + 2  # at the start, at every second step, at the log point and at the end
  assert re.fullmatch(r'epoch 1\.0/2 \|.+\| 10/20, loss 0\.500, acc 0\.750, 100 img/s, \d+s left', line[-1])
  assert (counted[0], counted[-1]) == ('compiling (once) ... 0 s', 'compiling: 0 s')
  assert sys.stdout.getvalue() == ''
