"""What else may happen to a run than kills: other signals, a clock that jumps, a changing terminal, a second run.

See `experiments/kill_runs.py`.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import pty
import random
import signal
import struct
import termios
import time

from experiments.kill_checks import Report, differences
from experiments.narrow_runs import ROOT, Ended, Run, Runs

CASES = ('STOP CONT', 'INT', 'INT INT', 'TERM', 'HUP', 'USR1', 'clock', 'terminal', 'two in one workdir')


def until_trained(run: Run, rng: random.Random) -> None:
  """Waits until a random step of the training."""
  steps = rng.randint(1, 16)
  run.wait_for(lambda run: sum(event.mark == '.' for event in run.events) >= steps)
  run.sleep(rng.uniform(0, 0.3))


def try_signal(runs: Runs, workdir: pathlib.Path, cache: pathlib.Path, case: str, rng: random.Random) -> Ended:
  """Sends the signals of a case while a run trains."""
  run = runs.start(workdir, cache)
  until_trained(run, rng)
  for number, word in enumerate(case.split()):
    if number:
      run.sleep(1.0 if word == 'CONT' else rng.uniform(0, 0.05))
    run.send(signal.Signals[f'SIG{word}'])
  return run.end()


def jumping_clock() -> None:
  """Sets the clock every two seconds: back by up to a year, or forward by four minutes.

  Forward by more than five minutes while a checkpoint is written, Orbax gives that one up, and the loop writes a later
  one.
  """
  real, jumps, begin = time.time, (-1, -3600, 240, -3.2e7, 240), time.monotonic()

  def now():
    count = int((time.monotonic() - begin) / 2)
    return real() + count // len(jumps) * sum(jumps) + sum(jumps[: count % len(jumps)])

  time.time = now


def in_changing_terminal(runs: Runs, workdir: pathlib.Path, cache: pathlib.Path, rng: random.Random) -> Ended:
  """Runs in a terminal whose size changes many times a second, down to one column."""
  master, terminal = pty.openpty()
  os.set_blocking(master, False)
  run, printed = runs.start(workdir, cache, terminal=terminal), b''
  while not run.closed:
    run.read(0.02)
    fcntl.ioctl(
      master, termios.TIOCSWINSZ, struct.pack('HHHH', rng.choice((1, 24)), rng.choice((0, 1, 9, 80, 300)), 0, 0)
    )
    run.send(signal.SIGWINCH)
    with contextlib.suppress(BlockingIOError, OSError):
      printed += os.read(master, 1 << 16)
  ended = run.end()
  os.close(master)
  os.close(terminal)
  return dataclasses.replace(ended, err=printed.decode(errors='replace'))


def try_case(runs: Runs, cache: pathlib.Path, case: str, number: int, seed: int) -> Report:
  """Tries one of CASES in a workdir of its own; `number` says how often it was tried before."""
  report, rng = Report(), random.Random(f'{seed} {case} {number}')
  workdir = runs.folder / f'case_{case.replace(" ", "_")}_{number}'
  if case == 'two in one workdir':
    return two_runs(runs, workdir, cache, report, rng)
  if case == 'clock':
    ended = runs.start(workdir, cache, prepare=jumping_clock).end()
  elif case == 'terminal':
    ended = in_changing_terminal(runs, workdir, cache, rng)
  else:
    ended = try_signal(runs, workdir, cache, case, rng)
  ends = case in ('STOP CONT', 'clock', 'terminal')
  expected = (0,) if ends else (0, 128 + signal.Signals[f'SIG{case.split()[0]}'])
  problems = [] if ended.status in expected else [f'status {ended.status}: {ended.err[-300:]}']
  report.note(case, problems, ended)
  said = ' / '.join([f'status {ended.status}', *ended.out.strip().splitlines()[-2:]])
  said = said.replace(f'{ROOT}/', '').replace(str(runs.folder), 'FOLDER')[:160]  # the same on every machine
  if ended.status:
    ended = runs.start(workdir, cache).end()
    report.note(f'{case}, then the same command', [], ended)
  wrong = [f'status {ended.status}: {ended.err[-300:]}'] if ended.status else []
  wrong = wrong or differences(workdir, runs.reference, exactly=ends)
  report.note(f'{case}, then the same command', wrong)
  report.cases.append({'case': case, 'said': said, 'then': '; '.join(problems + wrong) or 'equal'})
  return report


def two_runs(runs: Runs, workdir: pathlib.Path, cache: pathlib.Path, report: Report, rng: random.Random) -> Report:
  """Starts a second run in the workdir of the first: it must end in one line."""
  run = runs.start(workdir, cache)
  until_trained(run, rng)
  second, first = runs.start(workdir, cache).end(), run.end()
  problems = [] if second.status == 2 and second.err.count('\n') == 1 else [f'the second one: {second}']
  problems += [f'the first one: {first}'] if first.status else differences(workdir, runs.reference)
  report.note('two in one workdir', problems)
  said = second.err.strip().replace(str(workdir), 'WORKDIR')[:160]
  report.cases.append({'case': 'two in one workdir', 'said': said, 'then': '; '.join(problems) or 'equal'})
  return report
