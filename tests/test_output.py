import errno
import os

import pytest

from googlenet_jax.evaluation.output import Output
from googlenet_jax.host import files, processes
from googlenet_jax.host.errors import UserError


def refuse(code):
  def write(path):
    raise OSError(code, os.strerror(code), str(path))

  return write


def test_a_folder_that_cannot_be_written_is_said_once_and_nothing_is_tried(tmp_path, capsys):
  (tmp_path / 'file').touch()
  for _ in range(2):  # --mode=evaluate writes after each number of crops
    output = Output(tmp_path / 'file' / 'folder')
    assert not output.write('a.png', lambda path: pytest.fail('is not called'))
    output.say()
  captured = capsys.readouterr()
  assert captured.out == ''
  text = (
    f'{tmp_path}/file/folder cannot be written (Not a directory), so no files are: --output=DIR names another folder'
  )
  assert captured.err == f'warning: {text}\n'
  with pytest.raises(UserError, match=r'^--output=.*/file/folder cannot be written: Not a directory$'):
    Output(tmp_path / 'file' / 'folder', given=True)


@pytest.mark.parametrize('code', [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_after_a_file_that_cannot_be_written_no_more_is_tried(code, tmp_path, capsys):
  output = Output(tmp_path / 'made', suffix='_train')
  assert output.write('a.csv', lambda path: files.write_text(path, 'text'))
  assert not output.write('b.png', refuse(code))
  assert not output.write('c.png', lambda path: pytest.fail('is not called'))
  output.say()
  captured = capsys.readouterr()
  assert captured.out == ''
  assert captured.err.startswith(
    f'warning: {tmp_path}/made/b_train.png cannot be written ({os.strerror(code)}), so no '
  )
  assert [path.name for path in (tmp_path / 'made').iterdir()] == ['a_train.csv']


def test_a_picture_that_cannot_be_drawn_leaves_the_others(tmp_path, capsys):
  output = Output(tmp_path)
  assert not output.write('a.png', lambda path: 1 / 0)
  assert output.write('b.csv', lambda path: files.write_text(path, 'text'))
  output.say()
  captured = capsys.readouterr()
  assert captured.err == f'warning: {tmp_path}/a.png was not written: division by zero; the work goes on\n'
  assert captured.out == f'written to {tmp_path}: b.csv\n'

  def damaged(path):
    raise UserError('too many damaged pictures')

  with pytest.raises(UserError, match='too many'):
    output.write('c.png', damaged)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(processes, '_index', 1)
  assert not Output(tmp_path / 'a').write('b', lambda path: pytest.fail('is not called'))
  assert not list(tmp_path.iterdir())
