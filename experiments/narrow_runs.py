"""Starts narrowed runs in processes of their own and follows their phases; see `experiments/kill_runs.py`."""

import atexit
import dataclasses
import os
import pathlib
import select
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import IO

import numpy as np
from PIL import Image

from experiments import narrow

ROOT = pathlib.Path(__file__).resolve().parent.parent
OVERRIDES = {
  'image_size': 8,
  'batch_size': 16,
  'epochs': 3,
  'learning_rate': 0.05,
  'schedule': 'cosine',
  'average_decay': 0.9,
  'model.stem': 'small',
  'model.dropout': 0.3,
  'augment.shift': 1,
  'augment.min_area': 1.0,
  'log_every_steps': 2,
  'checkpoint_every_steps': 4,
  'evaluate_every_epochs': 1,
}
LONGEST = 300.0  # seconds that a run may take before it counts as hanging


@dataclasses.dataclass
class Event:
  """A line of `narrow.Phases`, and when it came."""

  seconds: float  # since the start
  mark: str  # + - .
  name: str


@dataclasses.dataclass
class Ended:
  """A run that is over."""

  status: int  # as the shell says it: minus the signal that killed it
  events: list[Event]
  seconds: float
  out: str
  err: str


class Runs:
  """Starts narrowed runs with the same arguments, each in a workdir of its own."""

  def __init__(self, folder: pathlib.Path, arguments: Sequence[str], draw: bool = True):
    """Takes the arguments of main.py, without the workdir, and whether runs draw pictures.

    What runs print is kept in `folder` meanwhile.
    """
    self.folder, self.arguments, self.draw = folder, [*arguments], draw

  def start(
    self,
    workdir: pathlib.Path,
    cache: pathlib.Path,
    aim: narrow.Aim | None = None,
    prepare: Callable[[], None] | None = None,
    terminal: int | None = None,
    flags: Sequence[str] = (),
  ) -> 'Run':
    """Starts a run.

    Args:
      workdir: its folder.
      cache: its cache.
      aim: where it kills itself.
      prepare: called in the new process before everything else.
      terminal: file descriptor that it prints to, instead of files.
      flags: more arguments of main.py.
    """
    read, write = os.pipe()
    out = tempfile.TemporaryFile('w+', dir=self.folder)  # noqa: SIM115
    err = tempfile.TemporaryFile('w+', dir=self.folder)  # noqa: SIM115
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # JAX warns of forks; its threads do not run yet
      pid = os.fork()
    if pid == 0:
      os.close(read)
      os.dup2(out.fileno() if terminal is None else terminal, 1)
      os.dup2(err.fileno() if terminal is None else terminal, 2)
      become([*self.arguments, *flags, f'--workdir={workdir}'], cache, write, aim, prepare, self.draw)
    os.close(write)
    return Run(pid, read, out, err)


def become(
  arguments: list[str],
  cache: pathlib.Path,
  pipe: int,
  aim: narrow.Aim | None,
  prepare: Callable[[], None] | None,
  draw: bool,
) -> None:
  """Turns this forked process into `python main.py ARGUMENTS`; does not return."""
  status = 99
  try:
    os.setsid()
    import jax

    import main
    from googlenet_jax.host import program

    program.is_program = lambda: True  # as if main.py had been started: signals end it
    os.environ['XDG_CACHE_HOME'] = str(cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    if prepare is not None:
      prepare()
    narrow.narrow_network()
    if not draw:
      narrow.draw_nothing()
    narrow.watch(pipe, aim)
    sys.argv = ['main.py', *arguments]
    main.run()
    status = 0
  except SystemExit as error:
    status = error.code or 0
  except BaseException:
    traceback.print_exc()
  finally:
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Run:
  """A run that is under way."""

  def __init__(self, pid: int, pipe: int, out: IO[str], err: IO[str]):
    """Follows the process `pid`, which writes its phases to `pipe`."""
    self.pid, self._pipe, self._out, self._err = pid, pipe, out, err
    self.begin, self.events, self._rest = time.perf_counter(), [], b''
    self.closed = False

  def read(self, seconds: float) -> None:
    """Collects events for some seconds, or until the next ones or the end."""
    if not select.select([self._pipe], [], [], max(seconds, 0))[0]:
      return
    data = os.read(self._pipe, 1 << 16)
    self.closed = not data
    *lines, self._rest = (self._rest + data).split(b'\n')
    now = time.perf_counter() - self.begin
    self.events += [Event(now, line[:1].decode(), line[1:].decode()) for line in lines]

  def wait_for(self, due: Callable[['Run'], bool]) -> bool:
    """Waits until `due`; returns whether that came before the end of the run."""
    while not due(self):
      if self.closed:
        return False
      if time.perf_counter() - self.begin > LONGEST:
        raise TimeoutError(f'a run hangs: {self.events[-5:]}\n{self.texts()}')
      self.read(1.0)
    return True

  def sleep(self, seconds: float) -> None:
    """Waits, and collects events meanwhile."""
    until = time.perf_counter() + seconds
    while not self.closed and (left := until - time.perf_counter()) > 0:
      self.read(left)

  def send(self, number: int) -> None:
    """Sends a signal, unless the run is over."""
    if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
      os.kill(self.pid, number)

  def texts(self) -> tuple[str, str]:
    """Returns what was printed."""
    found = []
    for file in (self._out, self._err):
      file.seek(0)
      found.append(file.read())
    return tuple(found)

  def end(self) -> Ended:
    """Waits for the end."""
    self.wait_for(lambda run: run.closed)
    _, status = os.waitpid(self.pid, 0)
    os.close(self._pipe)
    found = Ended(os.waitstatus_to_exitcode(status), self.events, time.perf_counter() - self.begin, *self.texts())
    self._out.close()
    self._err.close()
    return found


def small_run(folder: pathlib.Path) -> list[str]:
  """Writes the digits 3 and 8 as a folder of pictures: two classes, so that ROC curves are drawn too.

  Returns:
    The arguments of a training on them that takes seconds.
  """
  from sklearn import datasets

  digits = datasets.load_digits()
  for label in (3, 8):
    (folder / str(label)).mkdir(parents=True)
    for number, image in enumerate(digits.images[digits.target == label][:88]):
      Image.fromarray((image * 15.9375).astype(np.uint8)).save(folder / f'{label}' / f'{number:03}.png')
  flags = [f'--config.{name}={value}' for name, value in OVERRIDES.items()]
  return [f'--config={ROOT}/configs/folder.py', f'--config.data.source_dir={folder}', *flags]
