"""What a person sees of a run: lines, a progress bar, `metrics.jsonl`, TensorBoard."""

import contextvars
import json
import pathlib
import sys
import threading
import time
from typing import Any

import jax
import tqdm
from absl import logging

from googlenet_jax.host import checkpoints

# What a line of `metrics.jsonl` holds.
RECORD = {
  'step': int,
  'epoch': float,
  'split': str,
  'loss': float,
  'accuracy': float,
  'learning_rate': float,
  'examples_per_second': float,
}


def quieten_libraries() -> None:
  """Keeps their pages about one failure off the screen: the line at the end of `run` says it.

  Their warnings speak of their own affairs, and what Orbax and TensorStore log as errors they raise as well.
  """
  logging.set_verbosity(logging.FATAL)

  def of_tensorboard(error, source) -> bool:
    # Its thread and its function at exit; the main thread meets the full disk at its next line of metrics.jsonl.
    return isinstance(error, OSError) and str(getattr(source, '__module__', '')).startswith('tensorboardX')

  def unraisable(args) -> None:
    # TensorStore's threads report to Orbax's event loop, which is gone after the first failure.
    closed = isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == 'Event loop is closed'
    if not (closed or of_tensorboard(args.exc_value, args.object)):
      sys.__unraisablehook__(args)

  def thread_failed(args) -> None:
    if not of_tensorboard(args.exc_value, args.thread):
      threading.__excepthook__(args)

  sys.unraisablehook, threading.excepthook = unraisable, thread_failed


# Before every line of a thread, where several runs are at work.
prefix: contextvars.ContextVar[str] = contextvars.ContextVar('prefix', default='')


def say(text: str) -> None:
  """Prints a line, above the progress bar if there is one, from the first process only."""
  if jax.process_index() == 0:
    tqdm.tqdm.write(''.join(f'{prefix.get()}{line}\n' for line in text.split('\n')), file=sys.stdout, end='')
    sys.stdout.flush()


class Progress:
  """A live bar on a terminal, plain lines elsewhere."""

  def __init__(self, first_step: int, last_step: int, steps_per_epoch: int):
    """Starts at `first_step`; ends at `last_step`."""
    self._spe, self._last_step = steps_per_epoch, last_step
    # The bar is drawn on stderr: where stdout goes to a file, that is to have the lines.
    self._live = sys.stdout.isatty() and sys.stderr.isatty() and jax.process_index() == 0 and not prefix.get()
    self._bar = tqdm.tqdm(
      total=last_step, initial=first_step, disable=not self._live, unit='step', dynamic_ncols=True,
      bar_format='{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]',
    )  # fmt: skip

  def step(self) -> None:
    """Counts a step."""
    self._bar.update(1)

  def show(self, record: dict[str, Any]) -> None:
    """Shows a log point: a line of `metrics.jsonl` of the split `train`."""
    epochs = -(-self._last_step // self._spe)
    rate = record['examples_per_second']
    text = f'loss {record["loss"]:.3f}, acc {record["accuracy"]:.3f}, {rate:.1f} examples/s'
    if self._live:
      self._bar.set_description(f'epoch {record["epoch"]:.2f}/{epochs}', refresh=False)
      self._bar.set_postfix_str(text)
    else:
      say(f'step {record["step"]}/{self._last_step} epoch {record["epoch"]:.2f}/{epochs}: {text}')

  def close(self) -> None:
    """Leaves the bar as it stands."""
    self._bar.close()


class Stopwatch:
  """Counts the seconds between `start` and `stop`, over several stretches."""

  def __init__(self, seconds: float = 0.0):
    """Continues from `seconds`."""
    self.seconds, self._since = seconds, None

  def start(self) -> None:
    """Begins a stretch."""
    self._since = time.perf_counter()

  def stop(self) -> float:
    """Ends the stretch and returns its seconds."""
    stretch = time.perf_counter() - self._since
    self.seconds += stretch
    return stretch


class MetricsLog:
  """`metrics.jsonl` and TensorBoard events of one run; the first process writes, the others keep quiet."""

  def __init__(self, workdir: pathlib.Path, first_step: int):
    """Opens the log and drops what an interrupted run wrote after `first_step`, its last checkpoint."""
    self.records: list[dict[str, Any]] = []
    self._file = self._events = None
    if jax.process_index() != 0:
      return
    path = workdir / 'metrics.jsonl'
    if path.exists() and first_step:
      lines = path.read_text(errors='replace').splitlines()
      self.records = [r for r in map(_parse, lines) if r is not None and r['step'] <= first_step]
    checkpoints.write_text(path, ''.join(json.dumps(record) + '\n' for record in self.records))
    self._file = path.open('a', buffering=1)
    self._events = _summary_writer()(str(workdir / 'tensorboard'), purge_step=first_step and first_step + 1)

  def write(self, record: dict[str, Any]) -> None:
    """Appends one record, with the keys of RECORD, and with auxiliary classifiers the parts of the loss.

    What an ended run wrote is not written again when the same command is given once more.
    """
    last = self.records[-5:]  # at most train, and of averaged and raw weights validation and test, of one step
    if any((r['step'], r['split']) == (record['step'], record['split']) for r in last):
      return
    self.records.append(record)
    if self._file is None:
      return
    self._file.write(json.dumps(record) + '\n')
    parts = (key for key in record if key.startswith('loss_'))
    for key in ('loss', 'accuracy', 'examples_per_second', *parts):
      self._events.add_scalar(f'{record["split"]}/{key}', record[key], record['step'])
    self._events.add_scalar('learning_rate', record['learning_rate'], record['step'])

  def close(self) -> None:
    """Flushes and closes."""
    if self._file is not None:
      self._file.close()
      self._events.close()


_importing = threading.Lock()


def _summary_writer() -> Any:
  """tensorboardX's class. Where PyTorch is installed it would import that, in more than a second, for nothing here."""
  with _importing:  # several runs may begin at the same time
    hidden = 'torch' not in sys.modules
    if hidden:
      sys.modules['torch'] = None  # which makes `import torch` raise ImportError
    try:
      import tensorboardX
    finally:
      if hidden:
        del sys.modules['torch']
  return tensorboardX.SummaryWriter


def _parse(line: str) -> dict[str, Any] | None:
  try:
    record = json.loads(line)
  except json.JSONDecodeError:  # the last line of a run that was killed while it wrote
    return None
  whole = isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in RECORD.items())
  return record if whole else None
