"""A run that is killed again and again ends as one that nobody disturbed: a short run of experiments/kill_runs.py."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_kills_in_a_save_and_in_the_last_line_of_the_log_lose_nothing(tmp_path):
  environment = {**os.environ, 'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')}
  command = [sys.executable, '-m', 'experiments.kill_runs', '--kills=0', '--rounds=0', f'--output={tmp_path / "out"}']
  done = subprocess.run(
    [*command, f'--folder={tmp_path / "runs"}'], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  found = json.loads((tmp_path / 'out' / 'killed.json').read_text())
  assert found['wrong'] == []
  assert (found['kills'], found['chains'], found['missed']) == (2, 1, 0)
  assert found['fell']['file metrics.jsonl line, partly'] == 1
