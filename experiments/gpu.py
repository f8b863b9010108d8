"""Everything that is to be measured on one GPU: stages, each with a time limit, within a budget.

  python -m experiments.gpu                                # speed, in at most 400 s
  python -m experiments.gpu --stages=accuracy --budget=1200
  python -m experiments.gpu --stages=fashion-best --runs=1     # one network instead of seven
  python -m experiments.gpu --stages=forms-224,profile-224 --join=first/results.json
  python -m experiments.gpu --stages=none --join=first/results.json --join=second/results.json   # only the tables
  python -m experiments.gpu --tiny                         # all of it on a CPU, in miniature

One call does not measure everything: 400 s are enough for about the first five stages of speed. `--stages` with
`--join` runs the others. Stages run in the order of `STAGES`, the most useful first. A stage that does not fit into
what is left of the budget is skipped. A stage works in processes of its own, which are killed when its time is up: a
stage that fails does not stop the others. What was measured is written after every stage, to experiments/results/gpu/
or --output:

- `speed.md`: this program beside PyTorch and without each of its forms, notes on what is missing
- `profile.md`: a step by kind of kernel, and the slowest kernels; without CUDA graphs, which would hide them
- `accuracy.md`: accuracy, and seconds from the command to the result
- `results.json`: every figure; `--join` reads it
- `log.txt`: what failed programs printed last

Speed needs neither TFDS nor a network. Accuracy needs what main.py needs, such as FASHION_MNIST_DIR, and trains in
runs/gpu, where it replaces earlier runs. Both frameworks read uint8 images on the device. The first call is slow
because it compiles; a second call is faster. Where there is no git, set COMMIT to name the commit in the results.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments import contest, gpu_report, gpu_stages, tables, worker
from experiments.gpu_stages import accuracy, ensemble, forms, products, profile, turns
from experiments.tables import Case

BEST, DEFAULT = 'configs/fashion_best.py', 'configs/default.py'
LARGE = Case('training', 224, 256, 'bfloat16')
SMALL = Case('training', 32, 1024, 'bfloat16')
SHAPE_OF_BEST = Case('training', 32, 256, 'bfloat16')
EAGER, GRAPHS, TUNED = 'eager', 'reduce-overhead', 'max-autotune'
LAYERS = ("XLA's max-pool", 'separate 1x1 layers', "XLA's first layer", 'sums in one step', "XLA's layers")
LAUNCHES = ('one step a call',)
GRAPHLESS = 'no graphs'
OPTIONS = ('graphs with convolutions and loops', 'fused convolutions', 'latency hiding', GRAPHLESS)


class Stage(NamedTuple):
  """What to measure, by a function of gpu_stages.py."""

  name: str
  expected: float  # seconds, a guess: it is skipped if less is left
  limit: float  # seconds
  measure: Callable[..., dict[str, Any]]
  arguments: dict[str, Any]


def _turns(name: str, expected: float, limit: float, case: Case, *contenders: str) -> Stage:
  return Stage(name, expected, limit, turns, {'case': case, 'contenders': contenders})


def _forms(name: str, expected: float, limit: float, case: Case, config: str, *names: str) -> Stage:
  return Stage(name, expected, limit, forms, {'case': case, 'config': config, 'names': names})


SPEED = [  # the second stage with the same programs finds them compiled
  _turns('train-224', 100, 180, LARGE, EAGER, GRAPHS),
  Stage('profile-224', 25, 120, profile, {'case': LARGE, 'config': DEFAULT, 'form': GRAPHLESS}),
  Stage('profile-best', 25, 120, profile, {'case': SHAPE_OF_BEST, 'config': BEST, 'form': GRAPHLESS}),
  _forms('forms-224', 35, 180, LARGE, DEFAULT, *LAYERS, *LAUNCHES),
  _forms('best', 35, 180, SHAPE_OF_BEST, BEST, *LAUNCHES, '40 steps a call'),
  _turns('train-32', 70, 170, SMALL, EAGER, GRAPHS),
  Stage('product', 20, 60, products, {'dtypes': ('bfloat16', 'float32')}),
  _forms('options-best', 35, 150, SHAPE_OF_BEST, BEST, *OPTIONS),
  _forms('options-224', 35, 150, LARGE, DEFAULT, *OPTIONS),
  _turns('train-96', 60, 120, Case('training', 96, 256, 'bfloat16'), EAGER, GRAPHS),
  _turns('infer-224', 45, 100, Case('inference', 224, 256, 'bfloat16'), EAGER, GRAPHS),
  _turns('train-224-float32', 80, 150, Case('training', 224, 256, 'float32'), EAGER, GRAPHS),
  _forms('forms-best', 35, 120, SHAPE_OF_BEST, BEST, *LAYERS),
  _forms('forms-32', 35, 120, SMALL, DEFAULT, *LAUNCHES, *LAYERS, *OPTIONS[:1]),
  Stage('profile-torch', 40, 100, profile, {'case': LARGE, 'compile_mode': GRAPHS}),
  _turns('autotune-224', 150, 330, LARGE, TUNED),
]
VIEWS = '1,6'
ACCURACY = [
  Stage('fashion', 60, 240, accuracy, {'config': 'configs/fashion.py', 'keys': ('dtype=bfloat16',)}),
  Stage('fashion-speed', 60, 400, accuracy, {'config': 'configs/fashion_speed.py', 'seeds': 5, 'crops': VIEWS}),
  Stage('fashion-best', 200, 1200, ensemble, {'config': BEST, 'members': 7, 'crops': VIEWS}),
]
STAGES = [*SPEED, *ACCURACY]
GROUPS = {'speed': SPEED, 'accuracy': ACCURACY, 'all': STAGES, 'none': []}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """Reads the command line; `stages` becomes a list of `Stage`."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  names = [stage.name for stage in STAGES]
  add('--stages', help=f'names separated by commas: {", ".join([*GROUPS, *names])}; default: speed, with --tiny all')
  add('--budget', type=float, default=400, help='seconds for all stages')
  add('--runs', type=int, help='trainings of fashion-speed and fashion-best; default: 5 seeds, 7 members')
  add('--join', type=pathlib.Path, action='append', default=[], help='results.json of an earlier call; can be repeated')
  add('--tiny', action='store_true', help='small sizes on a CPU, to test this program')
  add(
    '--output', type=pathlib.Path, help='folder of the results; default: experiments/results/gpu, with --tiny runs/tiny'
  )
  options = parser.parse_args(arguments)
  wanted = set((options.stages or ('all' if options.tiny else 'speed')).split(','))
  if unknown := sorted(wanted - set(GROUPS) - set(names)):
    parser.error(f'--stages: no {", ".join(unknown)}; choose from {", ".join([*GROUPS, *names])}')
  if options.runs is not None and options.runs < 1:
    parser.error(f'--runs={options.runs}: at least 1')
  if missing := [str(path) for path in options.join if not path.is_file()]:
    parser.error(f'--join={missing[0]}: there is no such file')
  wanted |= {stage.name for group in wanted & set(GROUPS) for stage in GROUPS[group]}
  options.stages = [with_runs(stage, options.runs) for stage in STAGES if stage.name in wanted]
  options.output = options.output or (worker.ROOT / 'runs' / 'tiny' if options.tiny else tables.RESULTS / 'gpu')
  return options


