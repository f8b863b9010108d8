"""Whole runs: what they write, how they stop, how they go on."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import read_log, small_config, small_table, take_two_devices

from googlenet_jax import recipe
from googlenet_jax.data import augment, datasets, pipeline, random_keys
from googlenet_jax.evaluation import plots, table
from googlenet_jax.host import checkpoints, console, sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.host.signals import StopRequest
from googlenet_jax.model import googlenet
from googlenet_jax.training import loop, optimizers
from googlenet_jax.training.report import Report
from googlenet_jax.training.state import ITEMS, abstract

ROOT = pathlib.Path(__file__).parent.parent
# Everything that could make two runs differ is on.
CONFIG = {
  'batch_size': 128,  # 11 steps an epoch
  'epochs': 2,
  'learning_rate': 0.02,
  'model.norm': 'batch',
  'model.dropout': 0.3,
  'augment.shift': 2,
  'augment.flip': True,
  'augment.min_area': 0.5,
  'augment.random_interpolation': True,
  'augment.photometric': 0.3,
  'augment.erasing': 0.3,
  'average_decay': 0.9,
  'model.auxiliary': 'adaptive_pool',
  'log_every_steps': 4,
}


def last_state(workdir):
  """The arrays of the newest checkpoint, as saved."""
  saved = checkpoints.Checkpoints(workdir)
  step = saved.steps()[0]
  arguments = {item: ocp.args.StandardRestore() for item in ITEMS}
  state = dict(saved._manager.restore(step, args=ocp.args.Composite(**arguments)).items())
  saved.close()
  return step, state


@pytest.fixture(scope='module', autouse=True)
def two_devices():
  with pytest.MonkeyPatch.context() as patch:
    take_two_devices(patch)
    yield


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(googlenet, 'TABLE', small_table())
    workdir = tmp_path_factory.mktemp('whole')
    loop.train(small_config(**CONFIG), workdir)
  return workdir


def assert_same_run(workdir, reference):
  step, state = last_state(workdir)
  expected_step, expected = last_state(reference)
  assert step == expected_step == 22
  assert len(jax.tree.leaves(state)) > 60
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
  # The log has no gaps and no repetitions either.
  ours, theirs = ([r for r in read_log(w) if r['split'] == 'test'] for w in (workdir, reference))
  assert [r['step'] for r in ours] == [11, 22]
  assert [r['loss'] for r in ours] == [r['loss'] for r in theirs]
  summaries = [json.loads((w / 'summary.json').read_text()) for w in (workdir, reference)]
  for key in ('train_loss', 'test_accuracy', 'test_accuracy_raw'):
    assert summaries[0][key] == summaries[1][key]


@pytest.mark.usefixtures('small_network')
def test_a_signal_saves_and_the_same_command_goes_on_bit_for_bit(uninterrupted, tmp_path, monkeypatch, capsys):
  count = console.Progress.step

  def step(self):
    count(self)
    step.taken += 1
    if step.taken == 6:
      os.kill(os.getpid(), signal.SIGTERM)

  step.taken = 0
  with monkeypatch.context() as patch:
    patch.setattr(console.Progress, 'step', step)
    with pytest.raises(SystemExit) as stopped:
      loop.train(small_config(**CONFIG), tmp_path)
  assert stopped.value.code == 128 + signal.SIGTERM
  assert 'stopped at step 6 of 22, saved\nThe same command continues: python ' in capsys.readouterr().out
  loop.train(small_config(**CONFIG), tmp_path)
  assert 'continuing after step 6 of 22' in capsys.readouterr().out
  assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_are_requests_within_the_block_and_what_they_were_behind_it(number):
  before = signal.getsignal(number)
  with StopRequest() as stop:
    assert stop.signal is None
    os.kill(os.getpid(), number)
    assert stop.signal is number
  assert signal.getsignal(number) is before


def test_a_second_signal_ends_at_once_whatever_threads_are_at_work():
  code = """
import os, signal, threading, time
from googlenet_jax.host.signals import StopRequest
with StopRequest():
  threading.Thread(target=time.sleep, args=(60,)).start()
  for _ in range(2):
    os.kill(os.getpid(), signal.SIGTERM)
