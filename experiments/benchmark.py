"""Speed of our network and of its PyTorch twin, timed in turns on one machine.

  python -m experiments.benchmark
  python -m experiments.benchmark --device=gpu --sizes=224 --batches=256 --dtypes=bfloat16 --modes=training
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
import time
from typing import Any, NamedTuple

from experiments import tables
from experiments.tables import CPU_BATCHES, OURS, Case, number
from experiments.worker import Worker, WorkerError
from googlenet_jax.host import huge_pages

MODES, DTYPES = ['training', 'inference'], ['float32', 'bfloat16']
GPU_BATCHES = (256, 1024)
PRODUCT = {'cpu': 2048, 'gpu': 8192}  # side of the matrices
MAX_STEPS = 500  # in a block
WARM_UP = 4  # steps
JAX, TORCH = 'experiments.jax_side', 'experiments.torch_side'
DEFAULT_RECIPE = 'configs/default.py'


class Contender(NamedTuple):
  """A module to start, its environment, and extra arguments for `make`."""

  module: str
  environment: dict[str, str] = {}
  arguments: dict[str, Any] = {}


def contenders(machine: dict[str, Any]) -> dict[str, Contender]:
  """All contenders by name; 'ours/...' are other forms and settings of ours."""
  tuned = huge_pages.environment()
  found = {OURS: Contender(JAX, tuned), 'eager': Contender(TORCH)}
  if machine['platform'] == 'cpu':
    compiled = {'compile_mode': 'default'}
    found['compiled'] = Contender(TORCH, {}, compiled)
    if tuned:
      found |= {'eager/huge pages': Contender(TORCH, tuned), 'compiled/huge pages': Contender(TORCH, tuned, compiled)}
      found['ours/4 KB pages'] = Contender(JAX, {huge_pages.VARIABLE: f'{huge_pages.TUNABLE}=0'})
    for count in ('1', '2'):
      found[f'ours/JAX devices: {count}'] = Contender(JAX, tuned | {'JAX_NUM_CPU_DEVICES': count})
  else:
    found |= {mode: Contender(TORCH, {}, {'compile_mode': mode}) for mode in ('reduce-overhead', 'max-autotune')}
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
  add('--device', choices=('auto', 'cpu', 'gpu'), default='auto')
  add('--modes', type=names, default=MODES, help='default: both')
  add('--sizes', type=numbers, default=[32, 96, 224], help='image sizes in pixels')
  add('--batches', type=numbers, help='default on a CPU: 256, 64, 16 for sizes 32, 96, 224; on a GPU: 256,1024')
  add('--dtypes', type=names, help='float32, bfloat16; default on a GPU: both')
  add('--contenders', type=names, help='such as ours,eager or ours,forms; a wrong name lists them all')
  add('--config', default=DEFAULT_RECIPE, help='recipe for ours; PyTorch has the default one only')
  add('--repeats', type=int, default=9, help='blocks for each contender')
  add('--block_seconds', type=float, default=2.0, help='approximate length of a block')
  add('--name', help='of the results; default: benchmark_cpu or benchmark_gpu, then the modes and contenders given')
  add('--output', type=pathlib.Path, default=tables.RESULTS, help='folder of the results')
  options = parser.parse_args(arguments)
  for value in (options.repeats, *options.sizes, *(options.batches or ())):
    if value < 1:
      parser.error(f'{value} must be at least 1')
  for given, known in ((options.modes, MODES), (options.dtypes or [], DTYPES)):
    for name in set(given) - set(known):
      parser.error(f'{name!r} is none of: {", ".join(known)}')
  if options.config != DEFAULT_RECIPE:
    options.contenders = options.contenders or [OURS]
    if any(not name.startswith((OURS, 'forms', 'settings')) for name in options.contenders):
      parser.error(f'--config={options.config}: PyTorch has the network of {DEFAULT_RECIPE} only')
  return options


def describe(device: str) -> dict[str, Any]:
  """Returns the machine: platform, device, versions, and the forms of our layers.

  Raises:
    WorkerError: there is no such device.
  """
  with Worker(JAX, device) as worker:
    found = worker.ask('describe')
  if device not in ('auto', found['platform']):
    raise WorkerError(f'JAX finds only {found["platform"]}')
  if found['platform'] not in PRODUCT:
    raise WorkerError(f'PyTorch has no {found["platform"]} here: use --device=cpu')
  return found | ({'device': tables.cpu_model()} if found['platform'] == 'cpu' else {})


class Contest:
  """The contenders in one case, with all their processes alive; `errors` says who failed, and why."""

  def __init__(self, case: Case, entries: dict[str, Contender], machine: dict[str, Any], config: str):
    """Starts, compiles and warms up one after another."""
    self.errors: dict[str, WorkerError] = {}
    self.made: dict[str, dict[str, Any]] = {}
    self.workers: dict[str, Worker] = {}
    for name, entry in entries.items():
      begin = time.perf_counter()
      self.workers[name] = Worker(entry.module, machine['platform'], environment=entry.environment)
      arguments = case._asdict() | entry.arguments | ({'config': config} if entry.module == JAX else {})
      made = self.ask(name, 'make', **arguments)
      if self.ask(name, 'run', steps=1, before=0) is not None:
        self.made[name] = made | {'start': time.perf_counter() - begin}
        machine['versions'] |= self.ask(name, 'describe')['versions']
        self.ask(name, 'run', steps=WARM_UP)

  def ask(self, name: str, do: str, **arguments) -> Any:
    """Asks a worker; returns None where it fails or has failed."""
    try:
      return self.workers[name].ask(do, **arguments) if name in self.workers else None
    except WorkerError as error:
      self.errors[name] = error
      self.workers.pop(name).close()

  def run(self, repeats: int, seconds: float) -> dict[str, list[float]]:
    """Returns the seconds of a step for each contender and turn; a block takes about `seconds`."""
    blocks = {name: [] for name in self.workers}
    trials = {name: self.ask(name, 'run', steps=2) or seconds for name in blocks}
    lengths = {name: max(1, min(MAX_STEPS, round(seconds / trial))) for name, trial in trials.items()}
    for turn in range(repeats):
      for name in list(blocks)[:: 1 if turn % 2 == 0 else -1]:
        blocks[name].append(self.ask(name, 'run', steps=lengths[name]))
    return {name: found for name, found in blocks.items() if name in self.workers}


def contest(case: Case, entries: dict[str, Contender], machine: dict[str, Any], options: Any) -> dict[str, Any]:
  """Times some contenders in one case.

  Returns:
    By contender: `seconds` of a step in each turn; `made`, with what the contender runs on and its start in seconds;
    `memory`, peak bytes of the process and on the GPU; `products`, FLOP/s of a large matrix product; `errors`. For all:
    `multiply_adds` of a step.
  """
  running = Contest(case, entries, machine, options.config)
  size, products = PRODUCT[machine['platform']], {}

  def measure_products():
    for name in (OURS, 'eager'):
      if product := running.ask(name, 'product', size=size, dtype=case.dtype, repeats=9):
        products.setdefault(name, []).append(product)

  try:
    measure_products()
    seconds = running.run(options.repeats, options.block_seconds)
    measure_products()
    memory = {name: running.ask(name, 'memory') for name in list(running.workers)}
  finally:
    for worker in running.workers.values():
      worker.close()
  return {
    'seconds': seconds,
    'made': running.made,
    'memory': memory,
    'products': products,
    'errors': running.errors,
    'multiply_adds': next((made['multiply_adds'] for made in running.made.values() if made['multiply_adds']), None),
  }


def measure(case: Case, entries: dict[str, Contender], machine: dict[str, Any], options: Any) -> dict[str, Any]:
  """Times one case: the contenders in turns or, where memory is too small for all, one after another."""
  result = contest(case, entries, machine, options)
  result['alone'] = any(error.memory for error in result['errors'].values())
  if result['alone'] and len(entries) > 1:
    for name, entry in entries.items():
      single = contest(case, {name: entry}, machine, options)
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
  size = PRODUCT[machine['platform']]
  text = [
    tables.written_by(**machine['versions']),
    f'{machine["device"]}, {tables.cores()} CPU cores. Recipe of ours: {options.config}.',
    f'Medians of {options.repeats} blocks of about {options.block_seconds:g} s; a ratio is the median over turns.',
    'GFLOP/s counts convolutions, the backward pass as two forward passes. Beside it stands the share of what a',
    f'{size}x{size} matrix product of that dtype reached in this run, in the faster framework.',
    '',
    tables.comparison(by_case),
    tables.details(by_case),
    *notes,
  ]
  path = options.output / f'{options.name or default_name(machine["platform"], options)}.md'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(text).rstrip() + '\n')
  path.with_suffix('.csv').write_text(tables.as_csv(by_case))
  return path


def default_name(platform: str, options: argparse.Namespace) -> str:
  """Names the modes and contenders if they are not the default, so a part does not overwrite the whole."""
  modes = [] if options.modes == MODES else options.modes
  words = ' '.join(['benchmark', platform, *modes, *(options.contenders or [])])
  return '_'.join(re.findall('[a-z0-9]+', words.lower()))


def main() -> None:
  """Times every case and prints as it goes."""
  options = parse()
  try:
    machine = describe(options.device)
    entries = chosen(options.contenders, machine)
  except WorkerError as error:
    sys.exit(f'error: {error}')
  on_gpu = machine['platform'] == 'gpu'
  results, path = {}, None
  dtypes = options.dtypes or (['bfloat16', 'float32'] if on_gpu else ['float32'])
  for mode, dtype, size in itertools.product(options.modes, dtypes, options.sizes):
    for batch in options.batches or (GPU_BATCHES if on_gpu else [CPU_BATCHES.get(size, 16)]):
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
