"""Runs docs/quickstart.ipynb from top to bottom, as a user does who has just installed the program.

  python -m experiments.run_notebook           # stores what the cells show in the notebook
  python -m experiments.run_notebook --check   # changes nothing; fails where a cell fails

The training starts anew, with an empty cache, in a folder that is removed afterwards. It needs the packages of
`pip install -e '.[test]'`.
"""

import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Mapping

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / 'docs' / 'quickstart.ipynb'
CELL_SECONDS = 600
MOST_BYTES = 1_000_000  # a larger notebook is refused, because it is read in browsers
VERSION = r'\b(googlenet_jax|jax) \d[\w.]*'  # in the first line of a training


def execute(notebook: nbformat.NotebookNode, folder: pathlib.Path, environment: Mapping[str, str]) -> None:
  """Runs all cells in a copy of the repository's folders that the notebook reads.

  Args:
    notebook: its cells get their outputs.
    folder: an empty folder; the run is written there.
    environment: environment of the kernel.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell has failed.
  """
  (folder / 'docs').mkdir()
  (folder / 'configs').symlink_to(ROOT / 'configs')
  path = os.pathsep.join(filter(None, [str(ROOT), environment.get('PYTHONPATH')]))
  client = nbclient.NotebookClient(
    notebook,
    timeout=CELL_SECONDS,
    kernel_name='python3',
    record_timing=False,
    resources={'metadata': {'path': str(folder / 'docs')}},
  )
  client.execute(env={**environment, 'PYTHONPATH': path})


def clean(notebook: nbformat.NotebookNode) -> None:
  """Leaves versions out: they would soon be old ones."""
  notebook.metadata['language_info'] = {'name': 'python'}
  for cell in notebook.cells:
    for output in cell.get('outputs', ()):
      if output.output_type == 'stream':
        output.text = re.sub(VERSION, r'\1', output.text)


def main() -> None:
  """Runs the notebook, and says how long it took."""
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  begin = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    own = pathlib.Path(folder)
    (own / 'cache').mkdir()
    (own / 'work').mkdir()
    execute(notebook, own / 'work', {**os.environ, 'XDG_CACHE_HOME': str(own / 'cache')})
  print(f'{NOTEBOOK.relative_to(ROOT)}: {time.perf_counter() - begin:.0f} s')
  if '--check' in sys.argv[1:]:
    return
  clean(notebook)
  text = nbformat.writes(notebook) + '\n'
  if len(text) > MOST_BYTES:
    raise SystemExit(f'{len(text):,} bytes are too many: make the pictures smaller')
  NOTEBOOK.write_text(text)
  print(f'{len(text):,} bytes')


if __name__ == '__main__':
  main()
