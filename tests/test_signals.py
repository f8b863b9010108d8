"""Signals: which are answered, when they are requests, and when they end a program at once."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from googlenet_jax.host import program, signals
from googlenet_jax.host.signals import StoppedError, StopRequest
from googlenet_jax.training import evaluator

ROOT = pathlib.Path(__file__).parent.parent
ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


def send(number):
  os.kill(os.getpid(), number)


@pytest.mark.parametrize('is_program', [True, False])
@pytest.mark.parametrize('number', ALL)
def test_signals_are_requests_while_something_is_unsaved_and_as_before_afterwards(
  number, is_program, capfd, monkeypatch
):
  monkeypatch.setattr(program, 'is_program', lambda: is_program)
  before = signal.getsignal(number)
  with StopRequest() as stop, stop.holding():
    assert stop.signal is None
    send(number)
    assert stop.signal is number
  assert signal.getsignal(number) is before
  second = 'a second Ctrl-C or SIGTERM ends' if is_program else 'a second interrupt stops'
  assert capfd.readouterr().err == f'\n{number.name}: saving after the steps under way; {second} at once\n'


@pytest.mark.parametrize(
  ('number', 'is_program', 'kind'),
  [
    (signal.SIGINT, True, SystemExit),
    (signal.SIGTERM, False, SystemExit),
    (signal.SIGINT, False, signals.Interrupted),
  ],
)
def test_what_was_stopped_says_how_to_continue(number, is_program, kind, capsys, monkeypatch):
  monkeypatch.setattr(program, 'is_program', lambda: is_program)
  monkeypatch.setattr(sys, 'argv', ['ipykernel_launcher.py', '-f', 'kernel.json'])
  stop = StopRequest()
  stop.signal = number
  with pytest.raises(kind) as ended:
    stop.exit()
  if kind is signals.Interrupted:
    assert ended.value._render_traceback_() == ['interrupted, after saving: run the same again to continue']
    assert capsys.readouterr().out == ''
    return
  assert ended.value.code == 128 + number
  line = 'The same command continues: python ipykernel_launcher.py -f kernel.json'
  assert capsys.readouterr().out == f'{line if is_program else "Run the same again to continue."}\n'


@pytest.mark.parametrize('number', ALL)
def test_signals_interrupt_where_nothing_is_unsaved(number, capfd):
  stop = StopRequest()
  with stop.holding():
    pass
  with pytest.raises(KeyboardInterrupt) as raised, stop:
    send(number)
  assert raised.value.args == (number,)
  assert stop.signal is number  # threads that train see it
  assert capfd.readouterr().err == ''


def test_only_a_repeated_interrupt_insists():
  with StopRequest() as stop, stop.holding():
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):  # a scheduler, and a lost terminal
      send(number)
    assert stop.signal is signal.SIGUSR1
    with pytest.raises(KeyboardInterrupt):
      send(signal.SIGINT)


def test_what_the_parent_had_ignored_stays_ignored(monkeypatch):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    assert signals.caught() == [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    with StopRequest() as stop, stop.holding():
      send(signal.SIGHUP)
    assert stop.signal is None
  finally:
    signal.signal(signal.SIGHUP, before)
  monkeypatch.delattr(signal, 'SIGHUP')  # as on Windows
  monkeypatch.delattr(signal, 'SIGUSR1')
  assert signals.caught() == [signal.SIGINT, signal.SIGTERM]


def test_another_thread_leaves_signals_alone():
  handlers = []

  def work():
    with StopRequest():
      handlers.extend(map(signal.getsignal, ALL))

  before = [signal.getsignal(number) for number in ALL]
  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert handlers == before


def test_a_lost_terminal_harms_no_request(monkeypatch):
  def fail(*_):
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(os, 'write', fail)
  with StopRequest() as stop, stop.holding():
    send(signal.SIGHUP)
  assert stop.signal is signal.SIGHUP


def test_work_is_abandoned_when_a_signal_comes(monkeypatch):
  monkeypatch.setattr(signals, '_abandoned', [])
  stop, done = StopRequest(), threading.Event()
  assert stop.unless_stopped(lambda: 5) == 5
  with pytest.raises(ZeroDivisionError):
    stop.unless_stopped(lambda: 1 // 0)
  with stop, stop.holding():
    send(signal.SIGTERM)
    assert stop.unless_stopped(lambda: time.sleep(0.05) or 5, patience=9) == 5
    with pytest.raises(StoppedError):
      stop.unless_stopped(done.wait)
  assert not signals._abandoned[0].done()
  done.set()


def test_work_in_a_thread_of_its_own_has_the_settings_of_jax_of_the_thread_that_waits():
  with jax.default_matmul_precision('float32'), jax.enable_x64(True):
    work = evaluator._as_in_this_thread(lambda: (jax.config.jax_default_matmul_precision, jnp.ones(1).dtype))
    assert StopRequest().unless_stopped(work) == ('float32', jnp.float64)
  assert jax.config.jax_default_matmul_precision is None


# `busy` is a call that lets no other line of Python run in the main thread, like XLA while it compiles.
PROGRAM = """
import gc, os, signal, sys, threading, time
from googlenet_jax.host import console, signals

