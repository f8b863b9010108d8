"""How the pictures of a folder are divided, and how a run keeps its division."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
from folder_helpers import make, save

from googlenet_jax.data import datasets, dividing, folder
from googlenet_jax.data.splits import SPLITS
from googlenet_jax.host.errors import UserError

pytestmark = pytest.mark.usefixtures('own_cache')


# Dividing ------------------------------------------------------------------------------------------------------------

SHARES = {'test': 0.1, 'validation': 0.1}


def divided(counts, shares=SHARES, seed=0, same=()):
  files = [f'{of}/{i}.png' for of, count in counts.items() for i in range(count)]
  digests = [next((bytes([n + 1]) for n, group in enumerate(same) if file in group), b'') for file in files]
  classes = [file.split('/')[0] for file in files]
  found = dividing.divide(files, classes, [''] * len(files), digests, shares, seed)
  return dict(zip(files, found, strict=True))


def counted(found, of='a'):
  own = [split for file, split in found.items() if file.startswith(of)]
  return tuple(own.count(split) for split in SPLITS)


@pytest.mark.parametrize(
  ('count', 'shares', 'expected'),
  [
    (1, SHARES, (1, 0, 0)),
    (2, SHARES, (1, 0, 1)),
    (3, SHARES, (1, 1, 1)),
    (24, SHARES, (20, 2, 2)),
    (25, SHARES, (19, 3, 3)),  # halves are rounded up
    (100, SHARES, (80, 10, 10)),
    (100, {'test': 0.2}, (80, 0, 20)),
    (2, {'validation': 0.1}, (1, 1, 0)),
    (1, {'test': 0.5}, (1, 0, 0)),
    (5, {'test': 0.5, 'validation': 0.49}, (1, 2, 2)),
    (7, {}, (7, 0, 0)),
  ],
)
def test_each_class_gives_its_share_exactly(count, shares, expected):
  assert counted(divided({'a': count, 'b': 17}, shares)) == expected


def test_the_split_depends_on_seed_and_names_only():
  found = divided({'a': 12, 'b': 12})
  assert [file for file, split in found.items() if split != 'train'] == [
    'a/5.png',
    'a/10.png',
    'b/5.png',
    'b/8.png',
  ]  # on every machine
  assert {f: s for f, s in divided({'a': 12, 'c': 40}).items() if f[0] == 'a'} == {
    f: s for f, s in found.items() if f[0] == 'a'
  }
  assert divided({'a': 12, 'b': 12}, seed=1) != found
  names = [unicodedata.normalize(form, f'é/{i}.png') for form in ('NFC', 'NFD') for i in range(30)]
  of = [dividing.divide(part, ['é'] * 30, [''] * 30, [b''] * 30, SHARES, 0) for part in (names[:30], names[30:])]
  assert of[0] == of[1]


def test_equal_files_come_into_one_split_and_of_two_classes_into_training():
  for seed in range(30):
    same = [('a/0.png', 'a/1.png'), ('a/2.png', 'b/2.png'), ('b/4.png', 'b/5.png', 'b/6.png', 'b/7.png')]
    found = divided({'a': 10, 'b': 10}, {'test': 0.3, 'validation': 0.2}, seed, same)
    assert counted(found, 'a') == counted(found, 'b') == (5, 2, 3)
    assert all(len({found[file] for file in group}) == 1 for group in same)
    assert found['a/2.png'] == 'train'


def test_a_class_of_pairs_has_a_pair_in_each_split():
  pairs = [(f'a/{i}.png', f'a/{i + 1}.png') for i in range(0, 10, 2)]
  found = divided({'a': 10}, same=pairs)
  assert counted(found) == (6, 2, 2)
  assert all(found[one] == found[other] for one, other in pairs)
  assert counted(divided({'a': 4}, same=[pairs[0], pairs[1]])) == (2, 0, 2)  # two groups for three splits


def test_pictures_that_are_equal_across_splits_or_classes_are_named(tmp_path, capsys):
  make(tmp_path, {'train/a': 3, 'train/b': 3, 'test/a': 1, 'test/b': 1})
  for i, (one, other) in enumerate([('train/a/0', 'test/a/0'), ('train/a/1', 'train/b/1'), ('train/b/2', 'test/b/0')]):
    for name in (one, other):
      save(tmp_path / f'{name}.png', seed=i)
  folder.load(tmp_path, validation_share=0)
  out = capsys.readouterr().out
  assert 'note: the same picture is in two splits: test/a/0.png and train/a/0.png, and 1 more\n' in out
  assert 'note: the same picture is in two classes: train/a/1.png and train/b/1.png\n' in out


# split.csv -----------------------------------------------------------------------------------------------------------


def test_names_of_every_kind_survive_in_the_file(tmp_path):
  names = [
    'a, b.png',
    '"quoted".png',
    'two\nlines.png',
    'cr\rhere\r\n.png',
    ' space ',
    '花/é.png',
    os.fsdecode(b'\xff\xfe.png'),
  ]
  rows = [(name, 'a,"b"', split) for name, split in zip(names, [*SPLITS, 'skipped'] * 2, strict=False)]
  dividing.write(tmp_path, rows)
  assert dividing.read(tmp_path / 'split.csv') == rows
  assert (tmp_path / 'split.csv').read_bytes().startswith(b'file,class,split\n"a, b.png","a,""b""",train\n')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('', 'is damaged'),
    ('file,class\na,b\n', 'row 1: expected file, class, split'),
    ('file,class,split\na.png,a,train\nb.png,b\n', 'row 3: .*found b.png,b'),
    ('file,class,split\na.png,a,exam\n', 'row 2: .*found a.png,a,exam'),
    ('file,class,split\n"a.png,a,train\n', 'is damaged'),
    ('file,class,split\n', 'lists no pictures'),
  ],
)
def test_a_damaged_file_is_refused(tmp_path, text, message):
  make(tmp_path / 'set', {'a': 3, 'b': 3})
  (tmp_path / 'split.csv').write_text(text)
  with pytest.raises(UserError, match=message):
    folder.load(tmp_path / 'set', split_file=tmp_path / 'split.csv')


