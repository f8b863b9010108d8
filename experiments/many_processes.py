"""Do several processes train as one does, and what is left when one of them dies? Starts real ones on this machine.

  python -m experiments.many_processes --kills=60 --output=experiments/results/processes

Each process is forked from this one, see `experiments/narrow_runs.py`: it is `python main.py` with a narrow network.
They connect as the processes of a cluster do, on the loopback address.

- Layouts: 2 processes with 2 devices each, and 4 with one, end with the parameters of one process with 4 devices, up to
  rounding, because sums are in another order. A run may stop and continue with another number of processes.
- Ensembles: in turn over all processes, and one member a process.
- Kills: process 0 or 1 of two is killed at some phase of the run. The other one must end with a line within a minute,
  and the same command must end with the bits of the undisturbed run.
- Signals: SIGTERM to one process or to all saves the same step everywhere.
"""

import argparse
import collections
import json
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np

from experiments import kill_checks, narrow
from experiments.narrow_runs import Runs, small_run
from experiments.team_runs import Team
from googlenet_jax.host import peers

LAYOUTS = ((2, 2), (4, 1))  # processes and devices of each; 4 devices in all
# Largest difference, as a share of an array's largest value. Sums are in another order, and each step makes the
# difference larger, so the runs have few steps.
TOLERANCE = 1e-4
SHORT = '--config.epochs=1'  # 8 steps
LATE = 60.0  # seconds in which the others must end
KILLED = 'has ended: it was killed, or its host or its connection was lost; the same command continues'
EVERYTHING = ['--config.micro_batches=2', '--config.augment.cutmix=0.5']
# 24 images divide by 3 and by 4 devices, with two micro-batches: 5 steps. With seed 0 sums in another order change a
# choice near a tie (ReLU, max-pool), and all that follows.
THREE = ['--config.batch_size=24', '--config.seed=1']
SEVERAL = ['--config.steps_per_call=2']
# Few programs to compile: no batch statistics, no averaged weights.
PLAIN = ['--config.model.norm=none', '--config.average_decay=0', '--config.learning_rate=0.01']
MEMBERS = [SHORT, '--config.ensemble.members=2', '--config.ensemble.initial_weights=different']
# Phases of `narrow.watch`: a kill falls into one of them, in a process that is drawn by lot.
PHASES = (
  'loading the data', 'restoring', 'compiling the step', 'a step', 'batch statistics', 'saving', 'in the background',
  'compiling the evaluation', 'evaluation', 'drawing answers',
)  # fmt: skip
ONCE = ('loading the data', 'restoring', 'compiling the step', 'compiling the evaluation', 'drawing answers')
UNDISTURBED = 'undisturbed'


