"""Is anything lost when a run is killed at any moment? Kills real runs with SIGKILL and continues them.

  python -m experiments.kill_runs --kills=220 --jobs=2 --output=experiments/results/killed

Each run is a process forked from this one, which has imported the program and nothing else: then a start takes no
seconds. The network is narrow (`experiments/narrow.py`), the data set is a folder of two classes of the digits, and
everything that could make two runs differ is on. A chain of kills works in one workdir: the same command starts again
after each kill, until the run ends. Then its parameters must have the bits of a run that nobody disturbed,
`metrics.jsonl` the same lines apart from speeds, and each file must be whole. After each kill, too, no file may be half
written. Kills fall at random moments, as many in each phase of a run, and inside the writing of each file. Some chains
begin with SIGTERM in the first batch statistics, and kill the run while it writes that checkpoint anew.

`experiments/kill_cases.py` has other signals and troubles. All takes about a quarter of an hour on two idle cores.
"""

import argparse
import collections
import concurrent.futures
import functools
import json
import multiprocessing
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from experiments import kill_cases, kill_plan, narrow
from experiments.kill_checks import Report, differences, half_written
from experiments.kill_plan import ANEW, BACKGROUND, Kill
from experiments.narrow_runs import ROOT, Ended, Runs, small_run


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
  mark, name = {'a step': ('.', None), BACKGROUND: ('-', 'saving')}.get(kill.what, ('+', kill.what))
  if run.wait_for(lambda run: sum(e.mark == mark and name in (None, e.name) for e in run.events) > skipped):
    run.sleep(kill.delay)
    run.send(signal.SIGKILL)
  return run.end()


def stop_in_first_statistics(runs: Runs, workdir: pathlib.Path, cache: pathlib.Path) -> Ended:
  """Starts a run whose first step that is saved is evaluated too, and ends it by SIGTERM before that."""
  run = runs.start(workdir, cache, flags=['--config.checkpoint_every_steps=0'])
  run.wait_for(lambda run: any(event.name == 'batch statistics' for event in run.events))
  run.send(signal.SIGTERM)
  return run.end()


def kill_chain(runs: Runs, number: int, chain: Sequence[Kill], full_cache: pathlib.Path) -> Report:
  """Kills a run as often as the chain says, lets it end, and compares it."""
  report = Report()
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
  if chain[0].what == ANEW:
    ended = stop_in_first_statistics(runs, workdir, cache)
    report.starts += 1
    places.append('stopped in the first batch statistics')
    problems = [] if ended.status == 128 + signal.SIGTERM else [f'status {ended.status}: {ended.err[-300:]}']
    report.note(f'chain {number}, SIGTERM', problems, ended)
  for kill in chain:
    spans = runs.phases.get(f'file {kill.what}') or runs.phases.get(f'(file {kill.what})') or runs.phases.get(kill.what)
    between = [begin for begin, _ in spans or () if before <= begin < kill.seconds]
    ended = run_and_kill(runs, workdir, cache, kill, len(between))
    report.starts += 1
    report.asked += 1
    if ended.status != -signal.SIGKILL:
      report.missed += 1  # it ended before it came there
      problems = [f'status {ended.status}: {ended.err[-300:]}'] if ended.status else []
      report.note(f'chain {number}, after {places}', problems, ended)
      continue
    where = kill_plan.fell(ended.events, workdir)
    before = kill.seconds
    places.append(f'{where}{f", {kill.moment}" * bool(kill.moment)}')
    report.kills += 1
    report.fell[places[-1]] += 1
    if workdir.exists():
      report.note(f'chain {number}, after {places}', half_written(workdir), ended)
  ended = runs.start(workdir, cache).end()
  report.starts += 1
  report.chains += 1
  problems = [f'status {ended.status}: {ended.err[-500:]}'] if ended.status else differences(workdir, runs.reference)
  report.note(f'chain {number}, {places}', problems, ended)
  print(f'chain {number}: {"; ".join(places)}: {"; ".join(problems) or "equal"}', flush=True)
  shutil.rmtree(cache)
  if not problems:
    shutil.rmtree(workdir)
  return report