def say_end(number):
  os.write(1, b'ended\\n')
  os._exit(128 + number)

end = say_end

def interrupted(phase, info):  # Python drops what this raises
  gc.callbacks.clear()
  os.kill(os.getpid(), 15)

def busy(seconds):
  signal.pthread_sigmask(signal.SIG_BLOCK, signals.caught())  # another thread gets them
  time.sleep(seconds)

def send(*numbers):
  for number in numbers:
    time.sleep(0.1)
    os.kill(os.getpid(), number)

threading.Thread(target=time.sleep, args=(60,)).start()
console.quieten_libraries()
signals.GRACE = signals.LAST_WORDS = 0.2
with signals.of_program(lambda number: end(number)), signals.StopRequest() as stop:
  BODY
"""


@pytest.mark.parametrize(
  ('body', 'status', 'out', 'err'),
  [
    ('threading.Thread(target=send, args=(1,)).start(); busy(60)', 129, 'ended\n', ''),
    ('gc.callbacks.append(interrupted); gc.collect(); time.sleep(60)', 143, 'ended\n', ''),
    (
      'end = lambda number: time.sleep(60)\n  threading.Thread(target=send, args=(2, 2, 2)).start(); busy(60)',
      130,
      '',
      '',
    ),
    (
      'signals.LAST_WORDS = 20.0\n'
      '  end = lambda number: time.sleep(0.5) or say_end(number)\n'
      '  threading.Thread(target=send, args=(15, 15, 15)).start(); busy(60)',
      143,
      'ended\n',
      '',
    ),
    (
      'with stop.holding(): threading.Thread(target=send, args=(15, 15)).start(); busy(60)',
      143,
      '',
      'SIGTERM: saving after the steps under way; a second Ctrl-C or SIGTERM ends at once\n'
      'ended at once; what was not saved yet is lost\n',
    ),
    (
      'with stop.holding():\n'
      '    threading.Thread(target=send, args=(10,)).start()\n'
      '    try: stop.unless_stopped(lambda: time.sleep(60))\n'
      '    except signals.StoppedError: print("saved")\n'
      '  stop.exit()',
      138,
      'saved\nThe same command continues: python -c\n',
      'SIGUSR1: saving after the steps under way; a second Ctrl-C or SIGTERM ends at once\n',
    ),
  ],
  ids=[
    'nothing unsaved',
    'a lost interrupt',
    'an end that hangs',
    'an end that others disturb',
    'twice',
    'abandoned work',
  ],
)
def test_a_program_ends_at_once_even_inside_xla(body, status, out, err):
  code = PROGRAM.replace('BODY', body)
  process = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, timeout=50, text=True)
  assert (process.returncode, process.stdout, process.stderr.lstrip()) == (status, out, err)
