"""docs/quickstart.ipynb, and training where other programs are at home: in a notebook, in threads, again and again."""

import asyncio
import collections
import gc
import os
import pathlib
import re
import threading

import jax
import matplotlib.pyplot
import nbformat
import pytest
import tqdm
from helpers import make_whole_runs_cheap, small_config
from nbformat.v4 import new_code_cell

import googlenet_jax
from experiments import run_notebook

ROOT = pathlib.Path(__file__).parent.parent
NARROW = """
from experiments.narrow import narrow_network
narrow_network()
"""
SHORTER = {'config.image_size = 48': 'config.image_size = 32', 'config.epochs = 3': 'config.max_steps = 8'}
# Cells after those of the notebook, by name. The kernel gets a real SIGINT in the fourth step.
INTERRUPTED = """
import os, signal
from googlenet_jax.host import progress

advance = progress.Progress.advance

def advance_and_interrupt(self, step):
  advance(self, step)
  if step == 4:
    os.kill(os.getpid(), signal.SIGINT)

progress.Progress.advance = advance_and_interrupt
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
try:
  googlenet_jax.train(config, '../runs/interrupted')
finally:
  print('the same handlers:', before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
"""
CONTINUED = """
import asyncio, jax

progress.Progress.advance = advance
again = await asyncio.to_thread(googlenet_jax.train, config, '../runs/interrupted')
same = jax.tree.map(np.array_equal, again.networks, net.networks)
print('the same bits:', all(jax.tree.leaves(same)), again.steps == net.steps)
"""
MISTAKEN = "googlenet_jax.load('../runs/nothing')"
COMMAND = f'%run {ROOT}/main.py --mode=inspect --config=../configs/digits.py'


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
  """The cells of the notebook with what they show, and then those of this test."""
  notebook = nbformat.read(run_notebook.NOTEBOOK, as_version=4)
  own = notebook.cells
  for old, new in SHORTER.items():
    assert sum(old in cell.source for cell in own) == 1
    for cell in own:
      cell.source = cell.source.replace(old, new)
  raises = {'tags': ['raises-exception']}
  more = [
    new_code_cell(INTERRUPTED, metadata=raises),
    new_code_cell(CONTINUED),
    new_code_cell(MISTAKEN, metadata=raises),
    new_code_cell(COMMAND),
  ]
  notebook.cells = [new_code_cell(NARROW), *own, *more]
  flags = os.environ['XLA_FLAGS'].replace('--xla_force_host_platform_device_count=8', '')
  # ipykernel shows less if it finds this variable.
  environment = {name: value for name, value in os.environ.items() if name != 'PYTEST_CURRENT_TEST'}
  run_notebook.execute(notebook, tmp_path_factory.mktemp('notebook'), {**environment, 'XLA_FLAGS': flags})
  return [cell for cell in own if cell.cell_type == 'code'], more


def shown(cell, name='stdout'):
  """What a cell has printed."""
  return ''.join(o.text for o in cell.outputs if o.output_type == 'stream' and o.name == name)


def pictures(cell):
  return [o for o in cell.outputs if 'image/png' in o.get('data', {})]


def test_the_notebook_runs_and_shows_what_its_text_says(executed):
  cells, _ = executed
  assert [cell.source for cell in cells if shown(cell, 'stderr')] == []  # no warnings
  (training,) = (cell for cell in cells if 'googlenet_jax.train(' in cell.source)
  lines = [o.data['text/plain'] for o in training.outputs if o.output_type == 'display_data']
  (bar,) = (line for line in lines if line.startswith('epoch '))  # one line, with its last text
  assert re.fullmatch(r'epoch 0\.4/1 \|.+\| 8/8, loss [\d.]+, acc [\d.]+, \d+ img/s', bar)
  assert all(re.fullmatch(r'compiling the [a-z ]+: \d+ s', line) for line in lines if line != bar)
  assert ', test acc 0.' in shown(training)
  assert 'step ' not in shown(training)
  for text, count in {'curves.png': 1, 'confusion.png': 1, 'net.predict(': 1, 'net.explain(': 1, 'features': 1}.items():
    (cell,) = (cell for cell in cells if text in cell.source)
    assert len(pictures(cell)) == count, text
  assert any('text/markdown' in o.get('data', {}) for cell in cells for o in cell.outputs)
  assert shown(cells[-1]).endswith('largest difference of the answers: 0.0\n')


def test_an_interrupted_kernel_saves_and_the_same_cell_continues_bit_for_bit(executed):
  interrupted, continued, mistaken, command = executed[1]
  (error,) = (o for o in interrupted.outputs if o.output_type == 'error')
  assert (error.ename, error.traceback) == (
    'Interrupted',
    ['interrupted, after saving: run the same again to continue'],
  )
  assert 'SIGINT: saving after the steps under way; a second interrupt stops at once' in shown(interrupted, 'stderr')
  assert 'stopped at step 4 of 8, saved' in shown(interrupted)
  assert 'continuing after step 4 of 8' in shown(continued)
  assert 'the same handlers: True' in shown(interrupted)
  assert 'the same bits: True True' in shown(continued)
  assert not any('The same command' in shown(cell) for cell in (interrupted, continued))
  (error,) = mistaken.outputs
  assert error.traceback == [
    'error: ../runs/nothing is no folder: train first, or give the --workdir of a run',
  ]
  assert 'GoogLeNet, recipe digits, images of 32x32x1' in shown(command)


def test_the_stored_notebook_is_whole_small_and_of_no_machine():
  text = run_notebook.NOTEBOOK.read_text()
  assert len(text) < run_notebook.MOST_BYTES
  notebook = nbformat.reads(text, as_version=4)
  nbformat.validate(notebook)
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]  # `python -m experiments.run_notebook`
  printed = ''.join(map(shown, cells))
  assert not re.search(r'(?<![.\w])/(work|root|home|tmp|usr)/', printed + str([cell.outputs for cell in cells]))
  assert not re.search(run_notebook.VERSION, printed)
  assert notebook.metadata.language_info == {'name': 'python'}


def of_this_process():
  """What a training must leave as it was, counted."""
  gc.collect()
  files = [os.readlink(path) for path in pathlib.Path('/proc/self/fd').iterdir() if path.is_symlink()]
  return {
    'threads': len(threading.enumerate()),
    # matplotlib keeps fonts open, once for a thread, and 64 of them at most
    'files': collections.Counter(re.sub(r'\d+', 'N', name) for name in files if not name.endswith('.ttf')),
    'children': pathlib.Path(f'/proc/self/task/{os.getpid()}/children').read_text(),
    'arrays': len(jax.live_arrays()),
    'bars': len(getattr(tqdm.tqdm, '_instances', ())),
    'figures': matplotlib.pyplot.get_fignums(),
  }


@pytest.mark.skipif(not pathlib.Path('/proc/self/fd').is_dir(), reason='/proc is for Linux')
def test_a_training_leaves_nothing_in_the_process(tmp_path, monkeypatch):
  make_whole_runs_cheap(monkeypatch)
  config = small_config(batch_size=32, max_steps=2)
  googlenet_jax.train(config, tmp_path / 'first')  # imports, and compiles what later runs share
  before = of_this_process()
  net = googlenet_jax.train(config, tmp_path / 'second')
  del net
  assert of_this_process() == before

  async def in_a_thread():  # while a loop runs, as in a notebook
    await asyncio.to_thread(googlenet_jax.train, config, tmp_path / 'third')

  asyncio.run(in_a_thread())
  assert of_this_process() == before
