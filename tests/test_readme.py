"""What README.md and docs/ tell the reader to type works."""

import pathlib
import re

import jax
import numpy as np
import pytest
from helpers import least_table, random_state, write_run
from PIL import Image

from googlenet_jax import recipe
from googlenet_jax.model import googlenet, torch_weights, weight_files
from googlenet_jax.training import ensemble

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]


def python_in(page):
  return '\n'.join(re.findall(r'^```python\n(.*?)^```', (ROOT / page).read_text(), re.MULTILINE | re.DOTALL))


@pytest.fixture(scope='module')
def small_state():
  """A network of one block on one device: what the pages call compiles many programs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(googlenet, 'TABLE', least_table())
    devices = jax.devices()[:1]
    for name in ('devices', 'local_devices'):
      patch.setattr(jax, name, lambda: devices)
    config = recipe.read(str(ROOT / 'configs/digits.py'))
    yield config, random_state(config)


def write_what_is_named(code, folder, config, state):
  """Makes the runs and pictures that a page names, with a network that nobody trained."""
  for name in re.findall(r"googlenet_jax\.load\('([^'.]+)'\)", code):
    write_run(folder / name, config, (132, state, None, True))
  pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
  for path in set(re.findall(r"'([^']+\.(?:png|jpg))'", code)) - {'missing.jpg'}:
    Image.fromarray(pixels).save(folder / path)


@pytest.mark.parametrize('page', ['README.md', 'docs/own_pictures.md'])
def test_the_python_for_a_run_runs(page, small_state, tmp_path, monkeypatch, capsys):
  code = python_in(page)
  monkeypatch.chdir(tmp_path)
  write_what_is_named(code, tmp_path, *small_state)
  names = {}
  exec(code, names)
  name, probability = capsys.readouterr().out.split()
  assert name == names['answer'].name
  assert name in 'abcdefghij'
  assert float(probability) == names['answer'].probability
  if 'probabilities' in names:
    assert names['probabilities'].shape == (10,)
    assert names['probabilities'].max() == names['answer'].probability


def test_the_python_for_weights_of_pytorch_writes_them_back(small_state, tmp_path, monkeypatch):
  _, state = small_state
  monkeypatch.chdir(tmp_path)
  tensors = torch_weights.to_torch(state.params, state.batch_stats, 5, 'torchvision')
  weight_files.write('googlenet.pth', tensors)
  exec(python_in('docs/pytorch.md'), {})
  back = weight_files.read('back.safetensors')
  assert back.keys() == tensors.keys()
  for name, array in tensors.items():
    np.testing.assert_array_equal(back[name], array)


def test_the_python_in_the_docs_runs(small_state, tmp_path, monkeypatch, capsys):
  config, state = small_state
  code = python_in('docs/python.md')
  monkeypatch.chdir(tmp_path)
  write_what_is_named(code, tmp_path, config, state)
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  trained = []

  def train_in(config, workdir):  # training itself is tested elsewhere
    trained.append(config.epochs)
    write_run(workdir, config, (1, state, None, True))

  monkeypatch.setattr(ensemble, 'train_in', train_in)
  weight_files.write('googlenet.pth', torch_weights.to_torch(state.params, state.batch_stats))
  names = {}
  exec(code, names)
  printed = capsys.readouterr().out.splitlines()
  assert printed[0].split()[0] == names['answer'].name
  assert 'missing.jpg does not exist: check the path' in printed
  assert "('0', '1', '2')" in printed
  assert names['net'].classes[:2] == ('class 0', 'class 1')
  assert names['heat'].ndim == 2
  assert names['vector'].shape == names['net'].stages['head']
  assert trained == [3]


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(page):
  targets = re.findall(r'\]\(([^)#\s]+)', page.read_text())
  missing = [t for t in targets if not t.startswith('http') and not (page.parent / t).exists()]
  assert missing == []


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.stem)
def test_recipes_keys_and_scripts_exist(page):
  text = page.read_text()
  named = set(re.findall(r'configs/(\w+)\.py', text)) - {'NAME', 'mine', 'my_recipe'}
  assert [name for name in named if not (ROOT / 'configs' / f'{name}.py').exists()] == []
  keys = set(re.findall(r'--config\.([a-z_.]*[a-z_])', text))
  assert [key for key in keys if key not in recipe.KEYS] == []
  scripts = set(re.findall(r'python -m experiments\.(\w+)', text)) - {'NAME'}
  assert [name for name in scripts if not (ROOT / 'experiments' / f'{name}.py').exists()] == []
