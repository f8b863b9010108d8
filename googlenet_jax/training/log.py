"""The log of a run: `metrics.jsonl`, one JSON object per line, and the same numbers as TensorBoard events."""

import contextlib
import json
import os
import pathlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Collection
from typing import Any

from googlenet_jax import runs
from googlenet_jax.host import console, files, processes


class MetricsLog:
  """The log of one run. Only the first process writes."""

  def __init__(self, workdir: pathlib.Path, first_step: int):
    """Opens the log, and drops what an interrupted run wrote after `first_step`, its last checkpoint."""
    # All processes read: they must agree on what there is to do.
    self.records = [record for record in runs.records(workdir) if 0 < record['step'] <= first_step]
    self._path, self._folder = workdir / runs.METRICS, workdir / 'tensorboard'
    self._purge_step = first_step and first_step + 1
    self._file = self._events = None
    self._events_work = True
    if processes.is_first():
      files.write_text(self._path, ''.join(json.dumps(record) + '\n' for record in self.records))
      self._file = self._path.open('a', buffering=1)

  def has(self, step: int, splits: Collection[str]) -> bool:
    """Returns whether there is a record of a step for each of these splits."""
    return set(splits) <= {record['split'] for record in self.records if record['step'] == step}

  def write(self, record: dict[str, Any]) -> None:
    """Appends a record with the keys of `runs.RECORD`. With auxiliary classifiers it also has the parts of the loss;
    for images that are decoded in each epoch, the images a second that the host could decode.

    A record that the log has already is not written again, so a finished run can be started again.

    Raises:
      OSError: `metrics.jsonl` cannot be written; the error names it.
    """
    last = self.records[-5:]  # one step writes at most train, and validation and test with averaged and raw weights
    if any((r['step'], r['split']) == (record['step'], record['split']) for r in last):
      return
    self.records.append(record)
    if self._file is None:
      return
    try:
      self._file.write(json.dumps(record) + '\n')
    except OSError as error:
      self.close()
      raise OSError(error.errno, error.strerror, str(self._path)) from error
    if self._events_work:
      self._events_work = False  # after a failure no more are written: the file ends in half an event
      with console.side_output(str(self._folder)):
        self._events = self._events or _EventFile(self._folder, self._purge_step)
        self._events.write(record)
        self._events_work = True

  def close(self) -> None:
    """Closes the files."""
    if self._file is not None:
      with contextlib.suppress(OSError):  # a record that could not be written; this has been said
        self._file.close()
      self._file = None
    if self._events is not None:
      self._events.close()


class _EventFile:
  """A file of TensorBoard events. tensorboardX has the format; its own writer waits forever after a full disk."""

  def __init__(self, folder: pathlib.Path, purge_step: int):
    """Makes a new file in `folder`; what older files hold from `purge_step` on is void."""
    self._event_pb2, self._crc = _tensorboardx()
    folder.mkdir(exist_ok=True)
    numbers = [path.name.split('.')[3] for path in folder.glob('events.out.tfevents.*')]
    newest = max((int(number) for number in numbers if number.isdecimal()), default=0)
    # TensorBoard reads the files in the order of their names. The clock may have been set back.
    name = f'events.out.tfevents.{max(int(time.time()), newest + 1):010d}.{socket.gethostname()}.{os.getpid()}'
    self._file = (folder / name).open('xb', buffering=0)
    self._put(step=purge_step, file_version='brain.Event:2')
    started = self._event_pb2.SessionLog(status=self._event_pb2.SessionLog.START)
    self._put(step=purge_step, session_log=started)

  def write(self, record: dict[str, Any]) -> None:
    """Writes the numbers of a record of `metrics.jsonl`."""
    parts = (key for key in record if key.startswith('loss_') or key == 'decoded_per_second')
    values = {f'{record["split"]}/{key}': record[key] for key in ('loss', 'accuracy', 'examples_per_second', *parts)}
    values['learning_rate'] = record['learning_rate']
    for tag, value in values.items():
      summary = {'value': [{'tag': tag, 'simple_value': value}]}
      self._put(step=record['step'], summary=self._event_pb2.Event(summary=summary).summary)

  def _put(self, **fields: Any) -> None:
    data = self._event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    header = struct.pack('<Q', len(data))
    self._file.write(header + struct.pack('<I', self._crc(header)) + data + struct.pack('<I', self._crc(data)))

  def close(self) -> None:
    self._file.close()


_importing = threading.Lock()


def _tensorboardx() -> tuple[Any, Any]:
  """Returns tensorboardX's events and checksum. PyTorch is hidden from it: its import would take a second."""
  with _importing:  # several runs may begin at the same time
    hidden = 'torch' not in sys.modules
    if hidden:
      sys.modules['torch'] = None  # makes `import torch` raise ImportError
    try:
      from tensorboardX.proto import event_pb2
      from tensorboardX.record_writer import masked_crc32c
    finally:
      if hidden:
        del sys.modules['torch']
  return event_pb2, masked_crc32c
