"""Is anything lost when a run is killed at any moment? Kills real runs with SIGKILL and continues them.

  python -m experiments.kill_runs --kills=220 --output=experiments/results/killed

Each run is a process forked from this one, which has imported the program and nothing else: then a start takes no
seconds. The network is narrow (`experiments/narrow.py`), the data set is a folder of two classes of the digits, and
everything that could make two runs differ is on. A chain of kills works in one workdir: the same command starts again
after each kill, until the run ends. Then its parameters must have the bits of a run that nobody disturbed,
`metrics.jsonl` the same lines apart from speeds, and each file must be whole. After each kill, too, no file may be half
written. Kills fall at random times, at random moments of each phase, and inside the writing of each file.

Other cases follow: SIGSTOP with SIGCONT, SIGINT once and twice, SIGTERM, SIGHUP, SIGUSR1; a clock that jumps; a
terminal whose size changes; two runs in one workdir.
"""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import pty
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence

from experiments import narrow
from experiments.kill_checks import differences, half_written
from experiments.narrow_runs import ROOT, Ended, Event, Run, Runs, small_run

BACKGROUND = 'checkpoint in the background'
APPENDED = ('metrics.jsonl line', 'events record', 'compiled program')  # 'partly' is their only moment


# Where to kill -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Kill:
  """Where a kill is wanted, by the times of the undisturbed run."""

  what: str  # 'time', or a phase, BACKGROUND, or a file
  seconds: float  # in the undisturbed run
  delay: float = 0.0  # after the phase began
  moment: str = ''  # of a file
  share: float = 0.0


def phases_of(events: Sequence[Event]) -> dict[str, list[tuple[float, float]]]:
  """Returns begin and end of each phase of an undisturbed run; a step lasts until the next event."""
  found, begun = collections.defaultdict(list), collections.defaultdict(list)
  for event, following in zip(events, [*events[1:], events[-1]], strict=True):
    if event.mark == '.':
      found['a step'].append((event.seconds, following.seconds))
    elif event.mark == '+':
      begun[event.name].append(event.seconds)
    else:
      found[event.name].append((begun[event.name].pop(), event.seconds))
      if event.name == 'saving':
        found[BACKGROUND].append((event.seconds, event.seconds + 0.25))
  return dict(found)


