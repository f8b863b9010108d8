"""Pictures of a folder while training and evaluating, good ones and bad ones."""

import contextlib
import json
import re

import numpy as np
import pytest
from folder_helpers import make, save, truncate
from helpers import call_main, draw_nothing, least_table, read_log, share_programs, take_devices

from googlenet_jax import runs
from googlenet_jax.data import decoding, dividing, folder, pictures, pipeline, splits
from googlenet_jax.data.splits import SPLITS
from googlenet_jax.evaluation import evaluate
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet
from googlenet_jax.training import summary

pytestmark = pytest.mark.usefixtures('own_cache')


# Decoding ------------------------------------------------------------------------------------------------------------


def test_channels_follow_the_pictures(tmp_path):
  make(tmp_path, {'a': 4, 'b': 4}, colour=False)
  assert folder.load(tmp_path).image_shape == (8, 8, 1)
  assert folder.load(tmp_path, channels=3).image_shape == (8, 8, 3)
  save(tmp_path / 'b' / 'one.png', 6, 30)
  assert folder.load(tmp_path).image_shape == (30, 30, 3)
  assert folder.load(tmp_path, channels=1, canvas=20).image_shape == (20, 20, 1)


def test_in_memory_and_on_disk_are_the_same_and_are_what_prediction_reads(tmp_path):
  sizes = [(3, 40), (1, 1), (40, 3), (9, 9), (64, 50), (8, 8), (5, 90)]
  for i, (height, width) in enumerate(sizes * 3):
    save(tmp_path / 'ab'[i % 2] / f'{i}.{("png", "jpg")[i % 3 == 0]}', height, width)
  memory, disk = (folder.load(tmp_path, canvas=32, memory_mb=mb) for mb in (100, 0))
  assert memory.rows() == disk.rows()
  assert memory.train.in_memory
  assert not disk.train.in_memory
  for name in SPLITS:
    kept, read = getattr(memory, name), getattr(disk, name)
    indices = np.arange(len(kept))[::-1]
    for key, value in kept.batch(indices).items():
      np.testing.assert_array_equal(value, read.batch(indices)[key])
    for i, file in enumerate(kept.files):
      (canvas,), ((height, width),) = splits.on_canvas([pictures.read(tmp_path / file, 3, 32)], 32)
      np.testing.assert_array_equal(read.picture(i), canvas[:height, :width])
    few = read.take(np.array([1, 0]))
    np.testing.assert_array_equal(few.batch(np.array([1]))['image'], read.batch(np.array([0]))['image'])
    assert few.files.tolist() == [read.files[1], read.files[0]]


def test_an_evaluation_decodes_only_its_split(tmp_path, capsys):
  make(tmp_path, {'a': 20, 'b': 20})
  found = folder.load(tmp_path, used=('test',), memory_mb=1)
  assert found.test.in_memory
  assert not found.train.in_memory
  assert 'decoding 4 pictures' in capsys.readouterr().out
  np.testing.assert_array_equal(found.test.images, folder.load(tmp_path).test.images)


def test_training_batches_are_the_same_from_any_step(tmp_path, mesh_of):
  make(tmp_path, {'a': 20, 'b': 20})
  memory, disk = (folder.load(tmp_path, memory_mb=mb).train for mb in (100, 0))
  from_start = pipeline.train_batches(memory, 8, 3, 0, mesh_of(1))
  later = pipeline.train_batches(disk, 8, 3, 2, mesh_of(1))
  for batch in [next(from_start) for _ in range(6)][2:]:
    other = next(later)
    for key in ('image', 'label', 'size', 'index'):
      np.testing.assert_array_equal(batch[key], other[key])


def test_unreadable_files_are_named_and_skipped_up_to_a_share(tmp_path, capsys):
  root = make(tmp_path, {'a': 10, 'b': 9})
  (root / 'b' / 'text.png').write_text('no picture')
  with pytest.raises(
    UserError, match=r'^1 of 20 pictures in \S+ cannot be read, and config.data.max_unreadable=0.01 allows 0: '
  ):
    folder.load(root)
  dataset = folder.load(root, max_unreadable=0.05)
  out = capsys.readouterr().out
  assert f'unreadable: {root}/b/text.png is not a picture that can be read' in out
  assert (
    '2 classes, 19 pictures (9 to 10 a class, smallest b); 15 to train on, 2 validation, 2 test; 1 skipped; ' in out
  )
  assert dataset.rows()[-1] == ('b/text.png', 'b', 'skipped')
  assert len(dataset.rows()) == 20


def damaged_set(tmp_path):
  """A folder in which the pixels of a training and of a test picture are damaged, and its splits."""
  root = make(tmp_path / 'set', {'a': 20, 'b': 20}, height=30)
  healthy = folder.load(root)
  for split, index in (('train', 3), ('test', 1)):
    truncate(root / getattr(healthy, split).files[index])
  return root, healthy