"""
  process = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, timeout=50)
  assert process.returncode == 128 + signal.SIGTERM
  assert b'once more ends at once' in process.stderr


@pytest.mark.usefixtures('small_network', 'uninterrupted')  # the latter has compiled the same step
def test_a_signal_that_comes_late_in_a_step_is_answered_after_the_next(tmp_path, monkeypatch):
  class Late:
    """A request that comes when the loop has looked five times: once in each step, or oftener in the fourth."""

    def __enter__(self):
      self.looks = 0
      return self

    def __exit__(self, *_):
      pass

    @property
    def signal(self):
      self.looks += 1
      return signal.SIGTERM if self.looks > 5 else None

    def exit(self):
      raise SystemExit(128 + signal.SIGTERM)

  monkeypatch.setattr(loop, 'StopRequest', Late)
  with pytest.raises(SystemExit) as stopped:
    loop.train(small_config(**CONFIG), tmp_path)
  assert stopped.value.code == 128 + signal.SIGTERM
  assert checkpoints.Checkpoints(tmp_path).steps() == [6]  # in the fourth, a log point, nothing was saved


# TensorStore's threads grumble when they meet half a file.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.usefixtures('small_network')
def test_a_killed_run_goes_on_bit_for_bit_and_replaces_a_damaged_checkpoint(
  uninterrupted, tmp_path, monkeypatch, capsys
):
  code = """
import os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests']
from helpers import small_config, small_table, take_two_devices
from test_end_to_end import CONFIG
import pathlib, pytest
from googlenet_jax.model import googlenet
from googlenet_jax.host import console
from googlenet_jax.training import loop
googlenet.TABLE = small_table()
take_two_devices(pytest.MonkeyPatch())
count = console.Progress.step
taken = 0
def step(self):
  global taken
  taken += 1
  if taken == 17:
    os.kill(os.getpid(), 9)
