"""Speed of our network and of its PyTorch twin on a CPU, timed in turns. For a GPU: `experiments.gpu`.

  python -m experiments.benchmark
  python -m experiments.benchmark --modes=training --contenders=ours,forms      # what each form of our layers is worth
  python -m experiments.benchmark --modes=training --contenders=ours,settings   # JAX devices and memory pages

Modes: training (forward, backward, momentum SGD) and inference (log-probabilities). The uint8 images are on the device.
main.py prints the speed of whole epochs with the input pipeline.

Each contender has a process of its own, which is idle while another one is timed. They take turns in alternating order,
and a ratio compares two blocks of the same turn. A contender that cannot run (no PyTorch, no compiler, too little
memory) is left out with a note. JAX uses the devices that main.py would use; "runs on" shows their number. PyTorch is
channels_last with fused SGD; "huge pages" gives it the memory pages that main.py requests for itself. "start" is the
time from starting the process to the end of its first step: caches count, so name an empty folder in
JAX_COMPILATION_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR for a first start. Neither TFDS nor tensorboardX is needed.

The results go to experiments/results/NAME.md and NAME.csv.
"""

import argparse
import itertools
import pathlib
import re
import sys
from typing import Any

from experiments import tables
from experiments.contest import JAX, PRODUCT, TORCH, Contender, Settings, contest, describe
from experiments.tables import CPU_BATCHES, OURS, Case, number
from experiments.worker import WorkerError
from googlenet_jax.host import huge_pages

MODES, DTYPES = ['training', 'inference'], ['float32', 'bfloat16']
DEFAULT_RECIPE = 'configs/default.py'


def contenders(machine: dict[str, Any]) -> dict[str, Contender]:
  """All contenders by name; 'ours/...' are other forms and settings of ours."""
  tuned, compiled = huge_pages.environment(), {'compile_mode': 'default'}
  found = {OURS: Contender(JAX, tuned), 'eager': Contender(TORCH), 'compiled': Contender(TORCH, {}, compiled)}
  if tuned:
    found |= {'eager/huge pages': Contender(TORCH, tuned), 'compiled/huge pages': Contender(TORCH, tuned, compiled)}
    found['ours/4 KB pages'] = Contender(JAX, {huge_pages.VARIABLE: f'{huge_pages.TUNABLE}=0'})
  for count in ('1', '2'):
    found[f'ours/JAX devices: {count}'] = Contender(JAX, tuned | {'JAX_NUM_CPU_DEVICES': count})
  return found | {f'ours/{form}': Contender(JAX, tuned, {'form': form}) for form in machine['forms']}


def chosen(names: list[str] | None, machine: dict[str, Any]) -> dict[str, Contender]:
  """The contenders named; by default ours and PyTorch's. 'forms' and 'settings' stand for several.

  Raises:
    WorkerError: a name is unknown.
  """
  known = contenders(machine)
  forms = [f'ours/{form}' for form in machine['forms']]
  settings = [name for name in known if name.startswith('ours/') and name not in forms]
  groups = {'forms': forms, 'settings': settings}
  default = [name for name in known if '/' not in name or not name.startswith(OURS)]
  wanted = [name for given in names or default for name in groups.get(given, [given])]
  if unknown := [name for name in wanted if name not in known]:
    raise WorkerError(f'no contender {unknown[0]!r}: choose from {"; ".join([*groups, *known])}')
  return {name: known[name] for name in wanted}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """Reads the command line."""
  numbers = lambda text: [int(n) for n in text.split(',')]
  names = lambda text: text.split(',')
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--modes', type=names, default=MODES, help='default: both')
  add('--sizes', type=numbers, default=[32, 96, 224], help='image sizes in pixels')
  add('--batches', type=numbers, help='default: 256, 64, 16 for sizes 32, 96, 224')
  add('--dtypes', type=names, default=['float32'], help='float32, bfloat16')
  add('--contenders', type=names, help='such as ours,eager or ours,forms; a wrong name lists them all')
  add('--config', default=DEFAULT_RECIPE, help='recipe for ours; PyTorch has the default one only')
  add('--repeats', type=int, default=9, help='blocks for each contender')
  add('--block_seconds', type=float, default=2.0, help='approximate length of a block')
  add('--name', help='of the results; default: benchmark_cpu, then the modes and contenders given')
  add('--output', type=pathlib.Path, default=tables.RESULTS, help='folder of the results')
  options = parser.parse_args(arguments)
  for value in (options.repeats, *options.sizes, *(options.batches or ())):
    if value < 1:
      parser.error(f'{value} must be at least 1')
  for given, known in ((options.modes, MODES), (options.dtypes, DTYPES)):
    for name in set(given) - set(known):
      parser.error(f'{name!r} is none of: {", ".join(known)}')
  if options.config != DEFAULT_RECIPE:
    options.contenders = options.contenders or [OURS]
    if any(not name.startswith((OURS, 'forms', 'settings')) for name in options.contenders):
      parser.error(f'--config={options.config}: PyTorch has the network of {DEFAULT_RECIPE} only')
  return options