def test_damaged_pixels_are_found_before_training_in_memory(tmp_path):
  root, healthy = damaged_set(tmp_path)
  with pytest.raises(UserError, match='2 of 40 pictures'):
    folder.load(root, max_unreadable=0.04)
  found = folder.load(root, max_unreadable=0.05)
  lost = (healthy.train.files[3], healthy.test.files[1])
  assert {file for file, _ in found.skipped} == set(lost)
  kept = [row for row in healthy.rows() if row[0] not in lost]  # nothing else changes its place
  assert found.rows()[:-2] == kept
  dividing.write(tmp_path, found.rows())
  for mb in (100, 0):  # a run that goes on leaves them out too
    assert (
      folder.load(root, max_unreadable=0.05, memory_mb=mb, split_file=tmp_path / 'split.csv').rows() == found.rows()
    )


@pytest.mark.parametrize('memory_mb', [0, 100])
def test_damaged_pixels_change_nothing_else_while_training(tmp_path, capsys, memory_mb):
  """In training the next picture of the class stands in; in a test the place is black, so nothing counts twice."""
  root, healthy = damaged_set(tmp_path)
  dividing.write(tmp_path, healthy.rows())
  found = folder.load(root, max_unreadable=0.05, memory_mb=memory_mb, split_file=tmp_path / 'split.csv')
  assert found.rows() == healthy.rows()
  for _ in range(2):
    for name, place in (('train', 3), ('test', 1)):
      expected = {key: value.copy() for key, value in getattr(healthy, name).batch(np.s_[:]).items()}
      for key in ('image', 'size'):
        expected[key][place] = expected[key][4] if name == 'train' else {'image': 0, 'size': 30}[key]
      batch = getattr(found, name).batch(np.arange(len(expected['label'])))
      for key, value in expected.items():
        np.testing.assert_array_equal(batch[key], value)
  out = capsys.readouterr().out
  assert out.count(f'unreadable: {root}/{healthy.train.files[3]} is damaged') == 1
  assert out.count(f'unreadable: {root}/{healthy.test.files[1]} is damaged') == 1
  assert evaluate.damage({'validation': found.validation, 'test': found.test}) == (
    'note: 1 of 4 test pictures cannot be read: each counts as a black picture'
  )
  assert evaluate.damage({'train': found.train}) == (
    'note: 1 of 32 train pictures cannot be read: each counts as another picture of its class'
  )
  assert evaluate.damage({'validation': None, 'test': healthy.test}) == ''
  assert (found.test.take(np.array([0, 1])).count_damaged(), found.test.take(np.array([0])).count_damaged()) == (1, 0)
  (root / healthy.train.files[3]).write_bytes(b'')  # damaged in its header too: it still counts once
  found = folder.load(root, max_unreadable=0.05, memory_mb=memory_mb, split_file=tmp_path / 'split.csv')
  assert found.rows() == healthy.rows()
  np.testing.assert_array_equal(found.train.picture(3), healthy.train.picture(4))
  found.test.batch(np.arange(len(found.test)))
  truncate(root / healthy.train.files[7])
  if memory_mb == 0:
    with pytest.raises(UserError, match='3 of 40 pictures'):
      found.train.batch(np.array([7]))


@pytest.mark.parametrize(('most', 'bad', 'allowed'), [(0.29, 29, True), (0.29, 30, False), (0.0, 1, False)])
def test_the_share_of_unreadable_files_is_exact(tmp_path, most, bad, allowed):
  reasons = {f'{i}.png': f'{i}.png is damaged' for i in range(bad)}
  with (
    contextlib.nullcontext() if allowed else pytest.raises(UserError, match=f'{bad} of 100 .* allows {bad - 1}: 0.png')
  ):
    decoding.Damage(tmp_path, 100, most, reasons)


def test_the_stand_in_is_the_next_picture_of_the_class_that_can_be_read(tmp_path):
  root = make(tmp_path, {'a': 4, 'b': 2})
  files = np.array(['a/0.png', 'b/0.png', 'a/1.png', 'b/1.png', 'a/2.png', 'a/3.png'], object)
  damage = decoding.Damage(root, 6, 1.0, {})
  images = decoding.FolderImages(root, files, 8, 3, damage, np.array([0, 1, 0, 1, 0, 0]))
  whole = images[np.arange(6)]
  for name in ('a/1', 'a/3', 'a/0', 'b/1'):
    truncate(root / f'{name}.png')
  np.testing.assert_array_equal(images[np.arange(6)], whole[[4, 1, 4, 1, 4, 4]])
  truncate(root / 'b/0.png')
  with pytest.raises(UserError, match=r'no picture of the class of b/1\.png can be read'):
    images[np.array([3])]


def test_a_class_whose_training_pictures_are_all_damaged_is_refused(tmp_path):
  root = make(tmp_path, {'a': 10, 'b': 3}, height=30)
  (file,) = (f for f in folder.load(root).train.files if f.startswith('b'))
  truncate(root / file)
  with pytest.raises(UserError, match='no picture to train on in b can be read'):
    folder.load(root, max_unreadable=0.5)


