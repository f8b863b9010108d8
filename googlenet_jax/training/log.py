"""The log of a run: `metrics.jsonl`, one JSON object per line, and the same numbers as TensorBoard events."""

import json
import pathlib
import sys
import threading
from typing import Any

from googlenet_jax import runs
from googlenet_jax.host import files


class MetricsLog:
  """The log of one run. Only the first process writes."""

  def __init__(self, workdir: pathlib.Path, first_step: int):
    """Opens the log, and drops what an interrupted run wrote after `first_step`, its last checkpoint."""
    self.records: list[dict[str, Any]] = []
    self._file = self._events = None
    if not files.is_writer():
      return
    path = workdir / runs.METRICS
    self.records = [record for record in runs.records(workdir) if 0 < record['step'] <= first_step]
    files.write_text(path, ''.join(json.dumps(record) + '\n' for record in self.records))
    self._file = path.open('a', buffering=1)
    self._events = _summary_writer()(str(workdir / 'tensorboard'), purge_step=first_step and first_step + 1)

  def write(self, record: dict[str, Any]) -> None:
    """Appends a record with the keys of `runs.RECORD`. With auxiliary classifiers it also has the parts of the loss;
    for images that are decoded in each epoch, the images a second that the host could decode.

    A record that the log has already is not written again, so a finished run can be started again.
    """
    last = self.records[-5:]  # one step writes at most train, and validation and test with averaged and raw weights
    if any((r['step'], r['split']) == (record['step'], record['split']) for r in last):
      return
    self.records.append(record)
    if self._file is None:
      return
    self._file.write(json.dumps(record) + '\n')
    parts = (key for key in record if key.startswith('loss_') or key == 'decoded_per_second')
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
  """Returns tensorboardX's class. It hides PyTorch, which tensorboardX would otherwise import for a second."""
  with _importing:  # several runs may begin at the same time
    hidden = 'torch' not in sys.modules
    if hidden:
      sys.modules['torch'] = None  # makes `import torch` raise ImportError
    try:
      import tensorboardX
    finally:
      if hidden:
        del sys.modules['torch']
  return tensorboardX.SummaryWriter