def with_runs(stage: Stage, runs: int | None) -> Stage:
  """The same stage with this many seeds, or members of an ensemble; one member is trained as a single network."""
  arguments = stage.arguments | {name: runs for name in ('seeds', 'members') if runs and name in stage.arguments}
  if arguments.get('members') == 1:
    del arguments['members']
    return stage._replace(measure=accuracy, arguments=arguments)
  return stage._replace(arguments=arguments)


def describe(tiny: bool) -> dict[str, Any]:
  """Returns `contest.describe`, with the versions of PyTorch and of the driver.

  Raises:
    WorkerError: there is no GPU.
  """
  device = 'cpu' if tiny else 'gpu'
  with worker.Worker(contest.TORCH, device) as torch:  # it starts while JAX does
    machine = contest.describe(device)
    with contextlib.suppress(worker.WorkerError):
      machine['versions'] |= torch.ask('describe')['versions']
  with contextlib.suppress(OSError, subprocess.CalledProcessError):
    command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    machine['versions'] |= {'driver': found[0]} if found and not tiny else {}
  return machine


def run(stages: list[Stage], end: float, machine: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
  """Runs the stages that fit.

  Args:
    stages: in this order.
    end: when the budget ends, by `time.monotonic`.
    machine: see `describe`.
    write: called with a record after each stage. A record has `name`, `kind`, `arguments`, `taken` (seconds), `notes`,
      what the stage returned, and where it comes from. `kind` is 'skipped' or 'failed' if there are no figures.
  """
  for stage in stages:
    left, begin = end - time.monotonic(), time.monotonic()
    print(f'{stage.name}: {left:.0f} s left', flush=True)
    record = {'name': stage.name, 'kind': stage.measure.__name__, 'arguments': stage.arguments, 'notes': []}
    if left < stage.expected:
      note = f'skipped: it takes about {stage.expected:.0f} s, and {max(0, left):.0f} s are left'
      record |= {'kind': 'skipped', 'notes': [note]}
    else:
      try:
        record |= stage.measure(machine, min(left, stage.limit), **stage.arguments)
      except Exception as error:  # whatever it is, the other stages go on
        record |= {'kind': 'failed', 'notes': [worker.one_line(error)]}
    record |= {'taken': time.monotonic() - begin, 'commit': tables.COMMIT}
    record |= {'device': machine['device'], 'versions': dict(machine['versions'])}
    for note in record['notes']:
      print(f'  {note}', flush=True)
    write(json.loads(json.dumps(record)))


def main() -> None:
  """Runs the stages, writes after each, and prints the tables at the end."""
  options, records, begin = parse(), {}, time.monotonic()
  for path in options.join:
    records |= {record['name']: record for record in json.loads(path.read_text())}
  stages = options.stages
  if options.tiny:
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_backend_optimization_level=0'  # compiles in a sixth of the time
    os.environ |= {worker.TINY: '1', 'XLA_FLAGS': flags, 'OMP_NUM_THREADS': '1'}
    stages = [gpu_stages.tiny(stage) for stage in stages]
    for name in gpu_report.FILES:
      (options.output / name).unlink(missing_ok=True)
  options.output.mkdir(parents=True, exist_ok=True)

  def write(record: dict[str, Any]) -> None:
    if record['kind'] not in ('skipped', 'failed') or record['name'] not in records:
      records[record['name']] = record
    order = [stage.name for stage in STAGES]
    found = sorted(records.values(), key=lambda record: order.index(record['name']))
    gpu_report.write(found, options.output)

  signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the processes of a stage, as ^C does
  try:
    machine = describe(options.tiny) if stages else {}
  except worker.WorkerError as error:
    sys.exit(f'error: {error}')
  if not stages:
    for record in list(records.values()):
      write(record)
  run(stages, begin + options.budget, machine, write)
  for name in ('profile.md', 'accuracy.md', 'speed.md'):
    if (options.output / name).exists():
      print((options.output / name).read_text())


if __name__ == '__main__':
  main()
