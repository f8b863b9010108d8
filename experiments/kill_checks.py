"""Compares a run that was killed and continued with one that nobody disturbed; see `experiments/kill_runs.py`."""

import collections
import csv
import dataclasses
import json
import os
import pathlib
import traceback
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from experiments.narrow_runs import Ended
from googlenet_jax.host.files import TEMPORARY

SPEEDS = ('examples_per_second', 'decoded_per_second')
# Keys of summary.json that depend on speed, or on how often the run was started.
TIMES = ('train_seconds', 'compile_seconds', 'train_examples_per_second')


@dataclasses.dataclass
class Report:
  """What was done and found."""

  asked: int = 0  # kills that were wanted
  kills: int = 0
  chains: int = 0
  starts: int = 0
  missed: int = 0  # runs that ended before the kill
  fell: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  wrong: list[str] = dataclasses.field(default_factory=list)
  cases: list[dict[str, str]] = dataclasses.field(default_factory=list)

  def note(self, place: str, problems: Sequence[str], ended: Ended | None = None) -> None:
    """Keeps what is wrong; a traceback of a run is wrong too."""
    problems = list(problems)
    if ended is not None and 'Traceback' in ended.err:
      problems.append('traceback: ' + ' | '.join(ended.err.strip().splitlines()[-2:]))
    self.wrong += [f'{place}: {problem}' for problem in problems]
    for problem in problems:
      print(f'WRONG {place}: {problem}', flush=True)

  def add(self, other: 'Report') -> None:
    """Adds what another one has found."""
    for name, value in vars(other).items():
      setattr(self, name, getattr(self, name) + value)


def half_written(folder: pathlib.Path) -> list[str]:
  """Returns what is wrong with files that have their names; a file under another name does not count.

  The last line of `metrics.jsonl` may be cut off: it is dropped at the next start.
  """
  wrong = []
  for path in sorted(folder.rglob('*')):
    if not path.is_file() or 'checkpoints' in path.parts or 'tensorboard' in path.parts:
      continue
    try:
      if path.suffix == '.json':
        json.loads(path.read_text())
      elif path.suffix == '.jsonl':
        *lines, _ = path.read_text().split('\n')
        for line in lines:
          json.loads(line)
      elif path.suffix == '.csv':
        text = path.read_text()
        if not text.endswith('\n') or len({len(row) for row in csv.reader(text.splitlines(), strict=True)}) != 1:
          raise ValueError('rows of unequal length')
      elif path.suffix == '.png':
        with Image.open(path) as image:
          image.load()
    except (ValueError, OSError, csv.Error) as error:
      wrong.append(f'{path.name}: {error}')
  return wrong


