"""Speed of our network and of its PyTorch twin, side by side on one machine.

  python experiments/benchmark.py
  python experiments/benchmark.py --device=gpu --sizes=224 --batches=256 --dtypes=bfloat16 --modes=training
  FASHION_MNIST_DIR=DIR python experiments/benchmark.py --modes=epochs --sizes=32 --batches=256

Training (forward, backward, momentum SGD) and inference start from uint8 images on the device, as a run's do; `epochs`
is a whole epoch of Fashion-MNIST with each framework's own input pipeline. Each contender has a process of its own,
which idles while another is timed; they take turns, forwards and backwards, and a ratio is that of two blocks of the
same turn. 'tuned' gives PyTorch the huge pages that we have (googlenet_jax/huge_pages.py). Missing PyTorch, a missing
compiler or too little memory leaves that row out and says so; --contenders chooses.
Beside jax, flax, optax, orbax-checkpoint, tqdm and torch it needs ml_collections, grain, array_record and portpicker,
but neither TFDS nor tensorboardX. Writes experiments/results/benchmark_cpu or benchmark_gpu, for
`--modes=epochs` benchmark_cpu_epochs and so on: .md, .csv and .json.
"""

import argparse
import contextlib
import itertools
import json
import pathlib
import platform
import statistics
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import benchmark_tables as tables
from experiments.benchmark_tables import CPU_BATCHES, OURS, Case
from experiments.worker import Worker, WorkerError
from googlenet_jax.host import huge_pages

TUNED = huge_pages.environment()
# Script, environment, and arguments of `make`. Not preallocated: the contenders share the GPU's memory.
CONTENDERS = {
  OURS: ('benchmark_jax.py', {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}, {}),
  'eager': ('benchmark_torch.py', {}, {'compiled': False}),
  'eager tuned': ('benchmark_torch.py', TUNED, {'compiled': False}),
  'compiled': ('benchmark_torch.py', {}, {'compiled': True}),
  'compiled tuned': ('benchmark_torch.py', TUNED, {'compiled': True}),
}
STOCK = ['eager', 'compiled']
GPU_BATCHES = (256, 1024)
PRODUCT = {'cpu': 2048, 'gpu': 8192}  # side of the matrices
MAX_STEPS = 500  # in a block
JAX_PLATFORMS = {'cpu': 'cpu', 'gpu': 'cuda,cpu'}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """The options."""
  numbers = lambda text: [int(n) for n in text.split(',')]
  names = lambda text: text.split(',')
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--device', choices=('auto', 'cpu', 'gpu'), default='auto')
  parser.add_argument('--modes', type=names, default=['training', 'inference'], help='training,inference,epochs')
  parser.add_argument('--sizes', type=numbers, default=[32, 96, 224], help='pixels')
  parser.add_argument('--batches', type=numbers, help='on a CPU by default 256, 64, 16 by size; on a GPU 256,1024')
  parser.add_argument('--dtypes', type=names, help='float32, bfloat16; on a GPU both by default')
  parser.add_argument('--repeats', type=int, default=9, help='blocks of each contender')
  parser.add_argument('--block_seconds', type=float, default=2.0, help='about so long is a block')
  parser.add_argument('--epoch_repeats', type=int, default=1)
  parser.add_argument('--contenders', type=names, help=','.join(CONTENDERS))
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'experiments' / 'results')
  options = parser.parse_args(arguments)
  for value in (options.repeats, options.epoch_repeats, *options.sizes, *(options.batches or ())):
    if value < 1:
      parser.error(f'{value} should be 1 or more')
  for given, known in (
    (options.modes, ('training', 'inference', 'epochs')),
    (options.dtypes or (), ('float32', 'bfloat16')),
    (options.contenders or (), tuple(CONTENDERS)),
  ):
    for name in given:
      if name not in known:
        parser.error(f'{name!r} is none of: {", ".join(known)}')
  return options