class Trial:
  """Runs teams of processes, and notes what is wrong."""

  def __init__(self, folder: pathlib.Path, kind: Sequence[str]):
    """Works in `folder`, with a small data set there; `kind` has flags of the runs that are disturbed."""
    self.kind = kind
    self.folder, self.wrong, self.found = folder, [], collections.Counter()
    self.runs = Runs(folder, small_run(folder / 'pictures'))
    self.seconds = []  # until the other process ended, after each kill

  def check(self, what: str, problems: list[str]) -> None:
    """Notes problems."""
    for problem in problems:
      print(f'WRONG {what}: {problem}', flush=True)
    self.wrong += [f'{what}: {problem}' for problem in problems]

  def run(self, name: str, processes: int, devices: int, *flags: str, statuses: set[int] = frozenset({0})) -> list:
    """Runs a team to its end in the workdir `name`; its statuses must be among some."""
    ended = Team(self.runs, self.folder / name, self.folder / 'cache', processes, devices, flags).end()
    found = {one.status for one in ended}
    errors = [one.err[-1500:] for one in ended if one.status not in statuses]
    self.check(name, [f'status {found}: {errors}'] if errors else [])
    printed = [''.join(line for line in one.out.splitlines() if not line.startswith('[Gloo]')) for one in ended]
    self.check(name, [f'process {i} printed {text[:200]!r}' for i, text in enumerate(printed) if i and text])
    return ended

  # Layouts ----------------------------------------------------------------------------------------------------------

  def layouts(self, name: str, flags: list[str]) -> None:
    """Compares each layout with one process of four devices."""
    flags = [*flags, SHORT]
    self.run(f'{name}_1x4', 1, 4, *flags)
    for processes, devices in LAYOUTS:
      self.run(f'{name}_{processes}x{devices}', processes, devices, *flags)
      self.compare(f'{name}_{processes}x{devices}', f'{name}_1x4')

  def another_layout(self, name: str, flags: list[str], processes: int) -> None:
    """Stops a run of two processes after four steps, and lets more continue it; with one process to compare."""
    flags = [*flags, SHORT]
    self.run(f'{name}_1x4', 1, 4, *flags)
    self.run(f'{name}_continued', 2, 2, *flags, '--config.max_steps=4')
    self.run(f'{name}_continued', processes, 1, *flags)
    self.compare(f'{name}_continued', f'{name}_1x4')

  def compare(self, name: str, reference: str) -> None:
    """Compares the last parameters, and how many images every evaluation counted."""
    self.check(name, kill_checks.in_child(_far_apart, self.folder / name, self.folder / reference))
    ours, theirs = (
      {(r['step'], r['split']): r['accuracy'] for r in kill_checks.records(self.folder / one)}
      for one in (name, reference)
    )
    different = [where for where in theirs if where[1] != 'train' and ours.get(where) != theirs[where]]
    self.check(name, [f'accuracies differ at {different}'] if different else [])
    self.found['layouts'] += 1

  def ensembles(self) -> None:
    """Trains two members over all processes in turn, and one in each process: each member on two devices."""
    self.run('members_in_turn', 2, 1, *self.kind, *MEMBERS)
    flags = [*self.kind, *MEMBERS, '--config.ensemble.side_by_side=True']
    ended = Team(self.runs, self.folder / 'members_apart', self.folder / 'cache', 2, 2, flags).end()
    self.check('members_apart', [one.err[-1500:] for one in ended if one.status])
    for member in ('member_0', 'member_1'):
      self.compare(f'members_apart/{member}', f'members_in_turn/{member}')

  def predict(self, run: str) -> None:
    """Lets one process and two answer for the same pictures: what they print and write must be the same."""
    found = []
    for processes in (1, 2):
      output = self.folder / f'predict_{processes}'
      runs = Runs(self.folder, ['--mode=predict', f'--output={output}', str(self.folder / 'pictures')])
      ended = Team(runs, self.folder / run, self.folder / 'cache', processes, 2).end()
      self.check(output.name, [one.err[-1500:] for one in ended if one.status])
      lines = [line for line in ended[0].out.splitlines() if 'process' not in line and str(output) not in line]
      found.append((lines, (output / 'predictions.csv').read_bytes()))
    self.check('predict', [] if found[0] == found[1] else ['two processes answer otherwise than one'])
    self.found['pictures predicted'] = found[1][1].count(b'\n') - 1

  # Kills and signals ------------------------------------------------------------------------------------------------

  def kill(self, name: str, phase: str, victim: int, rng: random.Random) -> None:
    """Kills one of two processes at the beginning of a phase: the other one must end with a line."""
    team = Team(self.runs, self.folder / name, self.folder / 'cache', 2, 1, self.kind)
    mark, what = {'a step': ('.', None), 'in the background': ('-', 'saving')}.get(phase, ('+', phase))
    skipped = rng.randrange(3) if phase not in ONCE else 0
    due = lambda run: sum(event.mark == mark and what in (None, event.name) for event in run.events) > skipped
    if not team.runs[victim].wait_for(due):
      self.found['missed'] += 1
    team.runs[victim].sleep(rng.random() * 0.02)
    begin = time.perf_counter()
    team.runs[victim].send(signal.SIGKILL)
    other, seconds = team.runs[1 - victim].end(), time.perf_counter() - begin
    dead = team.runs[victim].end()
    if dead.status != -signal.SIGKILL or other.status == 0:
      return  # the run was over
    self.seconds.append(seconds)
    self.found[f'process {victim}, {phase}'] += 1
    problems = [f'the other one ended after {seconds:.0f} s'] if seconds > LATE else []
    if other.status != peers.LOST or KILLED not in other.err or 'Traceback' in other.err:
      problems.append(f'the other one ended with status {other.status}: {other.err[-600:]}')
    self.check(f'{name} ({phase}, process {victim})', problems)

  def stop(self, name: str, victims: list[int]) -> None:
    """Sends SIGTERM to some of two processes in a step: both must save the same one."""
    team = Team(self.runs, self.folder / name, self.folder / 'cache', 2, 1, self.kind)
    team.runs[0].wait_for(lambda run: sum(event.mark == '.' for event in run.events) > 4)
    for victim in victims:
      team.runs[victim].send(signal.SIGTERM)
    ended = team.end()
    self.found[f'SIGTERM to {victims}'] += 1
    statuses = [one.status for one in ended]
    problems = [] if statuses == [128 + signal.SIGTERM] * 2 else [f'statuses {statuses}: {[one.err for one in ended]}']
    steps = [[event.name for event in one.events if event.mark == '.'][-1] for one in ended]
    if steps[0] != steps[1] or ', saved' not in ended[0].out:
      problems.append(f'stopped after {steps}: {ended[0].out[-300:]}')
    self.check(name, problems)

  def finish(self, name: str, exactly: bool) -> None:
    """Continues a run of two processes to its end, and compares it with one that nobody disturbed.

    Args:
      name: its workdir.
      exactly: see `kill_checks.differences`.
    """
    if not (self.folder / UNDISTURBED).exists():
      self.run(UNDISTURBED, 2, 1, *self.kind)
    self.run(name, 2, 1, *self.kind)
    self.check(name, kill_checks.differences(self.folder / name, self.folder / UNDISTURBED, exactly))
    shutil.rmtree(self.folder / name)


