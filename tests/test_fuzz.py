"""Damaged and hostile files: a short run of experiments/fuzz.py, and files that were made to do harm."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from experiments import fuzz, hostile

INPUTS = 60


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture(scope='module')
def watch(tmp_path_factory):
  watch = fuzz.Watch(tmp_path_factory.getbasetemp())
  yield watch
  watch.on = False


# Threads of TensorStore complain when they meet half a file; PyTorch warns of what it does not know.
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', fuzz.READERS)
def test_every_reader_gives_its_result_or_one_line(name, folder, capfd):
  found = fuzz.fuzz(name, INPUTS // fuzz.FEWER.get(name, 1), 1, folder)['found']
  assert not [outcome for outcome in found if outcome.startswith('FAULT')], found
  if name not in ('class_names', 'caches', 'checkpoint', 'metrics_jsonl'):
    assert found['UserError'] > 5  # mutations do damage


def torch_file(payload):
  """A file of torch.save whose pickle is another one."""
  import torch

  saved, out = io.BytesIO(), io.BytesIO()
  torch.save({'x': torch.ones(1)}, saved)
  with zipfile.ZipFile(saved) as old, zipfile.ZipFile(out, 'w') as new:
    for name in old.namelist():
      new.writestr(name, payload if name.endswith('data.pkl') else old.read(name))
  return out.getvalue()


def huge_array(files):
  """An input of the fuzzer: the metadata of a checkpoint promise 2^31 rows."""
  number = [path.name for path in files].index('_METADATA')
  text = files[number].read_text()
  assert '3' in text
  return struct.pack('<H', number) + text.replace('3', '2147483648').encode()


HOSTILE = {
  'idx of 2^31 images': ('idx', lambda reader: reader.seeds[2]),
  'idx that unpacks to 200 MB': ('idx', lambda reader: reader.bomb),
  'picture of 10^18 pixels': ('pictures', lambda reader: reader.seeds[-1]),
  'pickle alone': ('pth', lambda reader: pickle.dumps(hostile.Evil(), protocol=2)),
  'pickle in a zip': ('pth', lambda reader: torch_file(pickle.dumps({'x': hostile.Evil()}, protocol=2))),
  'eval by name': ('pth', lambda reader: torch_file(b'cbuiltins\neval\n.')),
  'header of 2^62 bytes': ('safetensors', lambda reader: reader.seeds[1]),
  'tensor of 2^61 numbers': (
    'safetensors',
    lambda reader: reader.file(b'{"x":{"dtype":"F32","shape":[2305843009213693951],"data_offsets":[0,86]}}'),
  ),
  'no numbers in 2^62 rows': (
    'safetensors',
    lambda reader: reader.file(
      b'{"x":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]},'
      b'"y":{"dtype":"U8","shape":[86],"data_offsets":[0,86]}}'
    ),
  ),
  'deep JSON': ('run_json', lambda reader: b'[' * 1_000_000),
  'deep JSON in a log': ('metrics_jsonl', lambda reader: b'[' * 1_000_000),
  'field of 200,000 letters': ('split_csv', lambda reader: reader.seeds[-1]),
  'checkpoint of a huge array': (
    'checkpoint',
    lambda reader: huge_array(reader.files),
  ),
}  # fmt: skip


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('what', HOSTILE)
def test_what_is_made_to_do_harm_is_refused_before_memory_is_taken(what, folder, watch):
  name, make = HOSTILE[what]
  reader = fuzz.READERS[name](folder)
  data = make(reader)
  fuzz.forget_peak()
  before = fuzz.peak()
  outcome = fuzz.one(reader, data, watch)
  assert outcome == ('read' if name in ('metrics_jsonl', 'checkpoint') else 'UserError')
  assert fuzz.peak() - before < 60e6
  assert not os.path.exists('executed')


def test_pickles_in_a_cache_are_not_read(folder, watch):
  reader = fuzz.READERS['caches'](folder)
  for number in range(2):
    assert fuzz.one(reader, bytes([number]) + reader.evil, watch) in ('made anew', 'taken')
  assert not os.path.exists('executed')
  np.load(io.BytesIO(reader.evil), allow_pickle=True)['of']  # the file does run a program where it is trusted
  assert os.path.exists('executed')
