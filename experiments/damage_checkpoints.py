"""Is all damage to a checkpoint found? Damages each file of one in many ways, and continues the run each time.

  python -m experiments.damage_checkpoints

The network is narrow, so a checkpoint is small; its files are those of every run. Each damage must be found, with the
file or array named, the checkpoint moved aside and the one before it used. Or it must be harmless: then the values are
those that were saved.
"""

import argparse
import collections
import contextlib
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import tables
from experiments.narrow import narrow_network
from googlenet_jax import recipe
from googlenet_jax.host import checkpoints, console, sharding
from googlenet_jax.training import state as state_lib
from googlenet_jax.training.plan import make_plan

PLACES = (0.0, 0.03, 0.15, 0.3, 0.45, 0.6, 0.81, 0.97, 1.0)  # where bytes are flipped, as a share of the file
FOUND, HARMLESS = 'found', 'harmless'


def damages() -> Iterator[tuple[str, Callable[[bytes], bytes | None]]]:
  """Yields names, and functions that damage the content of a file; None stands for no file."""
  yield 'cut in half', lambda content: content[: len(content) // 2]
  yield 'emptied', lambda content: b''
  yield 'three bytes more', lambda content: content + b'xyz'
  yield 'deleted', lambda content: None
  for number, place in enumerate(PLACES):
    bits = 255 if number % 2 else 1

    def flipped(content: bytes, place: float = place, bits: int = bits) -> bytes:
      changed = bytearray(content)
      changed[min(int(place * len(changed)), len(changed) - 1)] ^= bits
      return bytes(changed)

    yield f'{"byte" if bits == 255 else "bit"} flipped at {place:.0%}', flipped


def write_run(folder: pathlib.Path) -> Any:
  """Writes two checkpoints with different values and returns what is needed to read them."""
  config = recipe.read('configs/digits.py')
  plan = make_plan(config, folder, sharding.make_mesh(jax.devices()[:1]), None)
  saved = checkpoints.Checkpoints(folder)
  for step in (1, 2):
    config.seed = step
    _, state = state_lib.create_state(config, 10, 1, plan.tx, plan.mesh)
    state = state.replace(step=jnp.int32(step))
    saved.save(step, state_lib.items(state), {'train_seconds': 0.1 * step, 'epochs': 7})
    saved.wait()
  saved.close()
  return state_lib.items(state_lib.abstract(state))


def same(found: Any, expected: Any) -> bool:
  """Returns whether two trees have the same values."""
  return all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))


def outcome(run: pathlib.Path, abstract: Any, expected: dict[int, Any]) -> tuple[str, str]:
  """Continues a run whose newest checkpoint is damaged.

  Returns:
    FOUND, HARMLESS or what went wrong; and what the warning names.
  """
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    saved = checkpoints.Checkpoints(run)
    found, meta = saved.restore_whole(abstract)
    saved.close()
  step, warning = int(found['network']['step']), printed.getvalue()
  if not same((found, meta['train_seconds']), expected[step]):
    return f'step {step} with other values', warning
  if step == 2:
    return HARMLESS if warning == '' and not (run / 'damaged').exists() else 'read, with a warning', warning
  named = warning.partition('is damaged: ')[2].partition('; moved to')[0]
  aside = os.listdir(run / 'damaged') == ['2'] and os.listdir(run / 'checkpoints') == ['1']
  return FOUND if aside and named and warning.count('\n') == 1 else 'found, with another end', named


def kind_of(file: pathlib.Path) -> str:
  """Returns the name of a file without the names that Orbax draws at random."""
  return str(file.parent / '*' if file.parent.name == 'd' else file)


def main() -> None:
  """Damages, counts and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--output', type=pathlib.Path, default='experiments/results/damaged_checkpoints.md')
  options = parser.parse_args()
  console.quieten_libraries()
  narrow_network()
  counts, faults = collections.defaultdict(collections.Counter), []
  with tempfile.TemporaryDirectory() as folder:
    whole, run = pathlib.Path(folder, 'whole'), pathlib.Path(folder, 'run')
    abstract = write_run(whole)
    reader, expected = checkpoints.Checkpoints(whole, read_only=True), {}
    for step in (1, 2):
      found, meta = reader.restore(abstract, step)
      expected[step] = (found, meta['train_seconds'])
    newest = whole / 'checkpoints' / '2'
    for file in sorted(path.relative_to(newest) for path in newest.rglob('*') if path.is_file()):
      for name, damage in damages():
        content = (newest / file).read_bytes()
        damaged = damage(content)
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        path = run / 'checkpoints' / '2' / file
        path.unlink() if damaged is None else path.write_bytes(damaged)
        try:
          result, named = outcome(run, abstract, expected)
        except Exception as error:  # a fault: nothing may be raised
          result, named = type(error).__name__, str(error)
        counts[kind_of(file)][result if result in (FOUND, HARMLESS) else 'fault'] += 1
        if result not in (FOUND, HARMLESS):
          faults.append(f'{file}, {name}: {result}: {named}')
  rows = [[file, *(str(count[kind]) for kind in (FOUND, HARMLESS, 'fault'))] for file, count in counts.items()]
  sums = [sum(count[kind] for count in counts.values()) for kind in (FOUND, HARMLESS, 'fault')]
  rows.append(['all', *map(str, sums)])
  table = tables.table(['file', 'found, the step before used', 'harmless, values equal', 'faults'], rows)
  about = f'{sum(sums)} damages, each to one file of the newest of two checkpoints.'
  tables.publish('\n\n'.join([tables.written_by('jax', 'orbax-checkpoint'), about, table, *faults]), options.output)


if __name__ == '__main__':
  main()
