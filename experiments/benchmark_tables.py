"""The numbers of experiments/benchmark.py as tables, and what other experiments share with it."""

import contextlib
import csv
import io
import os
import pathlib
import platform
import shlex
import statistics
import sys
from typing import Any, NamedTuple

# Published dense peaks in FLOP/s: bfloat16, and TF32, in which both frameworks multiply float32 on a GPU here.
PEAKS = {
  'NVIDIA H100 80GB HBM3': {'bfloat16': 989e12, 'float32': 494.5e12},
  'NVIDIA H200': {'bfloat16': 989e12, 'float32': 494.5e12},
  'NVIDIA A100-SXM4-40GB': {'bfloat16': 312e12, 'float32': 156e12},
  'NVIDIA A100-SXM4-80GB': {'bfloat16': 312e12, 'float32': 156e12},
}
OURS = 'ours'
CPU_BATCHES = {32: 256, 96: 64, 224: 16}  # by pixels


def cores() -> int:
  """How many cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def command() -> str:
  """The command that is running, as a result names it."""
  return shlex.join(['python', f'experiments/{pathlib.Path(sys.argv[0]).name}', *sys.argv[1:]])


def cpu_model() -> str:
  """What CPU this is: on Linux with family, model and vector width, as processors of one name differ in them."""
  fields = {}
  with contextlib.suppress(OSError):
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      name, _, value = line.partition(':')
      fields.setdefault(name.strip(), value.strip())
  if 'model name' not in fields:
    return platform.processor() or platform.machine()
  details = [f'{key} {fields[key]}' for key in ('cpu family', 'model') if key in fields]
  flags = fields.get('flags', '').split()
  if 'avx512f' in flags:
    details.append('AVX-512')
  elif 'avx2' in flags:
    details.append('AVX2')
  return fields['model name'] + (f' ({", ".join(details)})' if details else '')


class Case(NamedTuple):
  """What is timed: `mode` is training, inference or epochs."""

  mode: str
  image_size: int
  batch_size: int
  dtype: str

  def __str__(self) -> str:
    return f'{self.mode}, {self.image_size} px, batch {self.batch_size}, {self.dtype}'


def quartiles(values: list[float]) -> tuple[float, float, float]:
  """First quartile, median, third quartile; of one value, that value three times."""
  if len(values) == 1:
    return (values[0],) * 3
  return tuple(statistics.quantiles(values, n=4, method='inclusive'))


def rows(case: Case, result: dict[str, Any], device: str) -> list[dict[str, Any]]:
  """One row a contender.

  Args:
    case: what was timed.
    result: `seconds` (contender to seconds a step, by block), `multiply_adds` of a step, `product` (FLOP/s of a large
      matrix product) and `steps_per_epoch` (None but for epochs).
    device: name, to look its published peak up.

  Returns:
    Dictionaries with the same keys; where there is no number, None. `ratio` is how many times faster ours is: the
    median over blocks of the seconds of this contender over ours in the same block.
  """
  out = []
  peak = PEAKS.get(device, {}).get(case.dtype)
  ours = result['seconds'].get(OURS)
  for name, seconds in result['seconds'].items():
    low, middle, high = quartiles([case.batch_size / s for s in seconds])
    ratios = quartiles([s / o for s, o in zip(seconds, ours, strict=True)]) if ours else (None,) * 3
    rate = 2 * result['multiply_adds'] / case.batch_size * middle if result['multiply_adds'] else None
    out.append(
      {
        **case._asdict(),
        'contender': name,
        'images_per_second': middle,
        'first_quartile': low,
        'third_quartile': high,
        'ratio': ratios[1],
        'ratio_first_quartile': ratios[0],
        'ratio_third_quartile': ratios[2],
        'gflops': rate and rate / 1e9,
        'share_of_product': rate / result['product'] if rate and result['product'] else None,
        'share_of_peak': rate / peak if rate and peak else None,
        'epoch_seconds': result['steps_per_epoch'] and result['steps_per_epoch'] * statistics.median(seconds),
      }
    )
  return out


def best(case_rows: list[dict[str, Any]], contenders: list[str]) -> dict[str, Any] | None:
  """The fastest of the contenders named, None if none of them ran."""
  candidates = [row for row in case_rows if row['contender'] in contenders]
  return max(candidates, key=lambda row: row['images_per_second'], default=None)


def number(value: float | None, form: str = '.3g') -> str:
  """A number for a table, whole from 100 on."""
  if value is None:
    return '-'
  return f'{value:,.0f}' if form == '.3g' and abs(value) >= 100 else f'{value:{form}}'


def table(head: list[str], lines: list[list[str]]) -> str:
  """Markdown."""
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in [head, ['---'] * len(head), *lines]) + '\n'


def publish(text: str, path: pathlib.Path) -> None:
  """Prints a result and writes it."""
  print(text)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)


def comparison(by_case: dict[Case, list[dict[str, Any]]], stock: list[str], all_names: list[str]) -> str:
  """The table of a line a case: ours against the best PyTorch, as it comes and with huge pages."""
  head = ['', 'pixels', 'batch', 'dtype', 'ours, images/s', 'best stock PyTorch', 'ours / it', 'best PyTorch at all']
  lines = []
  for case, case_rows in by_case.items():
    ours = best(case_rows, [OURS])
    cells = []
    for names in (stock, all_names):
      row = best(case_rows, names)
      cells += [
        f'{number(row["images_per_second"])} ({row["contender"]})' if row else '-',
        number(row and row['ratio']),
      ]
    lines.append([case.mode, str(case.image_size), str(case.batch_size), case.dtype])
    lines[-1] += [number(ours and ours['images_per_second']), *cells]
  return table([*head, 'ours / it'], lines)


def details(by_case: dict[Case, list[dict[str, Any]]]) -> str:
  """The table of a line a contender and case."""
  keys = ['gflops', 'share_of_product', 'share_of_peak', 'epoch_seconds']
  head = ['', 'pixels', 'batch', 'dtype', 'contender', 'images/s', 'quartiles', 'ours / it', 'quartiles', 'GFLOP/s']
  head += ['of a matrix product', 'of the peak', 's an epoch']
  lines = []
  for case, case_rows in by_case.items():
    for row in case_rows:
      lines.append([case.mode, str(case.image_size), str(case.batch_size), case.dtype, row['contender']])
      lines[-1] += [number(row['images_per_second'])]
      lines[-1] += [f'{number(row["first_quartile"])} to {number(row["third_quartile"])}', number(row['ratio'])]
      ratios = [number(row[f'ratio_{which}_quartile']) for which in ('first', 'third')]
      lines[-1] += [' to '.join(ratios), *[number(row[key]) for key in keys]]
  kept = [i for i in range(len(head)) if any(line[i] != '-' for line in lines)]
  return table([head[i] for i in kept], [[line[i] for i in kept] for line in lines])


def as_csv(by_case: dict[Case, list[dict[str, Any]]]) -> str:
  """All rows, comma separated."""
  all_rows = [row for case_rows in by_case.values() for row in case_rows]
  text = io.StringIO()
  if all_rows:
    writer = csv.DictWriter(text, all_rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(all_rows)
  return text.getvalue()
