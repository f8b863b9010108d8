"""Does a long run stay as it began? Memory, files, threads, speed and logs over more than 20,000 steps and 200 epochs.

  python -m experiments.long_run --epochs=205 --output=experiments/results/long_run

The network is narrow and the images are small (`experiments/narrow.py`), so an epoch of 102 steps takes seconds with
its evaluation, checkpoint and curves. The kernel's figures of the process (/proc) are read twice a second.
"""

import argparse
import collections
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from typing import Any

import numpy as np

from experiments import narrow
from experiments.kill_runs import commit
from experiments.narrow_runs import ROOT, Runs

OVERRIDES = {
  'image_size': 8,
  'batch_size': 14,  # 1,437 images: 102 steps an epoch
  'data.validation_examples': 9,
  'model.stem': 'small',
  'average_decay': 0.99,
  'log_every_steps': 20,
  'evaluate_every_epochs': 1,
}
INTERVAL = 0.5  # seconds between two looks at the process


def look(pid: int, workdir: pathlib.Path) -> dict[str, float]:
  """Reads the figures of a process, and the sizes of what it writes."""
  process = pathlib.Path(f'/proc/{pid}')
  lines = dict(line.split(':', 1) for line in (process / 'status').read_text().splitlines())
  size = lambda pattern: sum(path.stat().st_size for path in workdir.glob(pattern))
  return {
    'memory_mb': int(lines['VmRSS'].split()[0]) / 1024,
    'threads': int(lines['Threads']),
    'files': len(os.listdir(process / 'fd')),
    'metrics_kb': size('metrics.jsonl') / 1024,
    'events_kb': size('tensorboard/*') / 1024,
    'checkpoints': len([path for path in workdir.glob('checkpoints/*') if path.name.isdigit()]),
  }


def watch(epochs: int, folder: pathlib.Path) -> tuple[list[dict[str, float]], dict[str, list[list[float]]], list[dict]]:
  """Trains, and looks on.

  Returns:
    Figures by time, each with `seconds` and `step`; for each phase, when it began and how long it took; and the records
    of metrics.jsonl.
  """
  narrow.import_program()
  flags = [f'--config.{name}={value}' for name, value in {**OVERRIDES, 'epochs': epochs}.items()]
  runs, workdir = Runs(folder, [f'--config={ROOT}/configs/digits.py', *flags]), folder / 'run'
  run, step, begun, seen = runs.start(workdir, folder / 'cache'), 0, {}, 0
  figures, phases = [], collections.defaultdict(list)
  while not run.closed:
    until = time.perf_counter() + INTERVAL
    while not run.closed and time.perf_counter() < until:
      run.read(until - time.perf_counter())
    for event in run.events[seen:]:
      if event.mark == '.':
        step = int(event.name.removeprefix('step '))
      elif event.mark == '+':
        begun[event.name] = event.seconds
      elif event.name in begun:
        phases[event.name].append([begun[event.name], event.seconds - begun[event.name]])
    seen = len(run.events)
    try:
      figures.append({'seconds': time.perf_counter() - run.begin, 'step': step, **look(run.pid, workdir)})
    except (FileNotFoundError, KeyError):  # the workdir is not there yet, or the process has ended
      continue
  ended = run.end()
  if ended.status:
    raise SystemExit(f'the run ended with {ended.status}: {ended.err[-2000:]}')
  records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return figures, dict(phases), records


