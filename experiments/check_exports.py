"""Runs exported networks as their readers do: in a fresh environment that has nothing of this package.

  python -m experiments.check_exports --workdir=runs/digits --workdir=runs/flowers --pictures=flowers/test

Exports each run in each format and precision, and two small runs that it trains itself: an ensemble of two, and one in
bfloat16. For each export it makes a virtual environment with the packages that card.json names and no others, copies
the folder there, checks the sha256 of every file, and runs example.py, which prints the largest difference from our
probabilities. In an environment with torchvision and safetensors it reads .safetensors, and a file of torchvision's
weights goes there and back. Older versions of JAX and ONNX Runtime read the same files. Writes results/exports.md. pip
must find a PyTorch for the CPU, or it installs gigabytes.
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

from experiments import tables
from experiments.worker import ROOT
from googlenet_jax.exporting.artefact import pinned
from googlenet_jax.exporting.formats import FORMATS

EXPORTS = [(to, 'float32') for to in FORMATS] + [('onnx', 'float16'), ('onnx', 'int8')]
OLDER = {
  'stablehlo': ['jax==0.10.0', 'jaxlib==0.10.0', 'flatbuffers', 'numpy'],
  'onnx': ['onnxruntime==1.15.0', 'numpy<2'],
}
WITH_TORCHVISION = ['torchvision==0.28.0', 'safetensors']  # beside what the format `torch` needs
HEAD = ['network', 'export', 'read by', 'largest difference', 'accepted', 'MB']
SMALL = {  # narrow networks, see experiments/narrow.py
  'ensemble': ['--config.ensemble.members=2'],
  'bfloat16': ['--config.dtype=bfloat16'],
}
TORCHVISION = """
import torch
try:
  import torchvision
except RuntimeError:  # beside a PyTorch for the CPU, a wheel for CUDA misses operators that googlenet does not use
  operators = torch.library.Library('torchvision', 'FRAGMENT')
  for name in ('nms', 'qnms'):
    operators.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
  import torchvision
"""
MADE = f"""{TORCHVISION}
torch.manual_seed(0)
network = torchvision.models.googlenet(num_classes=10, aux_logits=False, init_weights=False)
with torch.no_grad():
  for _ in range(20):
    network(torch.rand(8, 3, 64, 64))  # fits the statistics of batch normalisation
  network.fc.weight.mul_(30)  # or all answers would be alike, and would show nothing
torch.save(network.state_dict(), 'made.pth')
"""
BACK = f"""{TORCHVISION}
import json, googlenet, numpy as np
from safetensors.torch import load_file
facts, sample = json.load(open('card.json'))['artefact'], np.load('sample.npz')
prepared = googlenet.prepare(torch.from_numpy(sample['images']), **facts['preparation'])
ours = googlenet.load('.').networks[0]
differences = []
for weights in torch.load('torchvision.pth', weights_only=True), load_file('torchvision.safetensors'):
  network = eval(facts['torchvision']['network'])
  network.load_state_dict(weights)
  with torch.inference_mode():
    found = network.eval()((prepared - ours.mean) / ours.std).softmax(-1).numpy()
  differences.append(abs(found - sample['probabilities']).max())
print(max(differences))
"""
SAFETENSORS = """
import googlenet, numpy as np, torch
sample = np.load('sample.npz')
with torch.inference_mode():
  found = googlenet.load('.', '.safetensors')(torch.from_numpy(sample['images'])).numpy()
