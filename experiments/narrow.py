"""`python main.py` with a network so narrow that a whole run takes seconds.

  python -m experiments.narrow --config=configs/folder.py --workdir=runs/x

The product has no hooks for this: functions are wrapped from outside. A phase begins with the line `+NAME` on a pipe
and ends with `-NAME`. So whoever kills the program knows where the kill fell. Writing a small file takes microseconds,
too short for a signal from outside: there `Aim` lets the program send itself SIGKILL after a part of the bytes.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import threading
from typing import IO, Any

# Moments of a write: nothing, a part, or all of the bytes are in the temporary file; or it has its name already.
MOMENTS = ('begun', 'partly', 'written', 'renamed')


@dataclasses.dataclass(frozen=True)
class Aim:
  """A file, and the moment of its writing at which the program kills itself."""

  name: str  # the file's, see `file_name`
  occasion: int  # how many such files are written before
  moment: str  # one of MOMENTS; an appended file has 'partly' only
  share: float  # the part of the bytes that is written, if `moment` is 'partly'


class Phases:
  """Writes the lines, and kills the program at its aim."""

  def __init__(self, pipe: int | None, aim: Aim | None):
    """Writes to the file descriptor `pipe`, if there is one."""
    self._pipe, self._aim, self._seen, self._lock = pipe, aim, 0, threading.Lock()

  def say(self, mark: str, name: str) -> None:
    """Writes a line; lines of several threads do not mix."""
    if self._pipe is not None:
      os.write(self._pipe, f'{mark}{name}\n'.encode())

  @contextlib.contextmanager
  def during(self, name: str):
    """Marks the block as a phase; one of another thread than the main one is in brackets."""
    name = name if threading.current_thread() is threading.main_thread() else f'({name})'
    self.say('+', name)
    try:
      yield
    finally:
      self.say('-', name)

  def wrap(self, owner: Any, function: str, name: str) -> None:
    """Makes every call of `owner.function` a phase."""
    original = getattr(owner, function)

    @functools.wraps(original)
    def wrapped(*arguments, **options):
      with self.during(name):
        return original(*arguments, **options)

    setattr(owner, function, wrapped)

  def aimed(self, name: str) -> Aim | None:
    """Counts that a file is written, and returns the aim if it is this one."""
    if self._aim is None or self._aim.name != name:
      return None
    with self._lock:
      self._seen += 1
      return self._aim if self._seen == self._aim.occasion + 1 else None


def kill() -> None:
  """Ends this process as `kill -9` does."""
  os.kill(os.getpid(), signal.SIGKILL)


def narrow_network() -> None:
  """One narrow block instead of nine, a CPU's forms only, and small pictures without a layout: they take long to make.

  Every width is at least 4, because XLA compiles narrower ones slowly.
  """
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  from googlenet_jax.evaluation import drawing
  from googlenet_jax.model import googlenet, layers

  layers.by_platform = lambda own, *arrays, cpu=None, gpu=None: (cpu or own)(*arrays)
  ConstrainedLayoutEngine.execute = lambda *_: None
  drawing.DPI = 40
  googlenet.TABLE = {'inception_3b': googlenet.Widths(8, 4, 8, 4, 8, 4)}


def draw_nothing() -> None:
  """Leaves out the pictures, which take as long as a short training, but not the tables beside them."""
  from googlenet_jax.evaluation import galleries, plots
  from googlenet_jax.training import summary

  summary.draw_samples = lambda *_: None  # it compiles a program for its picture
  for module in (galleries, plots):
    for name, function in vars(module).items():
      if getattr(function, '__module__', '') == module.__name__ and not name.startswith('_'):
        setattr(module, name, lambda *_, **__: None)


def file_name(path: pathlib.Path) -> str:
  """Returns the name under which a file is counted: caches have many names."""
  return f'cache {path.suffix}' if 'cache' in str(path) else path.name


def watch(pipe: int | None, aim: Aim | None = None) -> None:
  """Wraps what a training calls, so it says where it is, and kills itself at `aim`."""
  phases = Phases(pipe, aim)
  watch_functions(phases)
  watch_files(phases)
  watch_appended_files(phases)
  watch_compiled_programs(phases)


def watch_functions(phases: Phases) -> None:
  """Makes phases of what a training calls, and says each step."""
  from googlenet_jax.host import checkpoints, progress
  from googlenet_jax.training import evaluator, log, loop, summary

  for owner, function, name in (
    (loop, 'make_plan', 'loading the data'),
    (loop, 'create_state', 'initial state'),
    (loop, 'restore', 'restoring'),
    (loop, 'evaluate_again', 'evaluating a restored state'),
    (loop, 'compile_train_step', 'compiling the step'),
    (loop, 'train_steps', 'training steps'),
    (evaluator.Evaluator, 'fit_statistics', 'batch statistics'),
    (evaluator.Evaluator, '_compile', 'compiling the evaluation'),
    (evaluator, 'evaluate', 'evaluation'),
    (checkpoints.Checkpoints, '__init__', 'opening checkpoints'),
    (checkpoints.Checkpoints, 'save', 'saving'),
    (checkpoints.Checkpoints, 'replace', 'writing a checkpoint anew'),
    (checkpoints.Checkpoints, 'close', 'waiting for checkpoints'),
    (summary, 'draw_samples', 'drawing augmentations'),
    (summary, 'draw_curves', 'drawing curves'),
    (summary, 'draw_answers', 'drawing answers'),
    (log.MetricsLog, '__init__', 'opening the log'),
  ):
    phases.wrap(owner, function, name)

  advance = progress.Progress.advance

  def advance_and_say(self, step):
    phases.say('.', f'step {step}')
    advance(self, step)

  progress.Progress.advance = advance_and_say


def watch_files(phases: Phases) -> None:
  """Kills the program while it writes a file."""
  from googlenet_jax.evaluation import drawing
  from googlenet_jax.host import cache, files

  replacing = files.replacing

  @contextlib.contextmanager
  def replacing_or_killed(path):
    name = file_name(path)
    aim = phases.aimed(name)
    with phases.during(f'file {name}'):
      with replacing(path) as temporary:
        if aim and aim.moment == 'begun':
          temporary.touch()
          kill()
        yield temporary
        if aim and aim.moment == 'partly':
          os.truncate(temporary, int(aim.share * temporary.stat().st_size))
        if aim and aim.moment in ('partly', 'written'):
          kill()
      if aim:
        kill()

  for module in (files, drawing, cache):
    module.replacing = replacing_or_killed


class Appended:
  """A file that records are appended to; the program may be killed when it has written a part of one."""

  def __init__(self, file: IO, name: str, phases: Phases):
    """Writes to `file`, which is counted under a name."""
    self._file, self._name, self._phases = file, name, phases

  def write(self, record: str | bytes) -> None:
    """Writes a record, or a part of it."""
    aim = self._phases.aimed(self._name)
    with self._phases.during(f'file {self._name}'):
      self._file.write(record[: int(aim.share * len(record))] if aim else record)
      if aim:
        self._file.flush()
        kill()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def watch_appended_files(phases: Phases) -> None:
  """Kills the program while it appends to a log."""
  from googlenet_jax.training import log

  for owner, name in ((log.MetricsLog, 'metrics.jsonl line'), (log._EventFile, 'events record')):
    opened = owner.__init__

    def open_and_watch(self, *arguments, opened=opened, name=name):
      opened(self, *arguments)
      if self._file is not None:  # only the first process writes
        self._file = Appended(self._file, name, phases)

    owner.__init__ = open_and_watch


def watch_compiled_programs(phases: Phases) -> None:
  """Kills the program while JAX writes to its cache."""
  from jax._src import lru_cache

  put = lru_cache.LRUCache.put

  def put_or_killed(self, key, value):
    aim = phases.aimed('compiled program')
    with phases.during('file compiled program'):
      if aim:
        put(self, key, value[: int(aim.share * len(value))])
        kill()
      put(self, key, value)

  lru_cache.LRUCache.put = put_or_killed


def import_program() -> None:
  """Imports what a training imports, also what it imports late."""
  import main  # noqa: F401
  from googlenet_jax import recipe_checks  # noqa: F401
  from googlenet_jax.evaluation import galleries, plots, report  # noqa: F401
  from googlenet_jax.host import cache, cpu_cores  # noqa: F401
  from googlenet_jax.training import ensemble, log  # noqa: F401

  log._tensorboardx()


if __name__ == '__main__':
  import main

  narrow_network()
  main.run()
