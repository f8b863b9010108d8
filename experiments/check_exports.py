"""Runs exported networks as their readers do: in a fresh environment that has nothing of this package.

  python -m experiments.check_exports --workdir=runs/digits --workdir=runs/flowers

For each run and each format: exports it, makes a virtual environment with the packages that card.json names and no
others, copies the folder elsewhere, checks the sha256 of every file, and runs example.py, which prints the largest
difference from our probabilities. Writes results/exports.md. pip must find a PyTorch for the CPU, or it installs
gigabytes.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from experiments import tables
from experiments.worker import ROOT

FORMATS = ('stablehlo', 'onnx', 'torch')
ACCEPTED = 1e-4
HEAD = ['run', 'format', 'largest difference', 'export, s', 'example.py, s', 'MB']


def export(workdir: pathlib.Path, to: str, folder: pathlib.Path) -> float:
  """Exports a run and returns how many seconds that took."""
  begin = time.perf_counter()
  flags = ['--mode=export', f'--to={to}', f'--workdir={workdir}', f'--output={folder}']
  subprocess.run([sys.executable, 'main.py', *flags], cwd=ROOT, check=True)
  return time.perf_counter() - begin


def environment(place: pathlib.Path, packages: list[str]) -> tuple[pathlib.Path, str]:
  """Makes an environment with some packages; returns its Python and what pip says is there."""
  subprocess.run([sys.executable, '-m', 'venv', place], check=True)
  python = place / 'bin' / 'python'
  pip = [python, '-m', 'pip', '--quiet']
  subprocess.run([*pip, 'install', '--only-binary=:all:', *packages], check=True)
  there = subprocess.run([*pip, 'freeze'], capture_output=True, text=True, check=True).stdout
  return python, ', '.join(there.split())


def run_example(python: pathlib.Path, folder: pathlib.Path) -> tuple[float, float]:
  """Runs example.py; returns the largest difference that it prints, and seconds."""
  plain = {name: value for name, value in os.environ.items() if not name.startswith(('PYTHON', 'XLA_', 'JAX_'))}
  missing = 'import importlib.util, sys; sys.exit(importlib.util.find_spec("googlenet_jax") is not None)'
  subprocess.run([python, '-c', missing], cwd=folder, env=plain, check=True)
  begin = time.perf_counter()
  ended = subprocess.run([python, 'example.py'], cwd=folder, env=plain, stdout=subprocess.PIPE, text=True, check=True)
  print(ended.stdout, end='', flush=True)
  return float(ended.stdout.split()[-1]), time.perf_counter() - begin


def check_files(folder: pathlib.Path) -> int:
  """Compares every file with the card; returns their bytes."""
  files = json.loads((folder / 'card.json').read_text())['files']
  for name, facts in files.items():
    if hashlib.sha256((folder / name).read_bytes()).hexdigest() != facts['sha256']:
      raise SystemExit(f'{folder / name} is not what card.json says')
  return sum(facts['bytes'] for facts in files.values())


def main() -> None:
  """Checks all runs and formats, and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', action='append', required=True, help='a run; may be given several times')
  parser.add_argument('--formats', default=','.join(FORMATS))
  arguments = parser.parse_args()
  rows, made = [], {}
  with tempfile.TemporaryDirectory() as place:
    place = pathlib.Path(place)
    for workdir in arguments.workdir:
      name = pathlib.Path(workdir).name
      for to in arguments.formats.split(','):
        exported = place / 'exported' / f'{name}_{to}'
        seconds = export(pathlib.Path(workdir).resolve(), to, exported)
        needs = json.loads((exported / 'card.json').read_text())['needs']
        if to not in made:
          made[to] = environment(place / f'environment_{to}', needs)
        python, _ = made[to]
        folder = shutil.copytree(exported, place / 'elsewhere' / f'{name}_{to}')
        size = check_files(folder)
        difference, running = run_example(python, folder)
        if not difference <= ACCEPTED:
          raise SystemExit(f'{name}, {to}: {difference}')
        rows.append([name, to, f'{difference:.1e}', f'{seconds:.0f}', f'{running:.0f}', f'{size / 1e6:.1f}'])
  environments = '\n'.join(f'- {to}: {packages}' for to, (_, packages) in made.items())
  text = f"""# Exports, run by other programs

For each run and format: a fresh virtual environment with the packages below and nothing else, a copy of the exported
folder, sha256 of every file compared with card.json, and `python example.py`, which compares the answers to 16 real
images with ours. Seconds are of one run, compiling included, on {tables.cores()} cores of {tables.cpu_model()}.

{tables.table(HEAD, rows)}
The whole environments:

{environments}

{tables.written_by('jax', 'flax')}
"""
  tables.publish(text, tables.RESULTS / 'exports.md')


if __name__ == '__main__':
  main()
