"""The program as people start it: a whole run, and what it says to mistakes."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import read_log
from PIL import Image

from googlenet_jax.host import checkpoints

ROOT = pathlib.Path(__file__).parent.parent


def run_main(*arguments, cwd=ROOT, **options):
  return subprocess.run(
    [sys.executable, ROOT / 'main.py', *arguments], cwd=cwd, capture_output=True, text=True, timeout=400, **options
  )


def test_main_trains_the_whole_network_and_writes_everything(tmp_path):
  arguments = ['--config=configs/digits.py', f'--workdir={tmp_path}', '--config.max_steps=3']
  arguments += ['--config.image_size=17', '--config.data.validation_examples=37', '--config.log_every_steps=2']
  # Two devices do as well as eight: they take turns on the machine's cores.
  environment = {**os.environ, 'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=2')}
  done = run_main(*arguments, check=False, env=environment)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.strip().splitlines()
  assert re.fullmatch(r'loss \d\.\d{3}, train acc \d\.\d{3}, test acc \d\.\d{3}', lines[-2])
  assert re.fullmatch(r'\d+\.\d examples/sec on 2 x cpu', lines[-1])

  names = {path.name for path in tmp_path.iterdir()}
  assert names == {
    'config.json', 'metrics.jsonl', 'checkpoints', 'tensorboard', 'curves.png', 'confusion.png', 'mistakes.png',
    'summary.json', 'augmentations.png', '.lock',
  }  # fmt: skip
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['steps'] == 3
  assert summary['parameters'] == 5_984_810
  assert summary['device_count'] == 2
  assert summary['seed'] == 0
  assert summary['jax_version'] == jax.__version__
  for key in ('train_examples_per_second', 'train_seconds', 'compile_seconds', 'test_loss', 'train_loss', 'epochs'):
    assert summary[key] > 0, key
  assert f'{summary["test_accuracy"]:.3f}' == lines[-2][-5:]
  log = read_log(tmp_path)
  assert [(r['step'], r['split']) for r in log] == [(2, 'train'), (3, 'train'), (3, 'validation'), (3, 'test')]
  keys = {'step', 'epoch', 'split', 'loss', 'accuracy', 'learning_rate', 'examples_per_second'}
  assert all(set(record) == keys for record in log)
  assert json.loads((tmp_path / 'config.json').read_text())['max_steps'] == 3
  for name in ('curves.png', 'confusion.png', 'mistakes.png'):
    with Image.open(tmp_path / name) as picture:
      assert min(picture.size) > 200
      assert len(np.unique(np.asarray(picture))) > 10
  assert list((tmp_path / 'tensorboard').glob('events*'))[0].stat().st_size > 300


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], '--config is missing'),
    (['--config=configs/nowhere.py'], "--config: 'configs/nowhere.py' does not exist"),
    (['--config=configs/nowhere.py', '--config.max_steps=3'], "--config: 'configs/nowhere.py' does not exist"),
    (['--config='], '--config cannot be read: Path to config file is an empty string'),
    (['--config=configs'], "--config cannot be read: [Errno 21] Is a directory: 'configs'"),
    (['--config=configs/digits.py', '--config.bach_size=3'], 'batch_size'),
    (['--config=configs/digits.py', '--config.batch_size=many'], 'batch_size=many'),
    (['--config=configs/digits.py', '--crops=1'], '--crops is for --mode=evaluate'),
    (['--config=configs/digits.py', '--config.learning_rate=-1'], 'config.learning_rate=-1.0 is out of range'),
    (['--config=configs/digits.py', '--config.image_size=16'], 'too small for the network'),
    (['--config=configs/digits.py', '--mode=tran'], '<train|evaluate>'),
    (['--config=configs/digits.py', '--config.batch_size=2000'], 'larger than the 1437'),
    (['--config=configs/digits.py', '--config.batch_size=12'], 'batch_size=12 does not divide by 8'),
    (['--config=configs/digits.py', '--mode=evaluate'], 'no checkpoints: train first'),
    (['--config=configs/digits.py', 'extra'], 'unexpected argument extra'),
    (['--config=configs/digits.py', '--workdir=/dev/null/x'], '--workdir=/dev/null/x cannot be made'),
  ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, message, tmp_path):
  if not any(argument.startswith('--workdir') for argument in arguments):
    arguments = [*arguments, f'--workdir={tmp_path}']
  done = run_main(*arguments, check=False)
  assert done.returncode == 2
  assert done.stderr.startswith('error: ')
  assert message in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
  assert 'Traceback' not in done.stdout


DEFAULT = 'from configs import default\ndef get_config():\n  config = default.get_config()\n  '


@pytest.mark.parametrize(
  ('recipe', 'message'),
  [
    ('def get_config(:', 'SyntaxError: invalid syntax (recipe.py, line 1)'),
    ('import no_such_package', "No module named 'no_such_package' ({path}, line 1)"),
    ('x = 1', "has no attribute 'get_config'"),
    (DEFAULT + 'config.bach_size = 3\n  return config', 'unknown key config.bach_size: configs/default.py'),
    (DEFAULT + 'del config.momentum\n  return config', 'lacks key config.momentum: configs/default.py'),
    (DEFAULT + 'config.epochs = "ten"\n  return config', "cannot be casted to type <class 'int'>"),
    (DEFAULT + 'return config.nothing', 'nothing'),
    (DEFAULT, '--config is missing, or its get_config returns None'),
  ],
)
def test_mistakes_in_a_recipe_are_one_line(recipe, message, tmp_path):
  path = tmp_path / 'recipe.py'
  path.write_text(recipe)
  done = run_main(f'--config={path}', f'--workdir={tmp_path}', check=False)
  assert done.returncode == 2
  assert message.format(path=path) in done.stderr.splitlines()[-1]
  assert done.stderr.splitlines()[-1].startswith('error: ')
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_loop_waits_for_no_thread(number):
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
  command, environment = [sys.executable, '-c', code], {**os.environ, 'PYTHONUNBUFFERED': ''}
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
  with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
    assert process.stdout.readline() == 'compiling\n'
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
  assert process.returncode == 128 + number
  assert out == 'not flushed yet\n'
  assert err == 'interrupted; checkpoints already written stay\n'


def test_a_full_disk_is_one_line_that_names_the_workdir(tmp_path):
  code = """
import main
from googlenet_jax.training import loop
def full(config, workdir):
  raise OSError(28, 'No space left on device')
loop.train = full
main.run()
"""
  command = [sys.executable, '-c', code, '--config=configs/digits.py', f'--workdir={tmp_path}']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400)
  assert done.returncode == 2
  assert done.stderr == f'error: No space left on device; the run writes to {tmp_path}\n'


def test_two_trainings_in_one_workdir_are_refused(tmp_path):
  with checkpoints.lock(tmp_path):
    done = run_main('--config=configs/digits.py', f'--workdir={tmp_path}', check=False)
  assert done.returncode == 2
  assert done.stderr == f'error: another run is writing in {tmp_path}: wait for it, or give another --workdir\n'


def test_help_is_readable():
  done = run_main('--help', check=False)
  for text in ('--config', '--workdir', '--mode: <train|evaluate>', 'configs/default.py', 'fashion_fast'):
    assert text in done.stdout
  assert len(done.stdout.splitlines()) < 40
