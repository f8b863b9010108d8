import fcntl
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import call_main, random_state, small_config, small_digits, small_table, write_run
from PIL import Image

from googlenet_jax import loading, runs
from googlenet_jax.data import crops, datasets
from googlenet_jax.data.splits import Split
from googlenet_jax.exporting import export, place, sample
from googlenet_jax.exporting.artefact import Artefact
from googlenet_jax.host import files
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet, layers, torch_weights, weight_files

# A class is a folder, whose name need not be UTF-8.
CLASSES = ('0', 'a\nb', 'caf\udce9', 'cafй', *'456789')
OWN = ['README.md', 'card.json', 'example.py', 'sample.npz']


@pytest.fixture(scope='module', autouse=True)
def narrow():
  with pytest.MonkeyPatch.context() as patch:
    table = small_table()
    del table['inception_3b']
    patch.setattr(googlenet, 'TABLE', table)
    digits = small_digits()
    patch.setattr(datasets, 'load', lambda **_: digits)  # whatever the names of its classes
    patch.setattr(layers, 'by_platform', lambda own, *arrays, **_: own(*arrays))  # XLA's own forms compile fastest
    yield


@pytest.fixture(scope='module')
def workdir(narrow, tmp_path_factory):
  """A run of the digits that nobody trained."""
  config = small_config(init_from='/home/somebody/runs/before')
  workdir = write_run(tmp_path_factory.mktemp('runs') / 'digits', config, (7, random_state(config), 0.5, True))
  runs.write(workdir, runs.Run(config, CLASSES, (8, 8, 1)))
  return workdir


@pytest.fixture(scope='module')
def loaded(workdir):
  return loading.load(workdir)


def run_example(folder, tmp_path):
  """Runs example.py in another folder and without this package; returns what it prints."""
  (tmp_path / 'nothing' / 'googlenet_jax').mkdir(parents=True)
  (tmp_path / 'nothing' / 'googlenet_jax' / '__init__.py').write_text('raise ImportError("it is not installed")')
  environment = {**os.environ, 'PYTHONPATH': str(tmp_path / 'nothing')}
  command = [sys.executable, '-W', 'error', folder / 'example.py']
  ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
  assert ended.returncode == 0, ended.stderr
  return ended.stdout.splitlines()


@pytest.mark.parametrize('to', ['stablehlo', 'onnx', 'torch'])
def test_another_program_gives_the_same_answers(to, workdir, loaded, tmp_path):
  ended = call_main('--mode=export', f'--to={to}', f'--workdir={workdir}')
  assert (ended.status, ended.err) == (0, '')
  folder = workdir / 'export' / to
  begin, difference, written, advice = ended.out.splitlines()
  assert begin == f'{workdir}, step 7: writing {to} and running it ...'
  assert difference.endswith('over 17 real images (accepted: 0.0001)')
  assert written.startswith(f'written to {folder}: googlenet.')
  assert advice == f'try it: python {folder}/example.py; README.md says how elsewhere'
  card = json.loads((folder / 'card.json').read_text())
  assert sorted(path.name for path in folder.iterdir()) == sorted([*card['files'], 'card.json'])
  for name, facts in card['files'].items():
    data = (folder / name).read_bytes()
    assert facts == {'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()}, name
  with np.load(folder / 'sample.npz') as file:
    stored = dict(file)
  np.testing.assert_allclose(stored['probabilities'], loaded.probabilities(stored['images']), atol=1e-6)
  assert stored['images'].shape == (16, 8, 8, 1)
  first, last = run_example(folder, tmp_path)
  assert first == f'first image: {CLASSES[stored["probabilities"][0].argmax()]!r}'
  assert 0 <= float(last.removeprefix('largest difference: ')) < 1e-5
  assert card['classes'] == list(CLASSES)
  readme = (folder / 'README.md').read_text(encoding='utf-8')
  assert r'`0`, `a\nb`, `caf\udce9`, `cafй`, `4`' in readme
  assert f'Here it was {card["check"]["largest_difference_in_sample"]:.1e}. ' in ' '.join(readme.split())
  described = re.findall('^- `(.*?)`: ', readme.split('## Files')[1], re.MULTILINE)
  assert sorted([*described, 'README.md']) == sorted(path.name for path in folder.iterdir() if path.is_file())
  assert len((folder / 'example.py').read_text().split('\n\n', 2)[2].splitlines()) <= 10


# What does not depend on the format ----------------------------------------------------------------------------------


@pytest.fixture
def simple(monkeypatch, workdir, loaded):
  """A format without any cost: our own classifier runs it. `simple['error']` is added to its answers."""
  changes = {'error': 0.0}

  def write(classifier, folder):
    (folder / 'network.bin').write_bytes(b'network')
    run = lambda images: classifier.probabilities(images) + np.float32(changes['error'])
    return Artefact(
      {'network.bin': 'all of it'}, run, 1e-4, 'print(1)\n', ('numpy==2.0.0',), {'limits': ['It is a test.']}
    )

  load = loading.load
  own = lambda path, step, data: loaded if (path, step, data) == (workdir, None, None) else load(path, step, data=data)
  monkeypatch.setattr(loading, 'load', own)
  monkeypatch.setattr(export, '_writer', lambda _: write)
  pictures = export._pictures
  monkeypatch.setattr(export, '_pictures', lambda *given: changes.setdefault('pictures', pictures(*given)))
  return changes


def fails(match, *arguments, **options):
  with pytest.raises(UserError, match=match) as caught:
    export.export_run(*arguments, **options)
  assert '\n' not in str(caught.value)


def write_pictures(folder, *sizes):
  folder.mkdir(exist_ok=True)
  for i, size in enumerate(sizes):
    pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f'{i:02d}.png')
  return str(folder)


