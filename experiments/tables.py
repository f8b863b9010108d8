"""Tables of results, and what machine, versions and commit they come from."""

import contextlib
import csv
import importlib.metadata
import io
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np

from experiments.worker import ROOT

OURS = 'ours'
CPU_BATCHES = {32: 256, 96: 64, 224: 16}  # by image size in pixels
QUARTILES = (0.25, 0.5, 0.75)
RESULTS = ROOT / 'experiments' / 'results'


def cores() -> int:
  """Number of CPU cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def cpu_model() -> str:
  """Name of the CPU; on Linux with family, model and vector width, because one name can mean several processors."""
  fields = {}
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      name, _, value = line.partition(':')
      fields.setdefault(name.strip(), value.strip())
  if 'model name' not in fields:
    return platform.processor() or platform.machine()
  details = [f'{key} {fields[key]}' for key in ('cpu family', 'model') if key in fields]
  flags = fields.get('flags', '').split()
  details += ['AVX-512'] if 'avx512f' in flags else ['AVX2'] if 'avx2' in flags else []
  return fields['model name'] + (f' ({", ".join(details)})' if details else '')


def _commit() -> str:
  """The commit that is checked out, with a '+' if files have changed since; without git, the environment's COMMIT."""
  try:
    run = lambda *words: subprocess.run(['git', *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return run('rev-parse', '--short', 'HEAD').strip() + '+' * bool(run('status', '--porcelain', '-uno').strip())
  except (OSError, subprocess.CalledProcessError):
    return os.environ.get('COMMIT', '')


COMMIT = _commit()  # when the script starts


def written_by(*packages: str, **versions: str) -> str:
  """One line: the running command, the commit, and the versions of Python, of `packages` installed here and others."""
  command = shlex.join(['python', '-m', f'experiments.{pathlib.Path(sys.argv[0]).stem}', *sys.argv[1:]])
  versions = {'Python': platform.python_version()} | {p: importlib.metadata.version(p) for p in packages} | versions
  at = f' at commit {COMMIT}' if COMMIT else ''
  return f'Written by `{command}`{at}; {", ".join(map(" ".join, versions.items()))}.'


def number(value: float | None) -> str:
  """A number with three digits, or all digits from 100 on; '-' for None."""
  return '-' if value is None else f'{value:,.0f}' if abs(value) >= 100 else f'{value:.3g}'


def table(head: list[str], lines: list[list[str]]) -> str:
  """A Markdown table."""
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in [head, ['---'] * len(head), *lines]) + '\n'


def publish(text: str, path: pathlib.Path) -> None:
  """Prints a result and writes it."""
  print(text)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text.rstrip() + '\n')


class Case(NamedTuple):
  """What is timed: `mode` is 'training' or 'inference'."""

  mode: str
  image_size: int
  batch_size: int
  dtype: str

  def __str__(self) -> str:
    return f'{self.mode}, {self.image_size} px, batch {self.batch_size}, {self.dtype}'


def rows(case: Case, result: dict[str, Any]) -> list[dict[str, Any]]:
  """One row for each contender.

  Args:
    case: what was timed.
    result: see `benchmark.contest`.

  Returns:
    Dictionaries with the same keys; None where a number is missing. `ratio` says how many times faster ours is: the
    median over turns of the contender's seconds divided by ours in the same turn.
  """
  out = []
  ours = result['seconds'].get(OURS)
  product = max(map(statistics.median, result['products'].values()), default=None)  # in the faster framework
  for name, seconds in result['seconds'].items():
    low, middle, high = np.quantile([case.batch_size / s for s in seconds], QUARTILES)
    ratios = np.quantile(np.divide(seconds, ours), QUARTILES) if ours else (None,) * 3
    rate = 2 * result['multiply_adds'] / case.batch_size * middle if result['multiply_adds'] else None
    made, (host, gpu) = result['made'][name], result['memory'][name]
    out.append(
      {
        **case._asdict(),
        'contender': name,
        'runs_on': made['runs_on'],
        'images_per_second': middle,
        'first_quartile': low,
        'third_quartile': high,
        'ratio': ratios[1],
        'ratio_first_quartile': ratios[0],
        'ratio_third_quartile': ratios[2],
        'gflops': rate and rate / 1e9,
        'share_of_product': rate / product if rate and product else None,
        'start_seconds': made['start'],
        'memory_mib': host and host / 2**20,
        'gpu_memory_mib': gpu and gpu / 2**20,
        'seconds_per_step': ' '.join(f'{s:.6g}' for s in seconds),
      }
    )
  return out


def summary(by_case: dict[Case, list[dict[str, Any]]]) -> str:
  """One line for each case: ours, every PyTorch, and ours divided by the best of them; empty without PyTorch.

  'Stock' PyTorch runs without the huge pages that our program requests.
  """
  rows = [row for case_rows in by_case.values() for row in case_rows]
  names = [n for n in dict.fromkeys(row['contender'] for row in rows) if not n.startswith(f'{OURS}/')]
  others = [n for n in names if n != OURS]
  if not others:
    return ''
  stock, lines = [n for n in others if 'huge pages' not in n], []
  for case, case_rows in by_case.items():
    found = {row['contender']: row for row in case_rows}
    speeds = [found[n]['images_per_second'] if n in found else None for n in names]
    times = [f' ({1e3 * case.batch_size / speed:.3g} ms)' if speed else '' for speed in speeds]
    ratio = lambda group: min([found[n]['ratio'] for n in group if n in found and found[n]['ratio']], default=None)  # noqa: B023
    ratios = [number(ratio(group)) for group in ((stock, others) if stock != others else (others,))]
    lines.append([*map(str, case), *map(''.join, zip(map(number, speeds), times, strict=True)), *ratios])
  last = ['ours / best stock PyTorch', 'ours / best'] if stock != others else ['ours / best PyTorch']
  return table(['', 'pixels', 'batch', 'dtype', *names, *last], lines)


def details(by_case: dict[Case, list[dict[str, Any]]]) -> str:
  """One line for each contender and case; columns without any number are left out."""
  keys = {'gflops': 'GFLOP/s', 'share_of_product': 'of a matrix product', 'start_seconds': 'start, s'}
  keys |= {'memory_mib': 'peak MiB', 'gpu_memory_mib': 'peak MiB on the GPU'}
  head = ['', 'pixels', 'batch', 'dtype', 'contender', 'runs on', 'images/s', 'quartiles', 'ours / it', 'quartiles']
  lines = []
  for case, case_rows in by_case.items():
    for row in case_rows:
      speed = [number(row[key]) for key in ('images_per_second', 'first_quartile', 'third_quartile')]
      ratio = [number(row[key]) for key in ('ratio', 'ratio_first_quartile', 'ratio_third_quartile')]
      spread = [cell for own, low, high in (speed, ratio) for cell in (own, '-' if low == '-' else f'{low} to {high}')]
      lines.append([*map(str, case), row['contender'], row['runs_on'], *spread, *(number(row[key]) for key in keys)])
  head += keys.values()
  kept = [i for i in range(len(head)) if any(line[i] != '-' for line in lines)]
  return table([head[i] for i in kept], [[line[i] for i in kept] for line in lines])


def as_csv(by_case: dict[Case, list[dict[str, Any]]]) -> str:
  """All rows, separated by commas."""
  all_rows = [row for case_rows in by_case.values() for row in case_rows]
  text = io.StringIO()
  if all_rows:
    writer = csv.DictWriter(text, all_rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(all_rows)
  return text.getvalue()