def test_a_run_goes_on_with_its_own_splits(tmp_path, capsys):
  root = make(tmp_path / 'set', {'b': 10, 'a': 10})
  before = folder.load(root)
  dividing.write(tmp_path, before.rows())
  root = root.rename(tmp_path / 'moved')
  save(root / 'a' / 'new.png', 50, 50)
  save(root / 'c' / 'new.png')
  capsys.readouterr()
  after = folder.load(root, split_file=tmp_path / 'split.csv', split_seed=5, test_share=0.5)
  assert '2 pictures are not in ' in capsys.readouterr().out
  assert (after.rows(), after.class_names, after.image_shape) == (before.rows(), ('a', 'b'), (8, 8, 3))
  for name in SPLITS:
    one, other = getattr(before, name), getattr(after, name)
    assert all(
      np.array_equal(one.batch(np.s_[:])[key], other.batch(np.s_[:])[key]) for key in ('image', 'label', 'size')
    )
  (root / 'a' / '3.png').unlink()
  (root / 'b' / '4.png').unlink()
  with pytest.raises(UserError, match=r'moved lacks a/3\.png and 1 more, listed in \S+split.csv: put them back'):
    folder.load(root, split_file=tmp_path / 'split.csv')


def test_a_run_keeps_its_canvas_and_channels_whatever_its_files_become(tmp_path):
  root = make(tmp_path / 'set', {'a': 5, 'b': 5}, colour=False)
  (root / 'b' / '9.png').write_text('no picture')
  before = folder.load(root, max_unreadable=0.1)
  dividing.write(tmp_path, before.rows())
  save(root / 'b' / '9.png', 300, 300)  # repaired, but it belongs to no split
  save(root / 'a' / '0.png', 100, 40)
  after = folder.load(root, split_file=tmp_path / 'split.csv', image_shape=before.image_shape)
  assert (after.image_shape, after.rows()) == ((8, 8, 1), before.rows())


def test_an_evaluation_needs_the_files_of_its_split_only(tmp_path):
  root = make(tmp_path / 'set', {f'{split}/{of}': 3 for split in ('train', 'test') for of in 'ab'})
  before = folder.load(root)
  dividing.write(tmp_path, before.rows())
  shutil.rmtree(root / 'train')
  run = {'split_file': tmp_path / 'split.csv', 'class_names': ('a', 'b'), 'image_shape': before.image_shape}
  after = datasets.load('folder', str(root), **run, used=('test',))
  assert after.rows() == before.rows()
  np.testing.assert_array_equal(after.test.images, before.test.images)
  with pytest.raises(UserError, match=r'set lacks train/a/1\.png and 5 more'):
    datasets.load('folder', str(root), **run)
  shutil.rmtree(root / 'test' / 'b')
  with pytest.raises(UserError, match=r'set lacks test/b/0\.png and 2 more'):
    datasets.load('folder', str(root), **run, used=('test',))


def test_other_classes_or_colours_than_those_of_the_run_are_refused(tmp_path):
  make(tmp_path, {'a': 3, 'b': 3, 'c': 3})
  run = {'split_file': tmp_path / 'split.csv', 'class_names': ('a', 'b', 'd'), 'image_shape': (8, 8, 3)}
  with pytest.raises(UserError, match=r'has other classes now \(new: c; gone: d\) than when the run was trained: give'):
    datasets.load('folder', str(tmp_path), **run)
  digits = {'class_names': tuple('0123456789'), 'image_shape': (8, 8, 1)}
  assert len(datasets.load('digits', **digits).test) == 360
  with pytest.raises(UserError, match=r'digits has other colours now \(1 channels, and 3 before\)'):
    datasets.load('digits', **digits | {'image_shape': (8, 8, 3)})


def test_without_the_file_of_a_run_the_folder_is_divided_anew(tmp_path, capsys):
  make(tmp_path, {'a': 5, 'b': 5})
  dataset = datasets.load('folder', str(tmp_path), split_file=tmp_path / 'split.csv')
  assert dataset.rows() == folder.load(tmp_path).rows()
  assert 'split.csv is missing: the splits are the same only if the folder has not changed' in capsys.readouterr().out
