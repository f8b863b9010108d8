"""Chooses where runs are killed, and says where a kill fell; see `experiments/kill_runs.py`."""

import collections
import dataclasses
import pathlib
import random
from collections.abc import Sequence

from experiments import narrow
from experiments.narrow_runs import Event

BACKGROUND = 'checkpoint in the background'
ANEW = 'writing a checkpoint anew'
APPENDED = ('metrics.jsonl line', 'events record', 'compiled program')  # 'partly' is their only moment


@dataclasses.dataclass
class Kill:
  """Where a kill is wanted, by the times of the undisturbed run."""

  what: str  # a phase, BACKGROUND, or a file
  seconds: float  # in the undisturbed run
  delay: float = 0.0  # after the phase began
  moment: str = ''  # if a file is written: one of narrow.MOMENTS
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


def wanted(phases: dict[str, list[tuple[float, float]]], count: int, rng: random.Random) -> list[Kill]:
  """Chooses kills: each moment of each file, at most half of all; then at random moments, as many in each phase.

  Args:
    phases: those of the undisturbed run, see `phases_of`.
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
  names = [name for name in phases if 'file ' not in name]
  for number in range(count - len(found)):
    name = names[number % len(names)]
    begin, end = rng.choice(phases[name])
    found.append(Kill(name, begin, rng.uniform(0, end - begin)))
  rng.shuffle(found)
  return found


def few(phases: dict[str, list[tuple[float, float]]]) -> list[Kill]:
  """Chooses a kill in an early save, and one in the last line of the log, when the last step is saved."""
  return [
    Kill(BACKGROUND, phases[BACKGROUND][1][0], 0.01),
    Kill('metrics.jsonl line', phases['file metrics.jsonl line'][-1][0], 0.0, 'partly', 0.5),
  ]


def anew(rng: random.Random) -> list[Kill]:
  """Chooses kills while a checkpoint is written anew, for a run that was stopped in its first batch statistics."""
  return [Kill(ANEW, number, rng.uniform(0, 0.2)) for number in range(3)]


def chains(kills: Sequence[Kill], rng: random.Random) -> list[list[Kill]]:
  """Cuts kills into chains of four to nine, each in the order of the undisturbed run."""
  left, found = list(kills), []
  while left:
    length = rng.randint(4, 9)
    found.append(sorted(left[:length], key=lambda kill: kill.seconds))
    left = left[length:]
  return found


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
  if ANEW in main_thread:
    return ANEW
  if any((workdir / 'checkpoints').glob('*tmp*')) and main_thread[-1:] != ['saving']:
    return BACKGROUND
  if main_thread:
    return main_thread[-1]
  return 'between phases' if events else 'before the first phase'