def wanted(phases: dict[str, list[tuple[float, float]]], seconds: float, count: int, rng: random.Random) -> list[Kill]:
  """Chooses kills: each moment of each file, and of the rest a third at any time and two thirds spread over phases.

  Args:
    phases: of the undisturbed run, see `phases_of`.
    seconds: its duration.
    count: number of kills.
    rng: chooses.
  """
  found = []
  for name, spans in phases.items():
    if name.startswith(('file ', '(file ')):
      file = name.strip('()').removeprefix('file ')
      moments = ['partly'] * 4 if file in APPENDED else narrow.MOMENTS
      found += [Kill(file, rng.choice(spans)[0], 0.0, moment, rng.random()) for moment in moments]
  rng.shuffle(found)
  found = found[: count // 2]
  delays = [rng.uniform(0, seconds) for _ in range((count - len(found)) // 3)]
  found += [Kill('time', delay, delay) for delay in delays]
  names = [name for name in phases if 'file ' not in name] + ['a step', BACKGROUND, BACKGROUND]
  found += in_phases(phases, names, count - len(found), rng)
  rng.shuffle(found)
  return found


def in_phases(phases: dict[str, list[tuple[float, float]]], names: Sequence[str], count: int, rng: random.Random):
  """Chooses kills at random moments of some phases, as many for each."""
  found = []
  for number in range(count):
    begin, end = rng.choice(phases[names[number % len(names)]])
    found.append(Kill(names[number % len(names)], begin, rng.uniform(0, end - begin)))
  return found


def few(phases: dict[str, list[tuple[float, float]]]) -> list[Kill]:
  """Chooses one kill for each thing that a continued run must put right, in their order."""
  return [
    Kill(BACKGROUND, phases[BACKGROUND][1][0], 0.01),
    Kill('metrics.jsonl line', phases['file metrics.jsonl line'][-1][0], 0.0, 'partly', 0.5),
    Kill('summary.json', phases['file summary.json'][0][0], 0.0, 'written'),
  ]


def chains(kills: Sequence[Kill], rng: random.Random) -> list[list[Kill]]:
  """Cuts kills into chains of one to seven, each in the order of the undisturbed run."""
  left, found = list(kills), []
  while left:
    length = rng.randint(1, 7)
    found.append(sorted(left[:length], key=lambda kill: kill.seconds))
    left = left[length:]
  return found


def run_and_kill(runs: Runs, workdir: pathlib.Path, cache: pathlib.Path, kill: Kill, skipped: int) -> Ended:
  """Starts a run, and kills it where it is wanted; it may end before that.

  Args:
    runs: starts it.
    workdir: its folder.
    cache: its cache.
    kill: where.
    skipped: how often the phase or file comes before that in this run.
  """
  if kill.moment:
    return runs.start(workdir, cache, narrow.Aim(kill.what, skipped, kill.moment, kill.share)).end()
  run = runs.start(workdir, cache)

  def due(run):
    marks = {'time': None, 'a step': ('.', None), BACKGROUND: ('-', 'saving')}.get(kill.what, ('+', kill.what))
    if marks is None:
      return True
    return sum(e.mark == marks[0] and marks[1] in (None, e.name) for e in run.events) > skipped

  if run.wait_for(due):
    run.sleep(kill.delay)
    run.send(signal.SIGKILL)
  return run.end()


def fell(events: Sequence[Event], workdir: pathlib.Path) -> str:
  """Says where a kill fell: the innermost phase of the main thread, or the file that any thread wrote."""
  open_phases = []
  for event in events:
    if event.mark == '+':
      open_phases.append(event.name)
    elif event.mark == '-':
      open_phases.reverse()
      open_phases.remove(event.name)
      open_phases.reverse()
  files = [name.strip('()') for name in open_phases if name.strip('()').startswith('file ')]
  main_thread = [name for name in open_phases if not name.startswith('(')]
  if files:
    return files[-1]
  if any((workdir / 'checkpoints').glob('*tmp*')) and main_thread[-1:] != ['saving']:
    return BACKGROUND
  if main_thread:
    return main_thread[-1]
  return 'between phases' if events else 'before the first phase'


# The whole -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Report:
  """What was done and found."""

  kills: int = 0
  chains: int = 0
  starts: int = 0
  missed: int = 0  # runs that ended before the kill
  fell: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  wrong: list[str] = dataclasses.field(default_factory=list)
  cases: list[dict[str, str]] = dataclasses.field(default_factory=list)

  def note(self, place: str, problems: Sequence[str], ended: Ended | None = None) -> None:
    """Keeps what is wrong; a traceback or a warning of a run that was started again is wrong too."""
    problems = list(problems)
    if ended is not None and 'Traceback' in ended.err:
      problems.append('traceback: ' + ' | '.join(ended.err.strip().splitlines()[-2:]))
    self.wrong += [f'{place}: {problem}' for problem in problems]
    for problem in problems:
      print(f'WRONG {place}: {problem}', flush=True)


def kill_chain(runs: Runs, number: int, chain: Sequence[Kill], full_cache: pathlib.Path, report: Report) -> None:
  """Kills a run as often as the chain says, lets it end, and compares it."""
  workdir, cache = runs.folder / f'chain_{number}', runs.folder / f'cache_{number}'
  shutil.copytree(full_cache, cache)
  if any(kill.what == 'compiled program' for kill in chain):  # some must be made anew to be killed meanwhile
    entries = sorted((cache / 'googlenet_jax').glob('*-cache'), key=lambda path: path.stat().st_size)
    for path in entries[: len(entries) // 2]:
      path.unlink()
  if any(kill.what.startswith('cache ') for kill in chain):
    for path in (cache / 'googlenet_jax').glob('*.npz'):
      path.unlink()
  places, before = [], 0.0
  for kill in chain:
    spans = runs.phases.get(f'file {kill.what}') or runs.phases.get(f'(file {kill.what})') or runs.phases.get(kill.what)
    between = [begin for begin, _ in spans or () if before <= begin < kill.seconds]
    ended = run_and_kill(runs, workdir, cache, kill, len(between))
    report.starts += 1
    if ended.status != -signal.SIGKILL:
      report.missed += 1  # it ended before it came there
      if ended.status:
        report.note(f'chain {number}, after {places}', [f'status {ended.status}: {ended.err[-300:]}'], ended)
      continue
    where = fell(ended.events, workdir)
    before = kill.seconds - (kill.delay if kill.what == 'time' else 0)
    places.append(f'{where}{f", {kill.moment}" * bool(kill.moment)}')
    report.kills += 1
    report.fell[places[-1]] += 1
    if workdir.exists():
      report.note(f'chain {number}, after {places}', half_written(workdir), ended)
  ended = runs.start(workdir, cache).end()
  report.starts += 1
  report.chains += 1
  problems = [f'status {ended.status}: {ended.err[-500:]}'] if ended.status else differences(workdir, runs.reference)
  report.note(f'chain {number}, killed in {places}', problems, ended)
  print(f'chain {number}: killed in {"; ".join(places)}: {"; ".join(problems) or "equal"}', flush=True)
  shutil.rmtree(cache)
  if not problems:
    shutil.rmtree(workdir)


def until_trained(run: Run, span: tuple[float, float], rng: random.Random) -> None:
  """Waits until a random moment of the training."""
  run.wait_for(lambda run: any(event.name == 'training steps' for event in run.events))
  run.sleep(rng.uniform(0, 0.7 * (span[1] - span[0])))


def try_signal(runs: Runs, workdir: pathlib.Path, cache: pathlib.Path, case: str, rng: random.Random) -> Ended:
  """Sends the signals of a case while a run trains."""
  run = runs.start(workdir, cache)
  until_trained(run, runs.phases['training steps'][0], rng)
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


def other_cases(runs: Runs, cache: pathlib.Path, report: Report, rng: random.Random, rounds: int) -> None:
  """Tries signals that a run answers, a jumping clock, a changing terminal, and two runs in one workdir."""
  for number in range(rounds):
    for case in ('STOP CONT', 'INT', 'INT INT', 'TERM', 'HUP', 'USR1', 'clock', 'terminal'):
      workdir = runs.folder / f'case_{case.replace(" ", "_")}_{number}'
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
      said = [f'status {ended.status}', *ended.out.strip().splitlines()[-2:]]
      if ended.status:
        ended = runs.start(workdir, cache).end()
        report.note(f'{case}, then the same command', [], ended)
      wrong = [f'status {ended.status}: {ended.err[-300:]}'] if ended.status else []
      wrong = wrong or differences(workdir, runs.reference, exactly=ends)
      report.note(f'{case}, then the same command', wrong)
      outcome = '; '.join(problems + wrong) or 'equal'
      report.cases.append({'case': case, 'said': ' / '.join(said)[:160], 'then': outcome})
      print(f'{case}: {outcome}', flush=True)
  workdir = runs.folder / 'two'
  run = runs.start(workdir, cache)
  until_trained(run, (0.0, 0.0), rng)
  second, first = runs.start(workdir, cache).end(), run.end()
  problems = [] if second.status == 2 and second.err.count('\n') == 1 else [f'the second one: {second}']
  problems += [f'the first one: {first}'] if first.status else differences(workdir, runs.reference)
  report.note('two runs in one workdir', problems)
  outcome = '; '.join(problems) or 'equal'
  report.cases.append({'case': 'two in one workdir', 'said': second.err.strip()[:160], 'then': outcome})


def measure(options: argparse.Namespace, folder: pathlib.Path) -> Report:
  """Does everything in `folder`, and writes the report after each chain: a long measurement may be cut off."""
  begin, rng, report = time.perf_counter(), random.Random(options.seed), Report()
  narrow.import_program()
  runs = Runs(folder, small_run(folder / 'pictures'))
  cache = folder / 'cache'
  runs.reference = folder / 'reference'
  whole = first = runs.start(runs.reference, cache).end()
  if first.status:
    raise SystemExit(f'the undisturbed run ended with {first.status}: {first.err[-2000:]}')
  if (
    options.kills or options.rounds
  ):  # nothing is compiled any more, so phases are as long as in the runs that are killed
    whole = runs.start(folder / 'again', cache).end()
    report.note('two undisturbed runs', differences(folder / 'again', runs.reference))
  runs.phases = phases_of(whole.events)
  for name, spans in phases_of(first.events).items():  # the first one wrote caches too
    runs.phases.setdefault(name, [(min(start, 1.0), 1.0) for start, _ in spans])
  if options.rounds:
    other_cases(runs, cache, report, rng, options.rounds)
  if options.only:
    found = chains(in_phases(runs.phases, options.only.split(','), options.kills, rng), rng)
  elif options.kills:
    found = chains(wanted(runs.phases, whole.seconds, options.kills, rng), rng)
  else:
    found = [few(runs.phases)]
  for number, chain in enumerate(found):
    kill_chain(runs, number, chain, cache, report)
    write(report, time.perf_counter() - begin, options)
  return report


def commit() -> str:
  """Returns the commit of the program; a copy without Git has it in the file COMMIT."""
  kept = ROOT / 'COMMIT'
  if kept.exists():
    return kept.read_text().strip()
  return subprocess.run(
    ['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True
  ).stdout.strip()


def write(report: Report, seconds: float, options: argparse.Namespace) -> None:
  """Writes `killed_SEED.json`, and `killed.md` from all such files: several seeds can be measured at the same time."""
  options.output.mkdir(parents=True, exist_ok=True)
  only = f' --only="{options.only}"' if options.only else ''
  found = {
    'commit': commit(),
    'command': f'python -m experiments.kill_runs --kills={options.kills} --seed={options.seed}{only}',
    'minutes': round(seconds / 60, 1),
    **vars(report),
  }
  (options.output / f'killed_{options.seed}.json').write_text(json.dumps(found, indent=2) + '\n')
  every = [json.loads(path.read_text()) for path in sorted(options.output.glob('killed_*.json'))]
  total = lambda name: sum(one[name] for one in every)
  fell = collections.Counter()
  for one in every:
    fell.update(one['fell'])
  wrong = [line for one in every for line in one['wrong']]
  lines = [
    '# Runs killed at any moment',
    '',
    *[f'- `{one["command"]}`, commit {one["commit"]}: {one["minutes"]} minutes' for one in every],
    '',
    f'{total("kills")} kills (SIGKILL) in {total("chains")} workdirs, {total("starts")} starts of the program. In '
    f'{total("missed")} more, the run ended before the kill. Differences from a run that nobody disturbed, and '
    f'tracebacks: {len(wrong)}.',
    '',
    *[f'- {line}' for line in wrong],
    '',
    '| where the kill fell | kills |',
    '|---|---|',
    *[f'| {place} | {count} |' for place, count in sorted(fell.items())],
    '',
    '| case | last lines of the run | at the end |',
    '|---|---|---|',
    *[f'| {case["case"]} | {case["said"]} | {case["then"]} |' for one in every for case in one['cases']],
  ]
  (options.output / 'killed.md').write_text('\n'.join(lines) + '\n')


def main() -> None:
  """Measures, writes the report, and fails if anything was wrong."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=220, help='0: one chain of three, for the tests')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--rounds', type=int, default=3, help='of the other cases')
  parser.add_argument('--only', help='phases, separated by commas, such as "evaluation,a step"')
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--folder', type=pathlib.Path, help='where to work; it stays')
  options = parser.parse_args()
  folder = options.folder or pathlib.Path(tempfile.mkdtemp(prefix='killed_'))
  folder.mkdir(parents=True, exist_ok=True)
  report = measure(options, folder)
  if options.folder is None:
    shutil.rmtree(folder)
  print(f'{report.kills} kills, {len(report.wrong)} differences, in {options.output}')
  sys.exit(bool(report.wrong))


if __name__ == '__main__':
  main()