def test_the_card_says_what_the_network_is(workdir, loaded, simple, tmp_path):
  row = {'models': 1, 'crops': 10, 'top1_error': 0.0625, 'top5_error': 0.0}
  found = {'split': 'test', 'step': 7, 'models': 1, 'examples': 360, 'accuracy': 0.9, 'loss': 0.5}
  found |= {'confusion_matrix': np.diag([36] * 10).tolist(), 'table': [row, {'models': 1}]}
  evaluation = workdir / 'evaluation.json'
  files.write_json(evaluation, found)
  with (workdir / 'metrics.jsonl').open('a') as log:  # the weights that were not averaged: they are not exported
    log.write(json.dumps({'step': 7, 'epoch': 1.0, 'split': 'test_raw', 'loss': 0.1, 'accuracy': 0.75}) + '\n')
  export.export_run(workdir, 'torch', output=tmp_path / 'out')
  card = json.loads((tmp_path / 'out' / 'card.json').read_text())
  assert card['accuracy'] == [
    {'of': 'this network', 'split': 'test', 'images': 360, 'crops': 10, 'accuracy': 0.9375},
    {'of': 'this network', 'split': 'validation', 'crops': 1, 'accuracy': 0.5},
  ]
  assert (card['name'], card['data'], card['classes']) == ('digits', 'digits', list(CLASSES))
  assert card['input'] == {'name': 'images', 'type': 'uint8', 'shape': ['N', 'H', 'W', 1]}
  assert card['output'] == {'name': 'probabilities', 'type': 'float32', 'shape': ['N', 10]}
  assert card['recipe']['init_from'] == 'before'  # no place on the machine of whoever trained
  assert card['parameters'] == googlenet.count_parameters(loaded.shape)
  assert card['trained_with']['jax']
  readme = (tmp_path / 'out' / 'README.md').read_text()
  for text in ('| 360 of test | 10 | 93.75 % |', 'the short side resized to 17 pixels', '- It is a test.', 'all of it'):
    assert text in readme
  for other in (found | {'step': 6}, {'step': 7, 'models': 1, 'split': 'test'}):  # of other weights; damaged
    files.write_json(evaluation, other)
    export.export_run(workdir, 'torch', output=tmp_path / 'out')
    card = json.loads((tmp_path / 'out' / 'card.json').read_text())
    assert [one['split'] for one in card['accuracy']] == ['validation']
  evaluation.unlink()


@pytest.mark.parametrize('arguments', [('--mode=export', '--to=torch'), ('--mode=report',)])
def test_the_images_may_have_moved(arguments, workdir, tmp_path, monkeypatch):
  asked = []

  def load(**given):
    asked.append(given['source_dir'])
    raise UserError('nothing is there')

  monkeypatch.setattr(datasets, 'load', load)
  there = f'--config.data.source_dir={tmp_path}'
  ended = call_main(*arguments, f'--workdir={workdir}', f'--output={tmp_path / "out"}', there)
  assert asked == [str(tmp_path)]
  assert (ended.status, len(ended.err.splitlines())) == (2, 1)
  assert 'nothing is there' in ended.err
  assert not (tmp_path / 'out' / 'report.html').exists()
  ended = call_main(*arguments, f'--workdir={workdir}', there, '--config.seed=1')
  assert ended.err == (
    f'error: --config.seed is not for {arguments[0]}: the run knows its recipe, and only --config.data.source_dir and '
    '--config.data.data_dir say where its images are now\n'
  )
  path = tmp_path / 'a.safetensors'
  path.touch()
  with pytest.raises(
    UserError, match=r'safetensors is a file of weights and knows no data: leave config.data.data_dir'
  ):
    loading.load(path, data={'data_dir': 'x'})
  for data, why in (
    ({'source_dir': '/no/such'}, 'there is no such folder'),
    ({'name': 'x'}, 'give source_dir or data_'),
  ):
    with pytest.raises(UserError, match=why):
      loading.load(workdir, data=data)