console.Progress.step = step
loop.train(small_config(**CONFIG, checkpoint_every_steps=7), pathlib.Path(sys.argv[2]))
"""
  done = subprocess.run([sys.executable, '-c', code, str(ROOT), str(tmp_path)], timeout=300, check=False)
  assert done.returncode == -signal.SIGKILL
  saved = checkpoints.Checkpoints(tmp_path)
  newest, before = saved.steps()[:2]
  saved.close()
  assert (newest, before) in [(14, 11), (11, 7)]  # the last one may not have been complete yet
  for path in (tmp_path / 'checkpoints' / str(newest)).glob('**/d/*'):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  save, read_back = checkpoints.Checkpoints.save, []

  def save_and_read(self, step, saved_items, *rest):
    save(self, step, saved_items, *rest)
    self.wait()
    self.restore({item: abstract(tree) for item, tree in saved_items.items()}, step)
    read_back.append(step)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.Checkpoints, 'save', save_and_read)
    loop.train(small_config(**CONFIG, checkpoint_every_steps=7), tmp_path)
  assert read_back == [step for step in (7, 11, 14, 21, 22) if step > before]  # the damaged one written again, whole
  out = capsys.readouterr().out
  assert re.search(f'warning: checkpoint {newest} in .*; deleted, step {before} is whole', out)
  assert f'continuing after step {before} of 22' in out
  assert_same_run(tmp_path, uninterrupted)


@pytest.mark.usefixtures('small_network')
def test_another_recipe_in_the_same_workdir_is_refused(uninterrupted):
  with pytest.raises(UserError, match='learning_rate: 0.02 there, 0.5 now'):
    loop.train(small_config(**{**CONFIG, 'learning_rate': 0.5}), uninterrupted)


@pytest.mark.usefixtures('small_network')
def test_evaluation_of_a_checkpoint(uninterrupted, capsys):
  config = small_config(**CONFIG)
  under_way = uninterrupted / 'checkpoints' / '23.orbax-checkpoint-tmp'
  under_way.mkdir()
  table.evaluate_checkpoint(config, uninterrupted, None, 'test', [1])
  under_way.rmdir()  # still there: it may belong to a training that goes on beside the evaluation
  found = json.loads((uninterrupted / 'evaluation.json').read_text())
  summary = json.loads((uninterrupted / 'summary.json').read_text())
  assert found['accuracy'] == summary['test_accuracy']
  assert found['loss'] == pytest.approx(summary['test_loss'], rel=1e-6)
  assert (found['step'], found['split'], found['examples']) == (22, 'test', 360)
  confusion = np.array(found['confusion_matrix'])
  assert confusion.sum() == 360
  assert np.trace(confusion) / 360 == found['accuracy']
  assert found['per_class_accuracy']['3'] == confusion[3, 3] / confusion[3].sum()
  assert f'accuracy {found["accuracy"]:.4f}' in capsys.readouterr().out

  other = small_config(**CONFIG, weight_decay=0.1, clip_norm=1.0, nesterov=True)  # of no concern to evaluation
  table.evaluate_checkpoint(other, uninterrupted, 11, 'train', [1])
  assert json.loads((uninterrupted / 'evaluation.json').read_text())['examples'] == 1437
  with pytest.raises(UserError, match=r'no checkpoint of step 5 in .*: there are \[22, 11\]'):
    table.evaluate_checkpoint(config, uninterrupted, 5, 'test')
  with pytest.raises(UserError, match='holds no images out'):
    table.evaluate_checkpoint(config, uninterrupted, None, 'validation')
  with pytest.raises(UserError, match='holds no checkpoints: train first'):
    table.evaluate_checkpoint(config, uninterrupted / 'nowhere', None, 'test')


@pytest.mark.usefixtures('small_network')
def test_the_picture_of_a_batch_is_what_the_first_step_sees(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(plots, 'augmentations', lambda *arguments: drawn.append(arguments))
  config = small_config(**CONFIG | {'max_steps': 1, 'ensemble.member': 1})
  loop.train(config, tmp_path)
  ((stored, seen, names, _),) = drawn
  split, seed, mesh = datasets.load('digits').train, recipe.sampling_seed(config), sharding.make_mesh()
  batch = jax.device_get(next(pipeline.train_batches(split, config.batch_size, seed, 0, mesh)))
  keys = random_keys.example_keys(seed, jnp.int32(0), jnp.arange(config.batch_size))
  expected = augment.augment(batch['image'], keys, config.image_size, config.augment)
  assert len(stored) == len(names) == len(seen) == 16
  np.testing.assert_array_equal(stored, batch['image'][:16])
  assert names == [str(label) for label in batch['label'][:16]]
  np.testing.assert_allclose(seen, expected[:16], atol=1e-5)


@pytest.mark.usefixtures('small_network')
def test_a_class_without_images_is_null_in_json(tmp_path, monkeypatch, capsys):
  digits = datasets.load('digits')
  keep = digits.test.labels != 3
  few = datasets.Split(digits.test.images[keep], digits.test.labels[keep])
  monkeypatch.setattr(datasets, 'load', lambda **_: dataclasses.replace(digits, test=few))
  loop.train(small_config(batch_size=128, max_steps=1), tmp_path)
  table.evaluate_checkpoint(small_config(batch_size=128), tmp_path, None, 'test', [1])
  text = (tmp_path / 'evaluation.json').read_text()
  assert 'NaN' not in text
  classes = json.loads(text)['per_class_accuracy']
  assert [name for name, accuracy in classes.items() if accuracy is None] == ['3']
  assert '  3     nan ' in capsys.readouterr().out


@pytest.mark.usefixtures('small_network')
def test_an_ended_run_given_again_adds_nothing(uninterrupted, tmp_path, capsys):
  shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
  (tmp_path / 'curves.png').unlink()
  loop.train(small_config(**CONFIG), tmp_path)
  assert read_log(tmp_path) == read_log(uninterrupted)
  assert (tmp_path / 'summary.json').read_text() == (uninterrupted / 'summary.json').read_text()
  assert (tmp_path / 'curves.png').exists()
  out = capsys.readouterr().out
  assert 'already ended at step 22; more --config.epochs or --config.max_steps would go on' in out
  assert 'compiling' not in out
  assert 'continuing' not in out


@pytest.mark.usefixtures('small_network')
def test_another_length_of_a_schedule_that_depends_on_it_is_said(tmp_path, monkeypatch, capsys):
  config = {'batch_size': 128, 'schedule': 'cosine', 'max_steps': 1}
  loop.train(small_config(**config, epochs=2), tmp_path)
  capsys.readouterr()
  introduce = Report.introduce

  class IntroducedError(Exception):
    """All that is looked at has been said; compiling would only take time."""

  def introduce_and_stop(self, step):
    introduce(self, step)
    self.close()
    raise IntroducedError

  monkeypatch.setattr(Report, 'introduce', introduce_and_stop)
  with pytest.raises(IntroducedError):
    loop.train(small_config(**{**config, 'max_steps': 2}, epochs=2), tmp_path)
  assert 'note:' not in capsys.readouterr().out
  with pytest.raises(IntroducedError):
    loop.train(small_config(**{**config, 'max_steps': 3}, epochs=5), tmp_path)
  assert 'note: the cosine schedule is now spread over 5 epochs instead of 2' in capsys.readouterr().out


@pytest.mark.usefixtures('small_network')
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  config = small_config(**{**CONFIG, 'learning_rate': 1e30, 'schedule': 'constant', 'model.norm': 'none'})
  with pytest.raises(UserError, match=r'step \d+: the loss is not finite, at a learning rate of 1e\+30.*no checkpoint'):
    loop.train(config, tmp_path)
  assert not (tmp_path / 'summary.json').exists()


@pytest.mark.usefixtures('small_network')
def test_the_rate_named_is_that_of_the_bad_step(tmp_path):
  # One cycle climbs from 1/25 of its rate; log points are further apart than the first steps.
  config = small_config(batch_size=128, schedule='one_cycle', learning_rate=1e30, epochs=1, log_every_steps=11)
  with pytest.raises(UserError) as raised:
    loop.train(config, tmp_path)
  step, rate = re.search(r'step (\d+): .* rate of (\S+)\. Lower', str(raised.value)).groups()
  schedule = optimizers.learning_rate_schedule(config, 11)
  assert int(step) < 11
  assert float(rate) == pytest.approx(float(schedule(int(step) - 1)), rel=1e-5)