def describe(device: str) -> dict[str, Any]:
  """What there is to run on; raises WorkerError where `device` is not there."""
  environment = {} if device == 'auto' else {'JAX_PLATFORMS': JAX_PLATFORMS[device]}
  with contextlib.closing(Worker('benchmark_jax.py', CONTENDERS[OURS][1] | environment)) as worker:
    found = worker.ask('describe')
  if device not in ('auto', found['platform']):
    raise WorkerError(f'JAX finds only {found["platform"]}')
  if found['platform'] not in ('cpu', 'gpu'):
    raise WorkerError(f'PyTorch cannot be compared on {found["platform"]}: --device=cpu')
  if found['platform'] == 'cpu':
    found['device'] = tables.cpu_model()
  found['cores'] = tables.cores()
  found['versions'] = {'Python': platform.python_version(), **found['versions']}
  return found


class Contest:
  """The contenders at one case, alive together."""

  def __init__(self, case: Case, names: list[str], machine: dict[str, Any]):
    """Starts, compiles and warms up one after another; `errors` says which could not and why."""
    self.case, self.platform = case, machine['platform']
    self.errors: dict[str, WorkerError] = {}
    self.multiply_adds, self.products = None, []
    self._workers: dict[str, Worker] = {}
    self._steps: dict[str, int] = {}
    self._device = {'cpu': 'cpu', 'gpu': 'cuda'}[self.platform]
    for name in names:
      script, environment, arguments = CONTENDERS[name]
      environment = environment | {'JAX_PLATFORMS': JAX_PLATFORMS[self.platform]}
      worker = self._workers[name] = Worker(script, environment)
      with self._noting(name):
        if name != OURS:
          machine['versions'] |= worker.ask('describe', device=self._device)['versions']
        made = worker.ask('make', **case._asdict(), **arguments, **self._where(name))
        self.multiply_adds = made['multiply_adds'] or self.multiply_adds

  def _where(self, name: str) -> dict[str, str]:
    return {} if name == OURS else {'device': self._device}

  @contextlib.contextmanager
  def _noting(self, name: str):
    try:
      yield
    except WorkerError as error:
      self.errors[name] = error
      self._workers.pop(name).close()

  def measure_products(self, repeats: int = 9) -> None:
    """Times a large matrix product in each framework."""
    for name in [n for n in (OURS, 'eager') if n in self._workers]:
      with self._noting(name):
        size = PRODUCT[self.platform]
        product = self._workers[name].ask(
          'product', size=size, dtype=self.case.dtype, repeats=repeats, **self._where(name)
        )
        self.products.append((name, product))

  def choose_steps(self, seconds: float, steps_per_epoch: int | None) -> None:
    """Sets how many steps of each contender make a block."""
    for name, worker in list(self._workers.items()):
      with self._noting(name):
        if steps_per_epoch:
          self._steps[name] = steps_per_epoch
        else:
          self._steps[name] = max(1, min(MAX_STEPS, round(seconds / worker.ask('run', steps=2))))

  def run(self, repeats: int) -> dict[str, list[float]]:
    """Seconds a step by contender and block; who fails on the way is left out."""
    blocks = {name: [] for name in self._workers}
    for turn in range(repeats):
      for name in list(self._workers)[:: 1 if turn % 2 == 0 else -1]:
        with self._noting(name):
          blocks[name].append(self._workers[name].ask('run', steps=self._steps[name]))
    return {name: seconds for name, seconds in blocks.items() if name in self._workers}

  def close(self) -> None:
    """Ends the processes."""
    for worker in self._workers.values():
      worker.close()


