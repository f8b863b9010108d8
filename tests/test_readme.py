"""What README.md and docs/ tell the reader to type works."""

import pathlib
import re

import numpy as np
import pytest
from helpers import random_state, small_table, write_run
from PIL import Image

from googlenet_jax import recipe
from googlenet_jax.model import googlenet

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]


def test_the_python_in_the_readme_runs(tmp_path, monkeypatch, capsys):
  blocks = re.findall(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.MULTILINE | re.DOTALL)
  code = '\n'.join(blocks)
  (folder,) = re.findall(r"googlenet_jax\.load\('([^']+)'\)", code)
  paths = set(re.findall(r"'([^']+\.png)'", code))
  assert paths
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(googlenet, 'TABLE', small_table())
  config = recipe.read(str(ROOT / 'configs/digits.py'))
  write_run(tmp_path / folder, config, (132, random_state(config), None, True))
  pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
  for path in paths:
    Image.fromarray(pixels).save(path)
  names = {}
  exec(code, names)
  name, probability = capsys.readouterr().out.split()
  assert name == names['answer'].name
  assert name in names['classifier'].classes
  assert float(probability) == names['answer'].probability == names['probabilities'].max()
  assert names['probabilities'].shape == (10,)


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