@pytest.mark.parametrize('error', [2e-4, np.nan])
def test_answers_that_differ_are_refused_and_nothing_is_left(error, workdir, simple, tmp_path):
  simple['error'] = error
  fails('the answers of torch differ from ours by up to', workdir, 'torch', output=tmp_path / 'a' / 'b')
  assert list(tmp_path.iterdir()) == []
  simple['error'] = 0.0
  export.export_run(workdir, 'torch', output=tmp_path / 'a' / 'b')
  before = (tmp_path / 'a' / 'b' / 'card.json').read_bytes()
  simple['error'] = error
  fails('the answers of torch differ', workdir, 'torch', output=tmp_path / 'a' / 'b')
  assert (tmp_path / 'a' / 'b' / 'card.json').read_bytes() == before
  assert os.listdir(tmp_path / 'a') == ['b']


def test_an_export_is_replaced_whole_and_other_folders_are_refused(workdir, simple, tmp_path):
  out = tmp_path / 'out'
  out.mkdir()
  export.export_run(workdir, 'torch', output=out)  # an empty folder
  (out / '__pycache__').mkdir()
  export.export_run(workdir, 'torch', output=out)
  assert sorted(os.listdir(out)) == [*OWN[:3], 'network.bin', 'sample.npz']
  (out / 'mine.txt').touch()
  fails('out holds mine.txt, which is no export', workdir, 'torch', output=out)
  fails('holds checkpoints, .*, which is no export', workdir, 'torch', output=workdir)
  (tmp_path / 'full').mkdir()
  for name in 'abcd':
    (tmp_path / 'full' / name).touch()
  fails('full holds a, b, c and 1 more, which is no export', workdir, 'torch', output=tmp_path / 'full')
  fails('mine.txt is a file', workdir, 'torch', output=out / 'mine.txt')
  fails('mine.txt/under cannot be written', workdir, 'torch', output=out / 'mine.txt' / 'under')
  fails('/proc is a mount point', workdir, 'torch', output=pathlib.Path('/proc'))
  fails('/proc/out cannot be written', workdir, 'torch', output=pathlib.Path('/proc/out'))
  (out / 'mine.txt').unlink()
  (out / 'example.py').write_text('print(2)\n')  # as long as before
  fails('example.py was changed since it was exported', workdir, 'torch', output=out)
  assert (out / 'example.py').read_text() == 'print(2)\n'