def test_splits_whose_pictures_are_all_damaged(tmp_path, capsys):
  root = make(tmp_path, {'a': 5, 'b': 5}, height=30)
  healthy = folder.load(root)
  for file in healthy.validation.files:
    truncate(root / file)
  assert folder.load(root, max_unreadable=1).validation is None
  assert '8 pictures (4 a class); 6 to train on, 0 validation, 2 test; 2 skipped; ' in capsys.readouterr().out
  for file in healthy.test.files:
    truncate(root / file)
  with pytest.raises(UserError, match='no test picture can be read: add some'):
    folder.load(root, max_unreadable=1)


def test_evaluation_of_a_streamed_folder_sees_every_picture_once(tmp_path, mesh_of):
  make(tmp_path, {'a': 30, 'b': 25})
  test = folder.load(tmp_path, memory_mb=0, test_share=0.3).test
  batches = list(pipeline.eval_batches(test, 8, mesh_of(2)))
  images = np.concatenate([batch['image'] for batch in batches])[: len(test)]
  np.testing.assert_array_equal(images, test.images[np.arange(len(test))])


# A whole run ---------------------------------------------------------------------------------------------------------


def test_an_ensemble_is_trained_continued_and_evaluated_from_its_folder_of_pictures(tmp_path, monkeypatch):
  monkeypatch.setattr(googlenet, 'TABLE', least_table())
  take_devices(monkeypatch, 2)
  share_programs(monkeypatch)
  draw_nothing(monkeypatch)
  monkeypatch.setattr(summary, 'estimate', lambda *_: 0.0)
  root = make(tmp_path / 'set', {'a': 24, 'b': 16}, colour=False)
  (root / 'b' / 'text.png').write_text('no picture')
  (tmp_path / 'mine.py').write_text(
    'from configs import default\n'
    'def get_config():\n'
    '  config = default.get_config()\n'
    '  config.data.name, config.data.max_unreadable, config.data.memory_mb = "folder", 0.1, 0\n'
    '  config.image_size, config.batch_size, config.log_every_steps, config.max_steps = 17, 8, 2, 2\n'
    '  config.class_weights = "balanced"\n'
    '  return config\n'
  )
  monkeypatch.chdir(tmp_path)
  run = tmp_path / 'run'
  train = ['--config=mine.py', '--config.data.source_dir=set', '--workdir=run', '--config.ensemble.members=2']
  ended = call_main(*train)
  assert (ended.status, ended.err) == (0, '')
  assert (
    'set: 2 classes, 40 pictures (16 to 24 a class, smallest b); 32 to train on, 4 validation, 4 test; ' in ended.out
  )
  assert re.search(r'step 2/2 epoch 0.50/1: .* examples/s \(decoding up to \d+/s\)', ended.out)
  assert re.search(r'epoch 0.5: .*; decoding (keeps up|is the bottleneck) \(at most \d+ images/s\)', ended.out)
  written = [(tmp_path / 'run' / f'member_{i}' / 'split.csv').read_text() for i in (0, 1)]
  assert written[0] == written[1]
  assert written[0].endswith('b/text.png,b,skipped\n')
  assert runs.read(tmp_path / 'run' / 'member_1').config.data.source_dir == str(root)
  assert read_log(tmp_path / 'run' / 'member_0')[0]['decoded_per_second'] > 0

  for name in ('new.png', '3.png'):  # in colour: the one may not be seen, the other becomes grey
    save(root / 'a' / name, 30, 20)
  truncate(root / next(file for file, _, split in dividing.read(run / 'member_0' / 'split.csv') if split == 'test'))
  note = 'note: 1 of 4 test pictures cannot be read: each counts as a black picture\n'
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  monkeypatch.chdir(elsewhere)
  ended = call_main('--mode=evaluate', f'--workdir={run}', '--crops=1')
  assert (ended.status, ended.err, ended.out.count(note)) == (0, '', 1)
  assert json.loads((run / 'evaluation.json').read_text())['examples'] == 4
  ended = call_main(f'--workdir={run}/member_0', '--config.max_steps=4')
  assert (ended.status, ended.err, ended.out.count(note)) == (0, '', 1)
  assert 'continuing after step 2 of 4' in ended.out
  assert (run / 'member_0' / 'split.csv').read_text() == written[0]
  (root / 'a' / '1.png').unlink()
  go_on = [f'--workdir={run}/member_1', '--config.max_steps=4']
  ended = call_main(*go_on)
  assert ended.status == 2
  assert ended.err.startswith(f'error: {root} lacks a/1.png, listed in {run}/member_1/split.csv: put them back')
  assert len(ended.err.splitlines()) == 1
  (run / 'member_1' / 'split.csv').unlink()
  make(root, {'c': 3})
  ended = call_main(*go_on)
  assert ended.status == 2
  assert 'set has other classes now (new: c; gone: none) than when the run was trained' in ended.err
