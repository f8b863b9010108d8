"""The program as people start it: a whole run, evaluation of its folder, and what ends it."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import (
  ROOT,
  assert_one_line,
  call_main,
  draw_small,
  least_table,
  read_log,
  share_programs,
  start_main,
  take_devices,
)
from PIL import Image

from googlenet_jax import recipe, runs
from googlenet_jax.host import files
from googlenet_jax.model import googlenet
from googlenet_jax.training import ensemble, loop

DIGITS = f'--config={ROOT}/configs/digits.py'
pytestmark = pytest.mark.usefixtures('from_the_repository')


# A whole run of the whole network, in processes of its own -----------------------------------------------------------


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('main') / 'whole'
  arguments = ['--config=configs/digits.py', f'--workdir={workdir}', '--config.max_steps=3', '--config.image_size=17']
  arguments += ['--config.data.validation_examples=37', '--config.log_every_steps=2', '--config.model.norm=none']
  return workdir, start_main(*arguments)


def test_main_trains_the_whole_network_and_writes_everything(whole):
  workdir, done = whole
  assert done.returncode == 0, done.stderr
  lines = done.stdout.strip().splitlines()
  assert re.fullmatch(r'loss \d\.\d{3}, train acc \d\.\d{3}, test acc \d\.\d{3}', lines[-2])
  assert re.fullmatch(r'\d+\.\d examples/sec on 2 x cpu', lines[-1])
  assert f'tensorboard --logdir {workdir}/tensorboard' in done.stdout
  assert done.stderr == ''

  names = {path.name for path in workdir.iterdir()}
  assert names == {
    'run.json', 'metrics.jsonl', 'checkpoints', 'tensorboard', 'curves.png', 'confusion.png', 'mistakes.png',
    'predictions.png', 'summary.json', 'augmentations.png', 'per_class.csv', 'mistakes.csv', '.lock',
  }  # fmt: skip
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['steps'] == 3
  assert summary['parameters'] == 5_977_530  # of d2l's network
  assert summary['device_count'] == 2
  assert summary['seed'] == 0
  assert summary['jax_version'] == jax.__version__
  for key in ('train_examples_per_second', 'train_seconds', 'compile_seconds', 'test_loss', 'train_loss', 'epochs'):
    assert summary[key] > 0, key
  assert f'{summary["test_accuracy"]:.3f}' == lines[-2][-5:]
  log = read_log(workdir)
  assert [(r['step'], r['split']) for r in log] == [(2, 'train'), (3, 'train'), (3, 'validation'), (3, 'test')]
  keys = {'step', 'epoch', 'split', 'loss', 'accuracy', 'learning_rate', 'examples_per_second'}
  assert all(set(record) == keys for record in log)
  assert runs.read(workdir).config.max_steps == 3
  for name in ('curves.png', 'confusion.png', 'mistakes.png', 'predictions.png', 'augmentations.png'):
    with Image.open(workdir / name) as picture:
      assert min(picture.size) > 200
      assert len(np.unique(np.asarray(picture))) > 10
  assert next((workdir / 'tensorboard').glob('events*')).stat().st_size > 300


def test_a_copy_of_the_workdir_is_evaluated_anywhere_by_its_name_alone(whole, tmp_path):
  workdir, _ = whole
  shutil.copytree(workdir, tmp_path / 'a copy')
  (tmp_path / 'elsewhere').mkdir()
  done = start_main('--mode=evaluate', '--workdir=../a copy', '--crops=1', cwd=tmp_path / 'elsewhere')
  assert done.returncode == 0, done.stderr
  assert done.stderr == ''
  found = json.loads((tmp_path / 'a copy' / 'evaluation.json').read_text())
  summary = json.loads((workdir / 'summary.json').read_text())
  assert (found['step'], found['split'], found['examples']) == (3, 'test', 360)
  assert found['accuracy'] == summary['test_accuracy']
  assert found['loss'] == pytest.approx(summary['test_loss'], rel=1e-6)
  assert f'accuracy {found["accuracy"]:.4f} ({round(360 * found["accuracy"])} of 360)' in done.stdout
  assert not (workdir / 'evaluation.json').exists()
  assert list((tmp_path / 'elsewhere').iterdir()) == []


# A small run, in this process ----------------------------------------------------------------------------------------

RECIPE = '''"""Digits at the least size."""
from configs import default

def get_config():
  config = default.get_config()
  config.data.name = 'digits'
  config.data.validation_examples = 37
  config.image_size = 17
  config.batch_size = 16
  config.max_steps = 2
  return config
'''


@pytest.fixture(scope='module')
def cheap():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(googlenet, 'TABLE', least_table())
    draw_small(patch)
    take_devices(patch, 2)
    share_programs(patch)
    yield


@pytest.fixture(scope='module')
def small(cheap, tmp_path_factory):
  """A run of a recipe outside the repository, and the path of the recipe."""
  folder = tmp_path_factory.mktemp('small')
  path, workdir = folder / 'Übung.py', folder / 'run'
  path.write_text(RECIPE)
  ended = call_main(f'--config={path}', f'--workdir={workdir}')
  assert (ended.status, ended.err) == (0, '')
  return workdir, path


@pytest.fixture
def copied(small, tmp_path):
  """A copy of the small run."""
  return pathlib.Path(shutil.copytree(small[0], tmp_path / 'copy'))


def evaluated(workdir, *arguments, file='evaluation.json'):
  ended = call_main('--mode=evaluate', f'--workdir={workdir}', '--crops=1', *arguments)
  assert (ended.status, ended.err) == (0, '')
  return json.loads((workdir / file).read_text())


def test_the_workdir_alone_continues_a_run_and_evaluates_its_checkpoints(copied):
  ended = call_main(f'--workdir={copied}/', '--config.max_steps=4')  # with the slash of a completed name
  assert (ended.status, ended.err) == (0, '')
  assert 'continuing after step 2 of 4' in ended.out
  assert runs.read(copied).config.max_steps == 4
  validated = {r['step']: r['accuracy'] for r in read_log(copied) if r['split'] == 'validation'}
  assert set(validated) == {2, 4}
  best = max(validated, key=lambda step: (validated[step], step))
  assert evaluated(copied)['step'] == 4
  assert evaluated(copied, '--step=2')['step'] == 2
  found = evaluated(copied, '--step=best', '--split=validation', file='evaluation_validation.json')
  assert (found['step'], found['examples'], found['accuracy']) == (best, 37, validated[best])


def test_evaluation_accepts_a_recipe_that_agrees_and_keys_that_change_no_result(small, copied, tmp_path):
  workdir, path = small
  before = evaluated(workdir)
  summary = json.loads((workdir / 'summary.json').read_text())
  assert before['accuracy'] == summary['test_accuracy']
  assert evaluated(copied, f'--config={path}') == before
  changes = ['--config.batch_size=40', '--config.seed=3', '--config.learning_rate=9', '--config.log_every_steps=1']
  found = evaluated(copied, *changes)
  assert found['accuracy'] == before['accuracy']
  assert found['loss'] == pytest.approx(before['loss'], rel=1e-6)
  assert runs.read(copied).config.batch_size == 16  # evaluation leaves the recipe as it is


def test_evaluation_reads_the_data_from_another_folder(small, copied, monkeypatch):
  asked = []
  monkeypatch.setattr('googlenet_jax.data.datasets.load', lambda **options: asked.append(options) or 1 / 0)
  with pytest.raises(ZeroDivisionError):
    call_main('--mode=evaluate', f'--workdir={copied}', '--config.data.data_dir=/a', '--config.data.source_dir=/b')
  assert (asked[0]['data_dir'], asked[0]['source_dir'], asked[0]['name']) == ('/a', '/b', 'digits')


@pytest.mark.parametrize(
  ('arguments', 'messages'),
  [
    (['--config.image_size=32'], ['holds a run of another recipe (image_size: 17 in the run, 32 given)']),
    (['--config.model.norm=batch'], ["model.norm: 'none' in the run, 'batch' given"]),
    (['--config.average_decay=0.9'], ['average_decay: 0.0 in the run, 0.9 given']),
    (
      [DIGITS],
      ['another recipe', 'image_size: 17 in the run, 32 given', "model.norm: 'none' in the run, 'batch' given"],
    ),
    (['--config.batch_size=41'], ['batch_size=41 does not divide by 2 devices: take 40']),
    (['--config.batch_size=0'], ['config.batch_size=0 is out of range']),
    (['--step=x'], ['--step=x: give a number, or best']),
    (['--step=²'], ['--step=²: give a number, or best']),
    (['--step=-1'], ['--step=-1: give a number, or best']),
    (['--step='], ['--step=: give a number, or best']),
    (['--step=7'], ['there is no checkpoint of step 7 in ', 'there are [2]']),
    (['--step=0'], ['there is no checkpoint of step 0 in ', 'there are [2]']),
    (['--crops=2'], ['--crops=2: choose from 1,6,10,144']),
    (['--crops='], ['--crops=: choose from 1,6,10,144']),
    (['--crops=1,'], ['choose from 1,6,10,144']),
    (['--split=tset'], ['--split', 'tset', 'train|validation|test']),
  ],
)
def test_mistakes_at_an_evaluation_are_one_line(arguments, messages, small):
  workdir, _ = small
  assert_one_line(call_main('--mode=evaluate', f'--workdir={workdir}', *arguments), *messages)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ([], 'holds no run (it is empty): train first, or give the --workdir of a run'),
    (['notes.txt', 'pictures/'], 'holds no run (it holds notes.txt, pictures/): train first'),
    ([f'{i}.txt' for i in range(9)], 'holds no run (it holds 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt and 3 more)'),
    (['a/run.json', 'b/run.json'], 'holds no run, but its folders do: give --workdir={workdir}/a (or b)'),
    (['config.json', 'checkpoints/5/'], 'has checkpoints but no run.json: bring it back from a copy; if an old'),
    (['run.json'], 'run.json is damaged'),
    (None, 'is no folder: train first, or give the --workdir of a run'),
  ],
)
def test_evaluation_of_a_folder_without_a_run_says_what_is_there(content, message, tmp_path):
  workdir = tmp_path / 'there'
  if content is not None:
    workdir.mkdir()
  for name in content or ():
    path = workdir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(parents=True) if name.endswith('/') else path.write_text('')
  ended = call_main('--mode=evaluate', f'--workdir={workdir}')
  assert_one_line(ended, str(workdir), message.format(workdir=workdir))


def test_a_run_without_a_checkpoint_is_not_evaluated(copied):
  shutil.rmtree(copied / 'checkpoints')
  ended = call_main('--mode=evaluate', f'--workdir={copied}')
  assert_one_line(ended, f'{copied} holds no checkpoint yet: train first')


def test_one_member_and_a_whole_ensemble_know_their_recipes(tmp_path):
  config = recipe.read(f'{ROOT}/configs/digits.py')
  config.ensemble.members = 3
  for own, folder in ensemble.members(config, tmp_path):
    folder.mkdir()
    runs.write(folder, runs.Run(own, tuple('0123456789'), (8, 8, 1)))
  for workdir in (tmp_path, tmp_path / 'member_1'):
    ended = call_main('--mode=evaluate', f'--workdir={workdir}')
    assert_one_line(ended, 'holds no checkpoint yet: train first')  # and nothing about its recipe


def test_the_workdir_alone_continues_an_ensemble(tmp_path, monkeypatch):
  config = recipe.read(f'{ROOT}/configs/digits.py')
  config.ensemble.members = 3
  config.ensemble.member = 1
  (tmp_path / 'member_1').mkdir()
  runs.write(tmp_path / 'member_1', runs.Run(config, tuple('0123456789'), (8, 8, 1)))
  begun = []
  monkeypatch.setattr(ensemble, 'train_in', lambda config, workdir: begun.append((config, workdir)))
  assert call_main(f'--workdir={tmp_path}').status == 0
  assert call_main(f'--workdir={tmp_path}/member_1').status == 0
  assert [(c.ensemble.members, c.ensemble.member, w.name) for c, w in begun] == [
    (3, 0, tmp_path.name),
    (1, 1, 'member_1'),
  ]


# Signals, disks, locks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_loop_waits_for_no_thread_and_says_what_is_saved(number, tmp_path):
  # The thread stands for the one in which XLA compiles: an orderly end of Python waits for it.
  code = """