def tenth(values: list[float], part: int) -> float:
  """Returns the median of the second or of the last tenth of some values; the first tenth warms up."""
  count = max(len(values) // 10, 1)
  return float(np.median(values[count : 2 * count] if part == 1 else values[-count:]))


def compared(figures: list[dict], phases: dict[str, list[list[float]]], records: list[dict]) -> dict[str, Any]:
  """Returns each figure early in the run and at its end."""
  trained = [one for one in figures if one['step'] > 0]
  columns = {name: [one[name] for one in trained] for name in ('memory_mb', 'threads', 'files', 'checkpoints')}
  columns['examples_per_second'] = [r['examples_per_second'] for r in records if r['split'] == 'train']
  for name in ('evaluation', 'saving', 'drawing curves', 'batch statistics'):
    columns[f'{name}, ms'] = [1000 * seconds for _, seconds in phases[name]]
  found = {name: {'early': tenth(v, 1), 'late': tenth(v, -1), 'most': max(v)} for name, v in columns.items()}
  for name in ('metrics_kb', 'events_kb'):
    found[name] = {'early': trained[len(trained) // 10][name], 'late': trained[-1][name], 'most': trained[-1][name]}
  return found


def draw(figures: list[dict], phases: dict[str, list[list[float]]], records: list[dict], path: pathlib.Path) -> None:
  """Draws the figures by step."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  trained = [one for one in figures if one['step'] > 0]
  figure = Figure(figsize=(8, 9), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots(6, sharex=True)
  steps = [one['step'] for one in trained]
  for axis, (names, label) in zip(
    axes,
    [
      (['memory_mb'], 'memory, MB'),
      (['files', 'threads', 'checkpoints'], 'number of'),
      (['metrics_kb', 'events_kb'], 'size, kB'),
    ],
    strict=False,
  ):
    for name in names:
      axis.plot(steps, [one[name] for one in trained], label=name.split('_')[0])
    axis.set_ylabel(label)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)
  speeds = [r for r in records if r['split'] == 'train']
  axes[3].plot([r['step'] for r in speeds], [r['examples_per_second'] for r in speeds], linewidth=0.5)
  axes[3].set_ylabel('images a second')
  for axis, name in ((axes[4], 'drawing curves'), (axes[5], 'evaluation')):
    seconds = [begin for begin, _ in phases[name]]
    axis.plot(np.interp(seconds, [o['seconds'] for o in trained], steps), [1000 * took for _, took in phases[name]])
    axis.set_ylabel(f'{name}, ms')
  for axis in axes[3:]:
    axis.set_ylim(bottom=0)
  axes[5].set_xlabel('step')
  figure.savefig(path, dpi=100)


def write(figures: list[dict], phases: dict[str, list[list[float]]], records: list[dict], output: pathlib.Path) -> None:
  """Writes `long_run.json`, `.md` and `.png`."""
  output.mkdir(parents=True, exist_ok=True)
  found = compared(figures, phases, records)
  last, tests = records[-1], [r for r in records if r['split'] == 'test']
  about = {
    'commit': commit(),
    'command': f'python -m experiments.long_run --epochs={round(last["epoch"])}',
    'steps': last['step'],
    'epochs': last['epoch'],
    'evaluations': len(tests),
    'lines_of_metrics': len(records),
    'seconds': figures[-1]['seconds'],
  }
  (output / 'long_run.json').write_text(json.dumps({**about, 'figures': found}, indent=2) + '\n')
  lines = [
    '# A long run',
    '',
    f'`{about["command"]}`, commit {about["commit"]}, {os.cpu_count()} CPU cores, which other programs used as well:',
    f'{about["steps"]:,} steps, {about["epochs"]:.0f} epochs, {about["evaluations"]} evaluations, '
    f'{about["lines_of_metrics"]:,} lines of metrics.jsonl, {about["seconds"] / 60:.0f} minutes.',
    '"Early" is the median of the second tenth of the run, "late" of the last tenth.',
    '',
    '| | early | late | most |',
    '|---|---|---|---|',
    *[f'| {name} | {one["early"]:,.1f} | {one["late"]:,.1f} | {one["most"]:,.1f} |' for name, one in found.items()],
    '',
    '![figures by step](long_run.png)',
  ]
  (output / 'long_run.md').write_text('\n'.join(lines) + '\n')
  draw(figures, phases, records, output / 'long_run.png')


def main() -> None:
  """Measures and writes."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--epochs', type=int, default=205)
  parser.add_argument('--output', type=pathlib.Path, required=True)
  options = parser.parse_args()
  folder = pathlib.Path(tempfile.mkdtemp(prefix='long_run_'))
  write(*watch(options.epochs, folder), options.output)
  shutil.rmtree(folder)
  print((options.output / 'long_run.md').read_text())


if __name__ == '__main__':
  sys.exit(main())
