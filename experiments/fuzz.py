"""Do damaged or hostile files only ever give one line? Feeds mutated files to every reader.

  python -m experiments.fuzz --count=100000 --output=experiments/results/fuzz     # all readers
  python -m experiments.fuzz --reader=idx,safetensors --count=1000 --output=/tmp/fuzz

Each reader runs in a process of its own. Allowed are the documented result and `UserError` of one line. All else is a
fault: another exception, a crash of the process, more than LONGEST seconds, more than MEMORY bytes, or what an audit
hook sees: a program that is started, a connection, a file that is written outside the folder of the fuzzer, a class
that a pickle asks for. Mutations come from a seed, so each input can be made again; the first input of each kind of
fault is kept in the output.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

from experiments import hostile, hostile_own
from experiments.hostile import Reader

READERS = hostile.READERS | hostile_own.READERS
LONGEST = 10  # seconds for one input
MEMORY = 1 << 30  # bytes that all inputs together may add to the largest memory of the process
FEWER = {'checkpoint': 50}  # a reader that opens many files gets this part of the count
FORBIDDEN = (
  *('os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'subprocess.Popen', 'socket.connect'),
  'pickle.find_class',
)


class Watch:
  """Sees what no reader may do. An audit hook stays for the life of the process, so it can be switched off."""

  def __init__(self, folder: pathlib.Path):
    self.on, self.seen, self._folder = False, [], str(folder)
    sys.addaudithook(self._hook)

  def _hook(self, event: str, arguments: tuple) -> None:
    if not self.on:
      return
    if (
      event in ('os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'subprocess.Popen', 'socket.connect')
      or event == 'pickle.find_class'
    ):
      self.seen.append(f'{event} {arguments}')
    elif event == 'open':
      path, _, flags = arguments
      written = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
      outside = isinstance(path, str | bytes) and not os.path.abspath(os.fsdecode(path)).startswith(
        (self._folder, '/dev/')
      )
      if written and outside:
        self.seen.append(f'writes {path!r}')


def one(reader: Reader, data: bytes, watch: Watch) -> str:
  """Reads an input; returns what came out, in a word. A fault begins with FAULT."""
  from googlenet_jax.host.errors import UserError

  def too_long(*_):
    raise TimeoutError

  before = signal.signal(signal.SIGALRM, too_long)
  signal.alarm(LONGEST)
  watch.seen.clear()
  watch.on = True
  try:
    outcome = reader.read(data)
  except UserError as error:
    outcome = 'UserError' if str(error).splitlines() == [str(error)] else f'FAULT: several lines: {error!r}'
  except TimeoutError:
    outcome = f'FAULT: {LONGEST} s were not enough'
  except Exception as error:
    last = traceback.extract_tb(error.__traceback__)[-1]
    outcome = f'FAULT: {type(error).__name__}: {str(error)[:150]} ({pathlib.Path(last.filename).name}:{last.lineno})'
  finally:
    watch.on = False
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
  if watch.seen:
    outcome = f'FAULT: {watch.seen[0][:200]}'
  return outcome


def forget_peak() -> None:
  """Lets the largest memory of this process begin anew, on Linux."""
  pathlib.Path('/proc/self/clear_refs').write_text('5')


def peak() -> int:
  """Returns the largest memory of this process since `forget_peak`, in bytes."""
  return 1024 * int(re.search(r'VmHWM:\s*(\d+)', pathlib.Path('/proc/self/status').read_text())[1])


def fuzz(name: str, count: int, seed: int, folder: pathlib.Path, keep: pathlib.Path | None = None) -> dict[str, Any]:
  """Feeds `count` inputs to a reader.

  Args:
    name: of READERS.
    count: number of inputs.
    seed: decides the inputs.
    folder: the reader may write here.
    keep: folder for inputs that are faults: one of each kind.

  Returns:
    What came out how often, faults first; and bytes that the largest memory grew by.
  """
  os.chdir(folder)  # whatever writes to a relative path writes here, and is seen
  reader, rng, found = READERS[name](folder), random.Random(f'{name} {seed}'), collections.Counter()
  watch = Watch(folder)
  for data in list(reader.seeds) if name != 'caches' else []:
    found[one(reader, data, watch)] += 1
  forget_peak()
  before, begin = peak(), time.perf_counter()
  for _ in range(count):
    data = reader.make(rng)
    (folder / 'under_way').write_bytes(data)  # if the process dies, this was it
    outcome = one(reader, data, watch)
    if outcome.startswith('FAULT') and outcome not in found and keep is not None:
      keep.mkdir(parents=True, exist_ok=True)
      (keep / f'{name}_{len([key for key in found if key.startswith("FAULT")])}').write_bytes(data)
    found[outcome] += 1
  if (folder / 'executed').exists():
    found['FAULT: a program was executed'] += 1
  grown = peak() - before
  if grown > MEMORY:
    found[f'FAULT: memory grew by {grown / 1e6:.0f} MB'] += 1
  order = sorted(found.items(), key=lambda item: (not item[0].startswith('FAULT'), -item[1]))
  return {'inputs': sum(found.values()), 'seconds': time.perf_counter() - begin, 'grown': grown, 'found': dict(order)}


def in_process(name: str, count: int, seed: int, keep: pathlib.Path) -> dict[str, Any]:
  """Fuzzes a reader in a new process, which may die."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix=f'fuzz_{name}_', dir='/dev/shm' if os.path.isdir('/dev/shm') else None))
  command = [sys.executable, '-m', 'experiments.fuzz', f'--reader={name}', f'--count={count}', f'--seed={seed}']
  done = subprocess.run([*command, f'--inside={folder}', f'--output={keep}'], capture_output=True, text=True)
  try:
    return json.loads(done.stdout.splitlines()[-1])
  except (IndexError, ValueError):
    keep.mkdir(parents=True, exist_ok=True)
    if (folder / 'under_way').exists():
      shutil.copy(folder / 'under_way', keep / f'{name}_died')
    return {
      'inputs': 0,
      'seconds': 0,
      'grown': 0,
      'found': {f'FAULT: died ({done.returncode}): {done.stderr[-300:]}': 1},
    }
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def write(results: dict[str, Any], output: pathlib.Path, seed: int) -> None:
  """Writes `fuzz.json` and `fuzz.md`; results of readers that did not run now stay."""
  from experiments.kill_runs import commit

  path = output / 'fuzz.json'
  kept = json.loads(path.read_text()) if path.exists() else {}
  now = {name: {**found, 'commit': commit(), 'seed': seed} for name, found in results.items()}
  kept = {name: ({**kept, **now})[name] for name in READERS if name in {**kept, **now}}
  path.write_text(json.dumps(kept, indent=2) + '\n')
  lines = [
    '# Damaged and hostile files',
    '',
    '`python -m experiments.fuzz`: mutated files for every reader. Allowed are the documented result and one line of',
    'UserError. "Memory" is how much the largest memory of the process grew. "Largest input" has its own limit.',
    '',
    '| reader | commit | inputs | seconds | memory, MB | faults | outcomes |',
    '|---|---|---|---|---|---|---|',
  ]
  for name, one in kept.items():
    faults = sum(count for what, count in one['found'].items() if what.startswith('FAULT'))
    outcomes = ', '.join(f'{what} {count:,}' for what, count in one['found'].items() if not what.startswith('FAULT'))
    lines.append(
      f'| {name} | {one["commit"]} | {one["inputs"]:,} | {one["seconds"]:.0f} | {one["grown"] / 1e6:.0f} | {faults} | '
      f'{outcomes} |'
    )
  (output / 'fuzz.md').write_text('\n'.join(lines).replace(' "Largest input" has its own limit.', '') + '\n')


def main() -> None:
  """Fuzzes, writes the report, and fails if there was a fault."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--reader', default=','.join(READERS), help='several are separated by commas')
  parser.add_argument('--count', type=int, default=100_000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--inside', type=pathlib.Path, help='for the processes that this one starts')
  options = parser.parse_args()
  if options.inside:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff prints about each damaged file
    found = fuzz(options.reader, options.count, options.seed, options.inside.resolve(), options.output.resolve())
    print(json.dumps(found))
    return
  options.output.mkdir(parents=True, exist_ok=True)
  results, failed = {}, False
  for name in options.reader.split(','):
    count = options.count // FEWER.get(name, 1)
    results[name] = found = in_process(name, count, options.seed, options.output / 'faults')
    faults = {what: count for what, count in found['found'].items() if what.startswith('FAULT')}
    failed |= bool(faults)
    print(f'{name}: {found["inputs"]:,} inputs in {found["seconds"]:.0f} s, {sum(faults.values())} faults', flush=True)
    for what, number in list(faults.items())[:12]:
      print(f'  {number} x {what}', flush=True)
    write(results, options.output, options.seed)
  sys.exit(failed)


if __name__ == '__main__':
  main()
