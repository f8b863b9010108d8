import importlib.machinery
import runpy
import sys
import types

import pytest

from googlenet_jax.host import program

STARTS = {  # the whole command, sys.argv, is this program's process, may be restarted
  'plain': ('python main.py --a=b', 'main.py --a=b', True, True),
  'with options of Python': ('python -u -X dev -W error main.py', 'main.py', True, True),
  'as a module': ('python -m main --a=b', '/here/main.py --a=b', True, False),
  'as a module of a package': ('python -m experiments.narrow --a=b', '/here/experiments/narrow.py --a=b', True, False),
  'from standard input': ('python -', '-', True, False),
  'as text': ('python -c CODE --a=b', '-c --a=b', True, False),
  'debugger': ('python -m pdb main.py', 'main.py', True, False),
  'coverage': ('python /bin/coverage run main.py', 'main.py', True, False),
  'a notebook that calls it': (
    'python -m ipykernel_launcher -f x.json',
    '/ipykernel_launcher.py -f x.json',
    False,
    False,
  ),
  'notebook': ('python -m ipykernel_launcher -f x.json', 'main.py --a=b', False, False),
  'IPython': ('python -m IPython', 'main.py', False, False),
  'another program': ('python server.py', 'main.py', False, False),
}


@pytest.mark.parametrize('kind', STARTS)
def test_a_program_is_restarted_only_where_nobody_looks_on(kind, tmp_path, monkeypatch):
  whole, own, is_program, can_restart = STARTS[kind]
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'main.py').touch()
  monkeypatch.setattr(sys, 'orig_argv', whole.split())
  monkeypatch.setattr(sys, 'argv', own.split())
  module = types.ModuleType('__main__')
  if kind.startswith('as a module'):
    module.__spec__ = importlib.machinery.ModuleSpec(whole.split()[2], None)
  monkeypatch.setitem(sys.modules, '__main__', module)
  assert (program.is_program(), program.can_restart()) == (is_program, can_restart)
  monkeypatch.setattr(sys, 'gettrace', lambda: print)
  assert not program.can_restart()


def test_closed_streams_are_opened_in_order(monkeypatch):
  opened = []

  def look(descriptor):
    if descriptor in (0, 2):
      raise OSError(9, 'Bad file descriptor')

  own_os = types.SimpleNamespace(fstat=look, open=lambda *how: opened.append(how), devnull='nowhere', O_RDWR=2)
  monkeypatch.setattr(program, 'os', own_os)
  program.open_standard_streams()
  assert opened == [('nowhere', 2)] * 2


def test_a_notebook_can_run_the_file_again():
  for _ in range(2):
    runpy.run_path('main.py', run_name='main')
