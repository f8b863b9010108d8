"""Experiments that train."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from experiment_helpers import table

from experiments import choices, finetune, worker
from googlenet_jax import recipe_checks

SLOW_TO_SAVE = """
import pathlib, signal, sys, time
def save(number, frame):
  time.sleep(0.5)
  pathlib.Path('saved').write_text(str(number))
  sys.exit(128 + number)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
pathlib.Path('begun').touch()
time.sleep(60)
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_experiment_waits_until_main_has_saved(tmp_path, number):
  (tmp_path / 'main.py').write_text(SLOW_TO_SAVE)
  code = f'import pathlib; from experiments import worker; worker.ROOT = pathlib.Path({str(tmp_path)!r}); '
  command = [sys.executable, '-c', code + 'worker.run_or_exit([])']
  process = subprocess.Popen(command, cwd=worker.ROOT, start_new_session=True)
  while not (tmp_path / 'begun').exists() and process.poll() is None:
    time.sleep(0.05)
  time.sleep(0.2)  # its handlers are set just after main.py starts
  if number == signal.SIGINT:
    os.killpg(process.pid, number)  # as a terminal does
  else:
    process.send_signal(number)
  assert process.wait(30) == 128 + number
  assert (tmp_path / 'saved').read_text() == str(int(number))


def test_a_training_is_told_to_save_when_its_time_is_up(tmp_path, monkeypatch):
  (tmp_path / 'main.py').write_text(SLOW_TO_SAVE)
  monkeypatch.setattr(worker, 'ROOT', tmp_path)
  monkeypatch.chdir(tmp_path)
  assert worker.run_main([], seconds=2) == 128 + signal.SIGTERM
  assert (tmp_path / 'saved').exists()


def test_choices_are_means_on_held_out_images(tmp_path, monkeypatch, capsys):
  called = []

  def pretend(arguments):
    called.append(arguments)
    flags = dict(argument[2:].split('=', 1) for argument in arguments)
    workdir = pathlib.Path(flags['workdir'])
    workdir.mkdir(parents=True, exist_ok=True)
    if 'mode' not in flags:
      summary = {'steps': 7, 'seed': int(flags['config.seed']), 'flip': flags.get('config.augment.flip')}
      (workdir / 'summary.json').write_text(json.dumps(summary))
      return
    assert (flags['split'], flags['crops']) == ('validation', '1,10')
    summary = json.loads((workdir / 'summary.json').read_text())
    error = 0.2 + 0.1 * summary['seed'] + 0.05 * (summary['flip'] == 'False')
    found = {'split': 'validation', 'step': 7, 'table': table(1, error, error / 2)}
    (workdir / 'evaluation.json').write_text(json.dumps(found))

  monkeypatch.setattr(choices, 'run_or_exit', pretend)
  monkeypatch.setattr(choices, 'ROOT', tmp_path)
  (tmp_path / 'configs').symlink_to(worker.ROOT / 'configs')
  arguments = ['--epochs=3', '--seeds=2', '--crops=10,1', '--variants=as it is,no mirroring', '--set=dtype=float32']
  monkeypatch.setattr(sys, 'argv', ['choices.py', *arguments, f'--output={tmp_path}'])
  choices.main()
  assert '--config.dtype=float32' in called[0]
  assert '--config.epochs=3' in called[0]
  text = (tmp_path / 'fashion_best_3_epochs.md').read_text()
  assert text.splitlines()[2:] == [
    '| variant | seeds | 1 crop | 10 crops |',
    '| --- | --- | --- | --- |',
    '| as it is | 2 | 0.7500 (0.7000 to 0.8000) | 0.8750 (0.8500 to 0.9000) |',
    '| no mirroring | 2 | 0.7000 (0.6500 to 0.7500) | 0.8500 (0.8250 to 0.8750) |',
  ]
  assert len(called) == 8
  choices.main()
  assert len(called) == 12  # nothing is evaluated again; main.py itself sees that the trainings have ended
  for wrong in ('--crops=7', '--variants=none', '--seeds=0', '--config=nowhere.py', '--config=configs/digits.py'):
    monkeypatch.setattr(sys, 'argv', ['choices.py', wrong])
    with pytest.raises(SystemExit, match='2'):
      choices.parse_arguments()
    assert wrong.partition('=')[0] in capsys.readouterr().err


def test_fine_tuning_takes_ten_digits_of_each_class_and_tests_on_the_same_others():
  first, second = (finetune.few_digits(seed) for seed in (0, 1))
  assert (len(first.train), len(first.validation), len(first.test)) == (100, 400, 1000)
  assert np.bincount(second.train.labels).tolist() == [10] * 10
  np.testing.assert_array_equal(first.test.images, second.test.images)
  assert (first.train.images != second.train.images).any()
  held = {image.tobytes() for split in (first.validation, first.test) for image in split.images}
  assert not held & {image.tobytes() for image in first.train.images}
  for config in (finetune.source_recipe(4), finetune.target_recipe(60, 0.03, 1)):
    recipe_checks.validate(config)