def measure(case: Case, entries: dict[str, Contender], machine: dict[str, Any], options: Any) -> dict[str, Any]:
  """Times one case: the contenders in turns or, where memory is too small for all, one after another."""
  settings = Settings(options.config, options.repeats, options.block_seconds)
  result = contest(case, entries, machine, settings)
  result['alone'] = any(error.memory for error in result['errors'].values())
  if result['alone'] and len(entries) > 1:
    for name, entry in entries.items():
      single = contest(case, {name: entry}, machine, settings)
      for key in ('seconds', 'errors'):
        result[key].pop(name, None)
      for key in ('seconds', 'made', 'memory', 'products', 'errors'):
        result[key] |= single[key]
      result['multiply_adds'] = result['multiply_adds'] or single['multiply_adds']
  result['errors'] = {name: str(error) for name, error in result['errors'].items()}
  return result


def report(machine: dict[str, Any], results: dict[Case, dict[str, Any]], options: argparse.Namespace) -> pathlib.Path:
  """Writes both files; called after every case, so an interrupted run leaves what it has."""
  by_case = {case: tables.rows(case, result) for case, result in results.items()}
  notes = []
  for case, result in results.items():
    notes += [f'- {case}: {name} is missing: {error}' for name, error in result['errors'].items()]
    if result['alone']:
      notes.append(f'- {case}: timed one after another, because memory is too small for all at once')
  size = PRODUCT['cpu']
  text = [
    tables.written_by(**machine['versions']),
    f'{machine["device"]}, {tables.cores()} CPU cores. Recipe of ours: {options.config}.',
    f'Medians of {options.repeats} blocks of about {options.block_seconds:g} s; a ratio is the median over turns.',
    'GFLOP/s counts convolutions, the backward pass as two forward passes. Beside it stands the share of what a',
    f'{size}x{size} matrix product of that dtype reached in this run, in the faster framework.',
    '',
    tables.summary(by_case),
    tables.details(by_case),
    *notes,
  ]
  path = options.output / f'{options.name or default_name(options)}.md'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(text).rstrip() + '\n')
  path.with_suffix('.csv').write_text(tables.as_csv(by_case))
  return path


def default_name(options: argparse.Namespace) -> str:
  """Names the modes and contenders if they are not the default, so a part does not overwrite the whole."""
  modes = [] if options.modes == MODES else options.modes
  words = ' '.join(['benchmark cpu', *modes, *(options.contenders or [])])
  return '_'.join(re.findall('[a-z0-9]+', words.lower()))


def main() -> None:
  """Times every case and prints as it goes."""
  options = parse()
  try:
    machine = describe('cpu')
    entries = chosen(options.contenders, machine)
  except WorkerError as error:
    sys.exit(f'error: {error}')
  results, path = {}, None
  for mode, dtype, size in itertools.product(options.modes, options.dtypes, options.sizes):
    for batch in options.batches or [CPU_BATCHES.get(size, 16)]:
      case = Case(mode, size, batch, dtype)
      print(case, flush=True)
      results[case] = measure(case, entries, machine, options)
      for row in tables.rows(case, results[case]):
        print(f'  {row["contender"]}: {number(row["images_per_second"])} images/s', flush=True)
      for name, error in results[case]['errors'].items():
        print(f'  {name} is missing: {error}', flush=True)
      path = report(machine, results, options)
  print(path.read_text())


if __name__ == '__main__':
  main()