import os, threading, time
import main
def work(argv):
  threading.Thread(target=time.sleep, args=(60,)).start()
  print('not flushed yet')
  os.write(1, b'compiling\\n')
  time.sleep(60)
main.main = work
main.run()
"""
  saved = number == signal.SIGINT
  if saved:
    (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
  command, environment = [sys.executable, '-c', code, f'--workdir={tmp_path}'], {**os.environ, 'PYTHONUNBUFFERED': ''}
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
  with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
    assert process.stdout.readline() == 'compiling\n'
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
  assert process.returncode == 128 + number
  assert out == 'not flushed yet\n'
  assert err == f'interrupted; {f"the checkpoints in {tmp_path} stay" if saved else "nothing was saved yet"}\n'


def test_a_full_disk_is_one_line_that_names_the_workdir(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(loop, 'train', full)
  ended = call_main(DIGITS, f'--workdir={tmp_path}')
  assert (ended.status, ended.err) == (
    2,
    f'error: {tmp_path}: No space left on device: make room there, then give the same command again\n',
  )


def test_a_file_that_cannot_be_written_is_one_line_that_names_it(tmp_path, monkeypatch):
  def refused(*_):
    raise PermissionError(13, 'Permission denied', '/there/summary.json')

  monkeypatch.setattr(loop, 'train', refused)
  ended = call_main(DIGITS, f'--workdir={tmp_path}')
  assert (ended.status, ended.err) == (2, 'error: /there/summary.json: Permission denied\n')


def test_two_trainings_in_one_workdir_are_refused(tmp_path):
  with files.lock(tmp_path):
    ended = call_main(DIGITS, f'--workdir={tmp_path}')
  message = f'error: another run is writing in {tmp_path}: wait for it, or give another --workdir\n'
  assert (ended.status, ended.err) == (2, message)
