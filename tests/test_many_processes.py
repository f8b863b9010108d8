"""Several processes train as one does, also after one was killed: experiments/many_processes.py, shortly."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_processes_train_die_stop_and_continue_as_one_that_nobody_disturbed(tmp_path):
  environment = {
    **os.environ,
    'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('--xla_force_host_platform_device_count=8', ''),
  }
  command = [sys.executable, '-m', 'experiments.many_processes', '--kills=0', f'--output={tmp_path}']
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
  found = json.loads((tmp_path / 'processes.json').read_text())
  assert found['wrong'] == []
  assert found['found'] == {'SIGTERM to [1]': 1, 'layouts': 3, 'pictures predicted': 176, 'process 0, a step': 1}
  assert found['longest_seconds'] < 60
