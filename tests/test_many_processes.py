"""Several processes train and predict as one does: the quick form of experiments/many_processes.py.

Continuous integration runs a longer one, with ensembles, a kill and a signal.
"""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_processes_train_continue_and_predict_as_one(tmp_path):
  environment = {
    **os.environ,
    'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('--xla_force_host_platform_device_count=8', ''),
  }
  command = [sys.executable, '-m', 'experiments.many_processes', '--quick', f'--output={tmp_path}']
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
  found = json.loads((tmp_path / 'processes.json').read_text())
  assert found['wrong'] == []
  assert found['found'] == {'layouts': 1, 'pictures predicted': 176}