print(abs(found - sample['probabilities']).max())
"""


class Check:
  """Exports, the environments that read them, and the rows of the table."""

  def __init__(self, place: pathlib.Path):
    """Works in an empty folder."""
    self.place, self.rows, self.made = place, [], {}

  def export(self, name: str, workdir: pathlib.Path, to: str, precision: str, program: list[str], *paths: str):
    """Exports a run, and reads it as card.json says; returns the copy of the folder."""
    print(f'{name}, {to}, {precision}', flush=True)
    folder = self.place / 'exported' / f'{name}_{to}_{precision}'
    flags = ['--mode=export', f'--to={to}', f'--precision={precision}', f'--workdir={workdir}', f'--output={folder}']
    subprocess.run([sys.executable, *program, *flags, *paths], cwd=ROOT, check=True)
    copy = shutil.copytree(folder, self.place / 'elsewhere' / folder.name)
    needs = json.loads((copy / 'card.json').read_text())['needs']
    self.read(copy, name, label(to, precision), to, needs, ['example.py'])
    return copy

  def read(self, folder: pathlib.Path, name: str, what: str, reader: str, needs: list[str], command: list[str]) -> None:
    """Runs a command in an environment; its last word is the largest difference."""
    size, check = check_files(folder), json.loads((folder / 'card.json').read_text())['check']
    found = float(self.run(reader, needs, folder, command).split()[-1])
    # int8 has no such limit: elsewhere it must do as well as where it was made.
    accepted = check['accepted'] or 1.1 * check['largest_difference_in_sample']
    if not found <= accepted:
      raise SystemExit(f'{name}, {what}, {reader}: {found}')
    self.rows.append([name, what, reader, f'{found:.1e}', f'{accepted:.2g}', f'{size / 1e6:.1f}'])

  def run(self, reader: str, needs: list[str], folder: pathlib.Path, command: list[str]) -> str:
    """Runs Python in an environment, which is made once; returns what it prints."""
    if reader not in self.made:
      self.made[reader] = environment(self.place / 'environments' / reader.replace(' ', '_'), needs)
    python, _ = self.made[reader]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(('PYTHON', 'XLA_', 'JAX_'))}
    missing = 'import importlib.util, sys; sys.exit(importlib.util.find_spec("googlenet_jax") is not None)'
    subprocess.run([python, '-c', missing], cwd=folder, env=plain, check=True)
    ended = subprocess.run([python, *command], cwd=folder, env=plain, stdout=subprocess.PIPE, text=True, check=True)
    print(ended.stdout, end='', flush=True)
    return ended.stdout


def environment(place: pathlib.Path, packages: list[str]) -> tuple[pathlib.Path, str]:
  """Makes an environment with some packages; returns its Python and what pip says is there."""
  subprocess.run([sys.executable, '-m', 'venv', place], check=True)
  python = place / 'bin' / 'python'
  pip = [python, '-m', 'pip', '--quiet']
  subprocess.run([*pip, 'install', '--no-compile', '--only-binary=:all:', *packages], check=True)
  there = subprocess.run([*pip, 'freeze'], capture_output=True, text=True, check=True).stdout
  return python, ', '.join(there.split())


def check_files(folder: pathlib.Path) -> int:
  """Compares every file with the card; returns their bytes."""
  files = json.loads((folder / 'card.json').read_text())['files']
  for name, facts in files.items():
    if hashlib.sha256((folder / name).read_bytes()).hexdigest() != facts['sha256']:
      raise SystemExit(f'{folder / name} is not what card.json says')
  return sum(facts['bytes'] for facts in files.values())


def label(to: str, precision: str) -> str:
  """Returns an export in words; without float32, which a recipe in bfloat16 has not in every format."""
  return to if precision == 'float32' else f'{to} {precision}'


def check_run(check: Check, workdir: pathlib.Path) -> None:
  """Exports a run in every way, and lets others read it."""
  name = workdir.name
  for to, precision in EXPORTS:
    folder = check.export(name, workdir, to, precision, ['main.py'])
    if to in OLDER:
      check.read(folder, name, label(to, precision), f'{to} older', OLDER[to], ['example.py'])
    if to == 'torch':
      needs = [*pinned('torch', 'numpy'), *WITH_TORCHVISION]
      check.read(folder, name, '.safetensors', 'torch with torchvision', needs, ['-c', SAFETENSORS])


def check_small(check: Check) -> None:
  """Trains narrow networks for a few steps, and exports them in each format."""
  program = ['-m', 'experiments.narrow']
  for name, flags in SMALL.items():
    workdir = check.place / name
    training = ['--config=configs/digits.py', f'--workdir={workdir}', '--config.max_steps=40', *flags]
    subprocess.run([sys.executable, *program, *training], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for to in FORMATS:
      check.export(f'small, {name}', workdir, to, 'float32', program)


def check_torchvision(check: Check, pictures: str) -> None:
  """Exports weights that torchvision saved, and lets torchvision read them; there they answer as here."""
  reader, needs = 'torch with torchvision', [*pinned('torch', 'numpy'), *WITH_TORCHVISION]
  check.run(reader, needs, check.place, ['-c', MADE])
  weights = check.place / 'made.pth'
  folder = check.export("torchvision's googlenet", weights, 'torch', 'float32', ['main.py'], pictures)
  check.read(folder, "torchvision's googlenet", 'torchvision.pth, .safetensors', reader, needs, ['-c', BACK])


def main() -> None:
  """Checks all runs and formats, and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', action='append', required=True, help='a run; may be given several times')
  parser.add_argument('--pictures', required=True, help='a folder of pictures in colour, for a file of weights')
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as place:
    check = Check(pathlib.Path(place))
    for workdir in arguments.workdir:
      check_run(check, pathlib.Path(workdir).resolve())
    check_torchvision(check, str(pathlib.Path(arguments.pictures).resolve()))
    check_small(check)
  environments = '\n'.join(f'- {reader}: {packages}' for reader, (_, packages) in check.made.items())
  text = f"""# Exports, run by other programs

For each export: a fresh virtual environment with the packages below and nothing else, a copy of the exported folder,
sha256 of every file compared with card.json, and `python example.py`, which compares the answers to 16 real images with
ours. For `.safetensors` and torchvision a script of the same few lines. The accepted difference
of int8 is 1.1 times the difference where the file was made. On {tables.cpu_model()}.

{tables.table(HEAD, check.rows)}
The whole environments:

{environments}

{tables.written_by('jax', 'flax')}
"""
  tables.publish(text, tables.RESULTS / 'exports.md')


if __name__ == '__main__':
  main()
