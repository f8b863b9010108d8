"""What the tests of the page share: a small network, a run with answers, waiting."""

import contextlib
import json
import time

import jax
import pytest
from helpers import least_table, write_run

from googlenet_jax import runs
from googlenet_jax.model import googlenet
from googlenet_jax.page import live, uploads

MOST_BYTES = 300_000  # the largest upload in the tests


@contextlib.contextmanager
def small_machine():
  """A small network, one device, and a page that takes small files only."""
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.local_devices()[:1]
    patch.setattr(jax, 'local_devices', lambda: devices)
    patch.setattr(googlenet, 'TABLE', least_table())
    patch.setattr(uploads, 'MOST_BYTES', MOST_BYTES)
    patch.setattr(live, 'LOOK_SECONDS', 0.1)
    yield


def wait_for(what, seconds=60.0):
  """Waits until `what()` is true, and returns it."""
  end = time.monotonic() + seconds
  while not (found := what()):
    assert time.monotonic() < end, 'it did not happen'
    time.sleep(0.02)
  return found


def write_digits(workdir, config, *saves):
  """Writes a run with the classes of the digits, so its test images are found."""
  write_run(workdir, config, *saves)
  runs.write(workdir, runs.Run(config, tuple('0123456789'), (8, 8, 1)))
  return workdir


def write_records(workdir):
  """Adds records of three steps."""
  numbers = {name: 0.5 for name, kind in runs.RECORD.items() if kind is float}
  records = [
    {**numbers, 'step': step, 'epoch': step / 10, 'split': split, 'loss': 2.0 / step}
    for step in (1, 2, 3)
    for split in ('train', 'test')
  ]
  with (workdir / runs.METRICS).open('a') as file:
    file.writelines(json.dumps(record) + '\n' for record in records)