def records(workdir: pathlib.Path) -> list[dict]:
  """Returns the lines of `metrics.jsonl` without speeds."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [{key: value for key, value in json.loads(line).items() if key not in SPEEDS} for line in lines]


def visible(workdir: pathlib.Path) -> list[str]:
  """Returns the names of everything in a workdir; of TensorBoard's and Orbax's folders only names of steps."""
  found = [str(path.relative_to(workdir)) for path in workdir.rglob('*')]
  # A file that a kill left under its temporary name is removed by a start an hour later.
  return sorted(name for name in found if not name.startswith(('tensorboard/', TEMPORARY)) and name.count('/') < 2)


def differences(workdir: pathlib.Path, reference: pathlib.Path, exactly: bool = True) -> list[str]:
  """Says how a run that has ended differs from the undisturbed one; speeds do not count.

  Args:
    workdir: folder of the run.
    reference: folder of the undisturbed run.
    exactly: whether the log has the same lines. A signal that stops a run adds a log point.
  """
  wrong = half_written(workdir)
  ours, theirs = records(workdir), records(reference)
  places = [(record['step'], record['split']) for record in ours]
  if len(set(places)) < len(places):
    wrong.append(f'metrics.jsonl: double lines {[p for p, n in collections.Counter(places).items() if n > 1]}')
  if not exactly:
    ours, theirs = ([r for r in some if r['split'] != 'train'] for some in (ours, theirs))
  if ours != theirs:
    lost = [(r['step'], r['split']) for r in theirs if r not in ours]
    added = [(r['step'], r['split']) for r in ours if r not in theirs]
    wrong.append(f'metrics.jsonl: {lost} missing or different, {added} instead')
  if visible(workdir) != visible(reference):
    wrong.append(f'files: {sorted(set(visible(workdir)) ^ set(visible(reference)))} on one side only')
  summaries = []
  for folder in (workdir, reference):
    found = json.loads((folder / 'summary.json').read_text())
    summaries.append({key: value for key, value in found.items() if key not in TIMES})
  if summaries[0] != summaries[1]:
    wrong.append(f'summary.json: {summaries}')
  for name in ('run.json', 'split.csv', 'mistakes.csv', 'per_class.csv'):
    if (workdir / name).read_bytes() != (reference / name).read_bytes():
      wrong.append(f'{name} differs')
  for path in sorted(reference.glob('*.png')):
    if path.name == 'curves.png' and not exactly:
      continue
    with Image.open(path) as expected, Image.open(workdir / path.name) as found:
      if not np.array_equal(np.asarray(expected), np.asarray(found)):
        wrong.append(f'{path.name} has other pixels')
  return wrong + in_child(state_differences, workdir, reference)


def in_child(function: Callable[..., list[str]], *arguments) -> list[str]:
  """Calls a function that needs JAX in a child: this process must not start JAX's threads, because it forks."""
  read, write = os.pipe()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    pid = os.fork()
  if pid == 0:
    try:
      found = function(*arguments)
    except BaseException:
      found = [traceback.format_exc()]
    os.write(write, json.dumps(found).encode()[: 1 << 15])
    os._exit(0)
  os.close(write)
  with os.fdopen(read) as pipe:
    text = pipe.read()
  os.waitpid(pid, 0)
  return json.loads(text)


def state_differences(workdir: pathlib.Path, reference: pathlib.Path) -> list[str]:
  """Compares the arrays of the newest checkpoints, bit for bit."""
  (steps, ours), (expected_steps, theirs) = map(newest_state, (workdir, reference))
  wrong = [] if steps == expected_steps else [f'checkpoints: steps {steps} instead of {expected_steps}']
  if ours.keys() != theirs.keys():
    return [*wrong, f'checkpoints: arrays {sorted(ours.keys() ^ theirs.keys())} on one side only']
  return wrong + [f'{name} differs' for name in theirs if ours[name].tobytes() != theirs[name].tobytes()]


def newest_state(workdir: pathlib.Path) -> tuple[list[int], dict[str, np.ndarray]]:
  """Returns the steps with a checkpoint, newest first, and the arrays of the newest one by name."""
  import jax
  import orbax.checkpoint as ocp
  from absl import logging

  from googlenet_jax.host.checkpoints import Checkpoints
  from googlenet_jax.training.state import ITEMS

  logging.set_verbosity(logging.FATAL)
  warnings.simplefilter('ignore')
  steps = Checkpoints(workdir, read_only=True).steps()
  device, arrays = jax.sharding.SingleDeviceSharding(jax.devices()[0]), {}  # the file names devices that are not here
  with ocp.StandardCheckpointer() as checkpointer:
    for item in ITEMS:
      path = workdir / 'checkpoints' / str(steps[0]) / item
      forms = dict(checkpointer.metadata(path).item_metadata)
      forms = jax.tree.map(lambda form: jax.ShapeDtypeStruct(form.shape, form.dtype, sharding=device), forms)
      arrays[item] = checkpointer.restore(path, forms)
  leaves = jax.tree_util.tree_leaves_with_path(arrays)
  return steps, {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}