def contest(case: Case, names: list[str], machine: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
  """Measures one case with the contenders named; see `benchmark_tables.rows`, and `errors`."""
  epoch = 60000 // case.batch_size if case.mode == 'epochs' else None
  with contextlib.closing(Contest(case, names, machine)) as running:
    running.measure_products()
    running.choose_steps(options.block_seconds, epoch)
    seconds = running.run(options.epoch_repeats if epoch else options.repeats)
    running.measure_products()
  # The larger of the two frameworks' medians is what the machine can do.
  by_framework = {name: [p for n, p in running.products if n == name] for name, _ in running.products}
  return {
    'seconds': seconds,
    'errors': running.errors,
    'multiply_adds': running.multiply_adds,
    'product': max(map(statistics.median, by_framework.values()), default=None),
    'products': by_framework,
    'steps_per_epoch': epoch,
  }


def measure(case: Case, names: list[str], machine: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
  """Measures one case: all together, or, where they do not fit in memory together, one after another."""
  result = contest(case, names, machine, options)
  result['alone'] = any(error.memory for error in result['errors'].values())
  if result['alone'] and len(names) > 1:
    for name in names:
      single = contest(case, [name], machine, options)
      result['errors'].pop(name, None)
      result['errors'] |= single['errors']
      result['seconds'].pop(name, None)
      result['seconds'] |= single['seconds']
      result['products'] |= single['products']
      result['product'] = max(filter(None, (result['product'], single['product'])), default=None)
      result['multiply_adds'] = result['multiply_adds'] or single['multiply_adds']
  result['errors'] = {name: str(error) for name, error in result['errors'].items()}
  return result


def result_path(machine: dict[str, Any], options: argparse.Namespace) -> pathlib.Path:
  """Of the results, without suffix; whole epochs have files of their own."""
  return options.output / f'benchmark_{machine["platform"]}{"_epochs" * (options.modes == ["epochs"])}'


def report(machine: dict[str, Any], results: dict[Case, dict[str, Any]], options: argparse.Namespace) -> None:
  """Writes the three files; called after every case, so that an interrupted run leaves what it has."""
  by_case = {case: tables.rows(case, result, machine['device']) for case, result in results.items()}
  notes = []
  for case, result in results.items():
    notes += [f'- {case}: {name} is missing: {error}' for name, error in result['errors'].items()]
    if result['alone']:
      notes.append(f'- {case}: measured one after another, not by turns: they do not fit in memory together')
  versions = ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
  names = [name for name in CONTENDERS if name != OURS]
  size = PRODUCT[machine['platform']]
  text = [
    f'Measured by `{tables.command()}`',
    f'on {machine["device"]}, {machine["cores"]} CPU cores; {versions}.',
    f'Medians of {options.repeats} blocks of about {options.block_seconds:g} s (epochs: of {options.epoch_repeats}),',
    'the contenders by turns; a ratio is the median over turns. PyTorch is channels_last, with fused SGD; tuned: with',
    'the huge pages that we have.',
    f'GFLOP/s counts the convolutions, backward as twice forward; beside it a {size}x{size} matrix product of the',
    'same dtype in the same run (the faster framework).',
    '',
    tables.comparison(by_case, STOCK, names),
    tables.details(by_case),
    *notes,
  ]
  path = result_path(machine, options)
  path.with_suffix('.md').write_text('\n'.join(text).rstrip() + '\n')
  path.with_suffix('.csv').write_text(tables.as_csv(by_case))
  raw = {'machine': machine, 'cases': [{**case._asdict(), **result} for case, result in results.items()]}
  path.with_suffix('.json').write_text(json.dumps(raw, indent=1) + '\n')


def main() -> None:
  """Measures every case and prints as it goes."""
  options = parse()
  try:
    machine = describe(options.device)
  except WorkerError as error:
    sys.exit(f'error: no {options.device} device to measure on: {error}')
  on_gpu = machine['platform'] == 'gpu'
  if not TUNED and any('tuned' in name for name in options.contenders or ()):
    sys.exit('error: tuned: huge pages are not on request here, or GLIBC_TUNABLES has chosen already')
  names = options.contenders or [name for name in CONTENDERS if 'tuned' not in name or (TUNED and not on_gpu)]
  results = {}
  options.output.mkdir(parents=True, exist_ok=True)
  dtypes = options.dtypes or (['bfloat16', 'float32'] if on_gpu else ['float32'])
  for mode, dtype, size in itertools.product(options.modes, dtypes, options.sizes):
    for batch in options.batches or (GPU_BATCHES if on_gpu else [CPU_BATCHES.get(size, 16)]):
      case = Case(mode, size, batch, dtype)
      print(case, flush=True)
      results[case] = measure(case, names, machine, options)
      for row in tables.rows(case, results[case], machine['device']):
        print(f'  {row["contender"]}: {tables.number(row["images_per_second"])} images/s', flush=True)
      for name, error in results[case]['errors'].items():
        print(f'  {name} is missing: {error}', flush=True)
      report(machine, results, options)
  print(result_path(machine, options).with_suffix('.md').read_text())


if __name__ == '__main__':
  main()