def measure(options: argparse.Namespace, folder: pathlib.Path) -> Report:
  """Does everything in `folder`, and writes the report after each chain: a long measurement may be cut off."""
  begin, rng, report = time.perf_counter(), random.Random(options.seed), Report()
  commit()
  narrow.import_program()
  runs = Runs(folder, small_run(folder / 'pictures'), draw=bool(options.kills or options.rounds))
  cache = folder / 'cache'
  runs.reference = folder / 'reference'
  whole = first = runs.start(runs.reference, cache).end()
  if first.status:
    raise SystemExit(f'the undisturbed run ended with {first.status}: {first.err[-2000:]}')
  if options.kills or options.rounds:  # nothing is compiled now, so phases are as long as in the runs that are killed
    whole = runs.start(folder / 'again', cache).end()
    report.note('two undisturbed runs', differences(folder / 'again', runs.reference))
  runs.phases = kill_plan.phases_of(whole.events)
  for name, spans in kill_plan.phases_of(first.events).items():  # the first one wrote caches too
    runs.phases.setdefault(name, [(min(start, 1.0), 1.0) for start, _ in spans])
  if options.kills:
    found = [kill_plan.anew(rng) for _ in range(options.kills // 37)]
    found += kill_plan.chains(kill_plan.wanted(runs.phases, options.kills - 3 * len(found), rng), rng)
  else:
    found = [kill_plan.few(runs.phases)]
  # The first fork of each worker comes before its first thread, and a run is a fork of a worker.
  with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context('fork')) as pool:
    futures = [pool.submit(kill_chain, runs, number, chain, cache) for number, chain in enumerate(found)]
    for number in range(options.rounds):
      futures += [
        pool.submit(kill_cases.try_case, runs, cache, case, number, options.seed) for case in kill_cases.CASES
      ]
    for future in concurrent.futures.as_completed(futures):
      report.add(future.result())
      write(report, time.perf_counter() - begin, options)
  return report


@functools.cache  # at the start: others may commit meanwhile
def commit() -> str:
  """Returns the commit of the program; a copy without Git has it in the file COMMIT."""
  kept = ROOT / 'COMMIT'
  if kept.exists():
    return kept.read_text().strip()
  return subprocess.run(
    ['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True
  ).stdout.strip()


def write(report: Report, seconds: float, options: argparse.Namespace) -> None:
  """Writes `killed.json` and `killed.md`."""
  options.output.mkdir(parents=True, exist_ok=True)
  found = {
    'commit': commit(),
    'command': f'python -m experiments.kill_runs --kills={options.kills} --jobs={options.jobs} --seed={options.seed}',
    'minutes': round(seconds / 60, 1),
    **vars(report),
  }
  (options.output / 'killed.json').write_text(json.dumps(found, indent=2) + '\n')
  total = collections.Counter()
  for place, count in report.fell.items():
    total[place.partition(',')[0]] += count
  lines = [
    '# Runs killed at any moment',
    '',
    f'`{found["command"]}`, commit {found["commit"]}, {found["minutes"]} minutes.',
    '',
    f'{report.kills} kills (SIGKILL) in {report.chains} workdirs, with {report.starts} starts of the program. '
    f'{options.kills or report.asked} kills were asked; {report.missed} runs ended before their kill. Differences from '
    f'a run that nobody disturbed, and tracebacks: {len(report.wrong)}.',
    '',
    *[f'- {line}' for line in report.wrong],
    '',
    '| where the kill fell | kills |',
    '|---|---|',
    *[f'| {place} | {count} |' for place, count in sorted(total.items())],
    f'| all | {report.kills} |',
    '',
    '| case | last lines of the run | at the end |',
    '|---|---|---|',
    *[f'| {case["case"]} | {case["said"]} | {case["then"]} |' for case in report.cases],
  ]
  (options.output / 'killed.md').write_text('\n'.join(lines) + '\n')


def main() -> None:
  """Measures, writes the report, and fails if anything was wrong."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=220, help='0: one chain of two, for the tests')
  parser.add_argument('--jobs', type=int, default=1, help='runs at the same time')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--rounds', type=int, default=1, help='how often each other case is tried')
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--folder', type=pathlib.Path, help='where to work; it stays')
  options = parser.parse_args()
  folder = options.folder or pathlib.Path(tempfile.mkdtemp(prefix='killed_'))
  folder.mkdir(parents=True, exist_ok=True)
  for path in options.output.glob('killed*'):  # an earlier measurement
    path.unlink()
  report = measure(options, folder)
  if options.folder is None:
    shutil.rmtree(folder)
  print(f'{report.kills} kills of {report.asked} asked, {len(report.wrong)} differences, in {options.output}')
  sys.exit(bool(report.wrong))


if __name__ == '__main__':
  main()
