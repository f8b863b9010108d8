import sys

import numpy as np
import pytest
from PIL import Image

from experiments import sample_folders
from googlenet_jax.data import pictures
from googlenet_jax.host.errors import UserError


def files(folder):
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_training_and_test_pictures_share_no_pixel(tmp_path, monkeypatch):
  columns = Image.fromarray(np.broadcast_to(np.arange(200, dtype=np.uint8), (90, 200)))  # a pixel tells its column
  columns.save(tmp_path / 'columns.png')
  monkeypatch.setattr(sample_folders, 'shipped', lambda *_: tmp_path / 'columns.png')
  counts = {'train': 30, 'test': 10}
  sample_folders.cut(tmp_path / 'set', {'a': ('', ''), 'b': ('', '')}, (20, 100), channels=1, counts=counts)
  for part, count in counts.items():
    for name in ('a', 'b'):
      images = [pictures.read(path, 1) for path in sorted((tmp_path / 'set' / part / name).iterdir())]
      assert len(images) == count
      assert all(20 <= side <= 100 for image in images for side in image.shape[:2])
      assert len({image.shape for image in images}) > 5
      found = np.unique(np.concatenate([image.ravel() for image in images]))
      assert found[0] >= (0 if part == 'train' else 120)
      assert found[-1] < (120 if part == 'train' else 200)


def test_photographs_are_jpeg_and_png_in_colour_and_the_same_each_time(tmp_path):
  flower = {'flower': sample_folders.PHOTOGRAPHS['flower']}
  for name in ('one', 'two'):
    sample_folders.cut(tmp_path / name, flower, (60, 90), counts={'train': 2, 'test': 1})
  found = files(tmp_path / 'one')
  assert sorted(found) == ['test/flower/flower_000.png', 'train/flower/flower_000.png', 'train/flower/flower_001.jpg']
  assert found == files(tmp_path / 'two')
  assert not any(pictures.header(tmp_path / 'one' / name)[2] for name in found)  # in colour


def test_the_digits_are_written_and_what_cannot_be_is_said(tmp_path, monkeypatch, capsys):
  monkeypatch.delenv('FASHION_MNIST_DIR', raising=False)
  monkeypatch.setattr(sys, 'argv', ['sample_folders', str(tmp_path), '--sets', 'digits', 'fashion'])
  with pytest.raises(SystemExit) as ended:
    sample_folders.main()
  assert ended.value.code == 1
  printed = capsys.readouterr()
  assert printed.out == f'digits: 1,797 pictures in {tmp_path / "digits"}\n'
  assert printed.err == 'fashion: left out: set FASHION_MNIST_DIR to the folder with its original .gz files\n'
  assert len(list((tmp_path / 'digits' / '7').iterdir())) == 179
  with pytest.raises(SystemExit):
    sample_folders.main()
  assert f'{tmp_path / "digits"} exists already: remove it, or give another folder' in capsys.readouterr().err


def test_a_missing_package_is_named():
  with pytest.raises(UserError, match='a.png of no_such_package is missing: pip install no_such_package'):
    sample_folders.shipped('no_such_package', 'a.png')