def test_a_full_disk_leaves_nothing(workdir, simple, tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(np, 'savez', full)
  fails('No space left on device: make room there', workdir, 'torch', output=tmp_path / 'a' / 'b')
  assert os.listdir(tmp_path) == []


KILLED = """
import os, pathlib, signal, sys
from googlenet_jax.exporting import place

def rename(self, target):
  if self.name.startswith('.export_'):
    os.kill(os.getpid(), signal.SIGKILL)
  os.rename(self, target)

pathlib.Path.rename = rename
with place.filled(pathlib.Path(sys.argv[1])) as folder:
  (folder / 'network.bin').write_bytes(b'half')
  if sys.argv[2] == 'filling':
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize('moment', ['filling', 'replacing'])
def test_a_kill_keeps_the_older_export_and_the_next_one_cleans(moment, workdir, simple, tmp_path, capsys):
  out = tmp_path / 'out'
  export.export_run(workdir, 'torch', output=out)
  before = (out / 'card.json').read_bytes()
  assert subprocess.run([sys.executable, '-c', KILLED, out, moment]).returncode == -9
  assert out.exists() == (moment == 'filling')
  assert len(list(tmp_path.glob('.export_*'))) == (1 if moment == 'filling' else 2)
  place.clean(tmp_path)
  assert os.listdir(tmp_path) == ['out']
  assert (out / 'card.json').read_bytes() == before
  assert ('out is back' in capsys.readouterr().out) == (moment == 'replacing')


def test_only_what_a_killed_export_left_is_removed(tmp_path):
  old = time.time() - 2 * place.LEFT_SECONDS

  def folder(name, locked=None):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'file').touch()
    if locked is not None:
      (tmp_path / name / place.LOCK).write_text(locked)
    os.utime(tmp_path / name, (old, old))

  folder('.export_settings', 'x')
  folder('.export_0123456789ab')  # without a lock it is not ours
  folder('.export_00000000000a', '')  # it was killed before it had the lock
  folder('.export_00000000000b', 'out')
  folder('.export_00000000000c', 'out')
  with (tmp_path / '.export_00000000000c' / place.LOCK).open('rb') as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # another program is writing it
    place.clean(tmp_path)
  assert sorted(os.listdir(tmp_path)) == ['.export_00000000000c', '.export_0123456789ab', '.export_settings']


def test_pictures_of_many_sizes_become_one_batch_and_one_other_image(workdir, simple, tmp_path, capsys):
  folder = write_pictures(tmp_path / 'pictures', *[(20, 30)] * 12, *[(30, 20)] * 8, (9, 40))
  (tmp_path / 'pictures' / 'broken.png').write_bytes(b'no picture')
  export.export_run(workdir, 'torch', output=tmp_path / 'out', paths=[folder])
  assert 'note: ' in capsys.readouterr().err
  shapes = [image.shape for image in simple['pictures'].sample]
  assert shapes == [(13, 20, 1)] * 16 + [(20, 30, 1)]
  assert simple['pictures'].names[0] == '00.png'
  assert simple['pictures'].cut == 'the middle 13x20 pixels of each'
  readme = ' '.join((tmp_path / 'out' / 'README.md').read_text().split())
  assert '`sample.npz` (the middle 13x20 pixels of each)' in readme
  assert simple['pictures'].test is None


def test_images_are_taken_from_the_whole_split():
  images = np.arange(200, dtype=np.uint8).repeat(4).reshape(200, 2, 2, 1)
  found, names, cut = sample.choose(*sample.of_split(Split(images, np.zeros(200, np.int32))))
  assert cut == ''
  assert (names[0], names[15], len(found)) == ('#0', '#199', 17)
  assert found[15].max() == 199
  assert found[16].shape == (2, 1, 1)
  damaged = Split(images, np.zeros(200, np.int32), files=np.array([f'{i}.png' for i in range(200)]), damaged={'0.png'})
  assert sample.of_split(damaged)[1][0] == '3.png'


def test_images_are_about_as_large_as_most():
  rng = np.random.default_rng(0)
  images = [np.zeros((*size, 3), np.uint8) for size in rng.integers([60, 70], [250, 330], (64, 2))]
  found, *_ = sample.choose(images, [''] * 64)
  medians = np.median([image.shape for image in images], axis=0)
  assert (found[0].shape >= 0.6 * medians).all()
  assert (found[0].shape <= medians).all()


def test_mistakes_are_one_line(workdir, simple, tmp_path, monkeypatch):
  few = write_pictures(tmp_path / 'few', *[(9, 9)] * 15)
  fails('checked on 16 real images, and there are 15', workdir, 'torch', paths=[few])
  fails('checked on 16 real images, and there are 0', workdir, 'torch', paths=[str(tmp_path / 'none.png')])
  fails('--to=tensorrt: choose from stablehlo, onnx, torch', workdir, 'tensorrt')
  fails('--precision=int8: .* for --to=onnx', workdir, 'torch', precision='int8')
  fails('is no folder: train first', tmp_path / 'none', 'torch')
  fails('there is no checkpoint of step 8', workdir, 'torch', step=8)

  def gone(**_):
    raise UserError('the data is not here')

  monkeypatch.setattr(datasets, 'load', gone)
  fails('the data is not here; or name at least 16 pictures', workdir, 'torch')


def test_a_file_of_weights_is_exported_with_pictures(loaded, simple, tmp_path, monkeypatch):
  monkeypatch.setattr(crops, 'PAPER_SIZE', 17)  # compiled already
  monkeypatch.setattr(crops, 'PAPER_SCALES', (20,))
  weights = tmp_path / 'mine.safetensors'
  weight_files.write(weights, torch_weights.to_torch(*loaded.networks[0]))
  fails('mine.safetensors is a file of weights', weights, 'torch')
  folder = write_pictures(tmp_path / 'pictures', *[(9, 12)] * 16)
  export.export_run(weights, 'torch', paths=[folder])
  out = tmp_path / 'mine' / 'export' / 'torch'
  card, readme = json.loads((out / 'card.json').read_text()), (out / 'README.md').read_text()
  assert (card['name'], card['accuracy'], card['classes'][3]) == ('mine', [], '3')
  assert card['preparation_is'].startswith('assumed, ')
  assert {'recipe', 'largest_side'} & set(card) == set()  # nobody knows them
  assert 'were first shrunk' not in readme
  assert 'It was not measured for these weights.' in readme


@pytest.mark.parametrize(('to', 'package'), [('torch', 'torch'), ('torch', 'safetensors'), ('onnx', 'onnx')])
def test_a_package_that_is_not_installed_is_named(to, package, workdir, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  fails(rf"needs the package {package}: pip install -e '.\[{to}\]'", workdir, to)