def _far_apart(workdir: pathlib.Path, reference: pathlib.Path) -> list[str]:
  (_, ours), (_, theirs) = map(kill_checks.newest_state, (workdir, reference))
  if ours.keys() != theirs.keys():
    return [f'arrays {sorted(ours.keys() ^ theirs.keys())} on one side only']
  wrong = []
  for name, array in theirs.items():
    far, largest = (float(np.max(np.abs(one), initial=0)) for one in (ours[name].astype(float) - array, array))
    if not far <= TOLERANCE * largest:
      wrong.append(f'{name} differs by {far:.1e}; its largest value is {largest:.1e}')
  return wrong


def quick(trial: Trial) -> None:
  """For the tests: training, another number of processes, predicting."""
  trial.another_layout('everything', [*EVERYTHING, *THREE], processes=3)
  trial.predict('everything_1x4')


def short(trial: Trial) -> None:
  """For continuous integration: also ensembles, a kill, and a signal to one process."""
  quick(trial)
  trial.runs.draw = False
  trial.ensembles()
  trial.kill('disturbed', 'a step', 0, random.Random(0))
  trial.stop('disturbed', [1])
  trial.finish('disturbed', exactly=False)


def whole(trial: Trial, kills: int) -> None:
  """Everything, with many kills."""
  trial.another_layout('everything', EVERYTHING, processes=4)
  trial.predict('everything_1x4')
  trial.ensembles()
  trial.layouts('everything_whole', EVERYTHING)
  trial.layouts('several_steps', SEVERAL)
  for victims in ([0], [1], [0, 1]):
    trial.stop('stopped', victims)
    trial.finish('stopped', exactly=False)
  for number in range(kills):
    trial.kill('killed', PHASES[number // 2 % len(PHASES)], number % 2, random.Random(number))
    trial.finish('killed', exactly=True)


def main() -> None:
  """Makes the trials, writes the report, and fails if anything was wrong."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=60, help='0: few short trials')
  parser.add_argument('--quick', action='store_true', help='even fewer')
  parser.add_argument('--output', type=pathlib.Path, required=True)
  options = parser.parse_args()
  folder = pathlib.Path(tempfile.mkdtemp(prefix='processes_'))  # a TemporaryDirectory would end with each child
  narrow.import_program()  # the processes are forked, and need not do it
  if options.quick or not options.kills:
    trial = Trial(folder, PLAIN)
    (quick if options.quick else short)(trial)
  else:
    trial = Trial(folder, [])
    whole(trial, options.kills)
  shutil.rmtree(folder)
  options.output.mkdir(parents=True, exist_ok=True)
  report = {
    'wrong': trial.wrong,
    'kills': len(trial.seconds),
    'longest_seconds': max(trial.seconds, default=0.0),
    'found': dict(sorted(trial.found.items())),
  }
  (options.output / 'processes.json').write_text(json.dumps(report, indent=2) + '\n')
  print(json.dumps(report, indent=2))
  sys.exit(bool(trial.wrong))


if __name__ == '__main__':
  main()
