"""Data sets from folders of pictures: what is found, how it is divided, and what happens to bad files."""

import contextlib
import json
import os
import re
import shutil
import unicodedata
import zlib

import numpy as np
import pytest
from helpers import call_main, draw_nothing, read_log, share_programs, small_table, take_devices
from PIL import Image

from googlenet_jax import runs
from googlenet_jax.data import datasets, decoding, dividing, folder, headers, listing, pictures, pipeline, splits
from googlenet_jax.data.splits import SPLITS
from googlenet_jax.evaluation import evaluate
from googlenet_jax.host import cache
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet
from googlenet_jax.training import summary


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def save(path, height=6, width=8, colour=True, seed=None):
  """Writes a picture with pixels of its own."""
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(zlib.crc32(os.fsencode(path)) if seed is None else seed)
  Image.fromarray(rng.integers(0, 256, (height, width, 3) if colour else (height, width), np.uint8)).save(path)
  return path


def make(root, counts, **options):
  """Writes PNG files: `{'rose': 3}` gives rose/0.png to rose/2.png."""
  for name, count in counts.items():
    for i in range(count):
      save(root / name / f'{i}.png', **options)
  return root


def truncate(path):
  """Damages the pixels of a picture and leaves its header."""
  path.write_bytes(path.read_bytes()[:-60])


def files_of(dataset):
  return {name: list(getattr(dataset, name).files) for name in SPLITS if getattr(dataset, name) is not None}


# Finding -------------------------------------------------------------------------------------------------------------


def test_finds_pictures_of_every_ending_at_any_depth_in_sorted_classes(tmp_path):
  names = ['b/1.JPG', 'b/deep/er/2.PnG', 'b/3.webp', 'b/4.tiff', 'a/5.gif', 'É/6.bmp', '花/7.jpeg', 'a b/8 "x",y.png']
  for name in [*names, 'a/.hidden.png', '.git/x/9.png', 'a/.thumbs/10.png', '__MACOSX/a/11.png']:
    save(tmp_path / name)
  for name in ('.DS_Store', 'a/.DS_Store', 'a/Thumbs.db', 'a/notes.txt', 'a/photo.heic'):
    (tmp_path / name).write_text('no picture')
  found = listing.find(tmp_path)
  assert found.files == [
    'a/5.gif',
    'a b/8 "x",y.png',
    'b/1.JPG',
    'b/3.webp',
    'b/4.tiff',
    'b/deep/er/2.PnG',
    'É/6.bmp',
    '花/7.jpeg',
  ]
  assert found.classes == ['a', 'a b', *['b'] * 4, 'É', '花']
  assert found.splits == [''] * 8
  assert found.notes == ['files that are no pictures: 1 .heic, 1 .txt']


def test_an_accent_written_in_two_ways_is_one_class_and_one_split(tmp_path):
  composed, apart = (unicodedata.normalize(form, 'É') for form in ('NFC', 'NFD'))
  make(tmp_path, {f'train/{composed}': 2, 'train/a': 2, f'test/{apart}': 1, 'test/a': 1})
  assert set(listing.find(tmp_path).classes) == {'a', composed}
  save(tmp_path / 'train' / apart / '9.png')
  with pytest.raises(UserError, match='two folders É in two Unicode forms: join them'):
    listing.find(tmp_path)


@pytest.mark.parametrize('name', ['validation', 'val', 'valid', 'VALID'])
def test_folders_may_name_the_splits(tmp_path, name):
  make(tmp_path, {f'{split}/{of}': 2 for split in ('Train', name, 'test') for of in 'ab'})
  dataset = folder.load(tmp_path)
  assert files_of(dataset) == {
    split: [f'{of}/{i}.png' for of in (f'{where}/a', f'{where}/b') for i in range(2)]
    for split, where in (('train', 'Train'), ('validation', name), ('test', 'test'))
  }
  assert dataset.class_names == ('a', 'b')


ERRORS = {
  'missing': ({}, 'no/such', 'there is no such folder; give the folder that holds a folder per class'),
  'a file': ({'a': 1}, 'a/0.png', 'it is a file'),
  'empty': ({}, '', 'no pictures in the form DIR/CLASS/'),
  'no class folders': ({'.': 3}, '', 'no pictures in the form DIR/CLASS/.*, but 3 directly in it: put'),
  'one class': ({'rose': 5}, '', r'has one class, rose, .*: give --config.data.source_dir=\S*/rose if that is'),
  'no train': ({'test/a': 1, 'val/a': 1}, '', 'has test/, val/, but no folder train'),
  'classes beside splits': ({'train/a': 1, 'rose': 1}, '', 'has train/ and also rose/: .* if train is a class, rename'),
  'two names': ({'train/a': 1, 'val/a': 1, 'valid/a': 1}, '', 'two names of one split: join them'),
  'splits below classes': ({'a/train': 1, 'a/test': 1, 'b/train': 1}, '', 'splits belong above the classes, .*train/a'),
  'one too high': ({'all/train/a': 1, 'all/train/b': 1}, '', r'give --config.data.source_dir=\S*all$'),
  'train lacks a class': ({'train/a': 3, 'train/c': 2, 'test/a': 1, 'test/b': 1}, '', 'no picture to train on in b'),
  'no test': ({'a': 1, 'b': 1}, '', 'no pictures for the test: a class needs two or more that are not equal'),
}  # fmt: skip


@pytest.mark.parametrize(('counts', 'where', 'text'), ERRORS.values(), ids=ERRORS)
def test_a_folder_of_another_form_is_refused_in_one_line(tmp_path, counts, where, text):
  make(tmp_path, counts)
  with pytest.raises(UserError, match=text) as error:
    folder.load(tmp_path / where)
  assert '\n' not in str(error.value)


NOTES = {
  'empty class': ({'a': 3, 'b': 3, 'c': 0}, '', 'c has no pictures: it is no class'),
  'directly': ({'a': 3, 'b': 3, '.': 2}, '', ' (2) belong to no class: they are left out'),
  'directly in a split': ({'train/a': 3, 'train/b': 3, 'train': 1}, '', '/train (1) belong to no class'),
  'valid is a class': ({'valid': 3, 'invalid': 3}, '', 'valid/ is a class, because there is no folder train'),
  'one split': ({'train/a': 3, 'train/b': 3, 'test/a': 1, 'test/b': 1}, 'train', 'looks like one split of '),
  'split from train': ({'train/a': 9, 'train/b': 9}, '', '10% for test and 10% for validation are taken'),
  'validation from train': ({'train/a': 9, 'train/b': 9, 'test/a': 1}, '', 'no folder for validation: 10% for'),
  'flat test': ({'train/a': 9, 'train/b': 9, 'Test': 3}, '', 'there are no classes below Test/: 10%'),
  'few': ({'a': 2, 'b': 9}, '', 'no validation pictures of a: validation accuracy'),
  'no test pictures of a class': ({'train/a': 9, 'train/b': 9, 'test/a': 1}, '', 'no test pictures of b: test'),
  'unequal': ({'a': 41, 'b': 3}, '', 'a has 33 times as many training pictures as b: --config.class_weights=balanced'),
}  # fmt: skip


@pytest.mark.parametrize(('counts', 'where', 'text'), NOTES.values(), ids=NOTES)
def test_what_a_person_should_know_becomes_a_note(tmp_path, counts, where, text, capsys):
  make(tmp_path, counts)
  for name in counts:
    (tmp_path / name).mkdir(exist_ok=True)
  folder.load(tmp_path / where)
  notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith('note: ')]
  assert sum(text in note for note in notes) == 1, notes


def test_links_are_followed_and_loops_end(tmp_path):
  root = make(tmp_path / 'set', {'a': 2, 'b': 2})
  make(tmp_path / 'elsewhere', {'c': 2, 'd/deep': 1})
  (root / 'c').symlink_to(tmp_path / 'elsewhere' / 'c')
  (root / 'a' / 'more').symlink_to(tmp_path / 'elsewhere' / 'd')
  (root / 'a' / 'file.png').symlink_to(tmp_path / 'elsewhere' / 'c' / '0.png')
  (root / 'a' / 'loop').symlink_to(root)
  (root / 'b' / 'self').symlink_to(root / 'b')
  (root / 'b' / 'gone.png').symlink_to(tmp_path / 'nowhere.png')
  (root / 'b' / 'round.png').symlink_to(root / 'b' / 'round.png')
  found = listing.find(root)
  assert found.files == [
    'a/0.png', 'a/1.png', 'a/file.png', 'a/more/deep/0.png', 'b/0.png', 'b/1.png', 'b/gone.png',
    'b/round.png', 'c/0.png', 'c/1.png',
  ]  # fmt: skip
  assert len(found.notes) == 2
  assert all('is a link to a folder that is read already' in note for note in found.notes)
  looked = headers.look(root, found.files)
  assert sorted(looked.reasons) == [6, 7]
  assert 'gone.png is a link to nothing' in looked.reasons[6]
  assert (looked.sides == [8, 8, 8, 8, 8, 8, 0, 0, 8, 8]).all()


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
  make(tmp_path, {'a': 2, 'b': 2, 'a/locked': 3})
  scandir = os.scandir

  def refuse(path):
    if str(path).endswith('locked'):
      raise PermissionError(13, 'Permission denied', path)
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', refuse)
  found = listing.find(tmp_path)
  assert found.files == ['a/0.png', 'a/1.png', 'b/0.png', 'b/1.png']
  assert found.notes == [f'{tmp_path}/a/locked cannot be opened (Permission denied): its pictures are left out']


def test_what_was_found_out_is_kept_until_a_file_changes(tmp_path, monkeypatch):
  root = make(tmp_path / 'set', {'a': 3, 'b': 3})
  (root / 'b' / '3.png').write_text('damaged')
  read, header = [], pictures.header
  monkeypatch.setattr(pictures, 'header', lambda path: read.append(os.path.basename(path)) or header(path))
  found = listing.find(root).files
  first = headers.look(root, found)
  assert sorted(read) == ['0.png'] * 2 + ['1.png'] * 2 + ['2.png'] * 2 + ['3.png']
  read.clear()
  save(root / 'a' / '1.png', 30, 20, seed=1)
  again = headers.look(root, found)
  assert read == ['1.png', '3.png']  # the changed one, and the damaged one, which may have been repaired
  assert again.sides.tolist() == [8, 30, 8, 8, 8, 8, 0]
  assert [again.digests[i] for i in (0, 2, 3, 4, 5)] == [first.digests[i] for i in (0, 2, 3, 4, 5)]
  kept = next((tmp_path / 'cache').glob('*/folder_*.npz'))
  for damaged in (kept.read_bytes()[:-300], b'', b'PK'):
    kept.write_bytes(damaged)
    read.clear()
    assert headers.look(root, found).sides.tolist() == again.sides.tolist()
    assert len(read) == 7
  whole = cache.read_file(kept.stem)
  for other in ({'files': np.zeros(1, np.uint8)}, whole | {'sides': whole['sides'][1:]}):  # of another version
    cache.write_file(kept.stem, other)
    assert headers.look(root, found).sides.tolist() == again.sides.tolist()


def test_a_folder_in_which_nothing_can_be_read_is_refused_again_until_it_is_repaired(tmp_path):
  root = tmp_path / 'set'
  for name in ('a/0.png', 'a/1.png', 'b/0.png', 'b/1.png'):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text('no picture')
  for _ in range(2):
    with pytest.raises(UserError, match='^4 of 4 pictures in .* cannot be read'):
      folder.load(root)
  assert len(folder.load(make(root, {'a': 2, 'b': 2})).rows()) == 4


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


# Decoding ------------------------------------------------------------------------------------------------------------


def test_channels_follow_the_pictures(tmp_path):
  make(tmp_path, {'a': 4, 'b': 4}, colour=False)
  assert folder.load(tmp_path).image_shape == (8, 8, 1)
  assert folder.load(tmp_path, channels=3).image_shape == (8, 8, 3)
  save(tmp_path / 'b' / 'one.png', 6, 30)
  assert folder.load(tmp_path).image_shape == (30, 30, 3)
  assert folder.load(tmp_path, channels=1, canvas=20).image_shape == (20, 20, 1)


def test_in_memory_and_on_disk_are_the_same_and_are_what_prediction_reads(tmp_path):
  sizes = [(3, 40), (1, 1), (40, 3), (9, 9), (64, 50), (8, 8), (5, 90)]
  for i, (height, width) in enumerate(sizes * 3):
    save(tmp_path / 'ab'[i % 2] / f'{i}.{("png", "jpg")[i % 3 == 0]}', height, width)
  memory, disk = (folder.load(tmp_path, canvas=32, memory_mb=mb) for mb in (100, 0))
  assert memory.rows() == disk.rows()
  assert memory.train.in_memory
  assert not disk.train.in_memory
  for name in SPLITS:
    kept, read = getattr(memory, name), getattr(disk, name)
    indices = np.arange(len(kept))[::-1]
    for key, value in kept.batch(indices).items():
      np.testing.assert_array_equal(value, read.batch(indices)[key])
    for i, file in enumerate(kept.files):
      (canvas,), ((height, width),) = splits.on_canvas([pictures.read(tmp_path / file, 3, 32)], 32)
      np.testing.assert_array_equal(read.picture(i), canvas[:height, :width])
    few = read.take(np.array([1, 0]))
    np.testing.assert_array_equal(few.batch(np.array([1]))['image'], read.batch(np.array([0]))['image'])
    assert few.files.tolist() == [read.files[1], read.files[0]]


def test_an_evaluation_decodes_only_its_split(tmp_path, capsys):
  make(tmp_path, {'a': 20, 'b': 20})
  found = folder.load(tmp_path, used=('test',), memory_mb=1)
  assert found.test.in_memory
  assert not found.train.in_memory
  assert 'decoding 4 pictures' in capsys.readouterr().out
  np.testing.assert_array_equal(found.test.images, folder.load(tmp_path).test.images)


def test_training_batches_are_the_same_from_any_step(tmp_path, mesh_of):
  make(tmp_path, {'a': 20, 'b': 20})
  memory, disk = (folder.load(tmp_path, memory_mb=mb).train for mb in (100, 0))
  from_start = pipeline.train_batches(memory, 8, 3, 0, mesh_of(1))
  later = pipeline.train_batches(disk, 8, 3, 2, mesh_of(1))
  for batch in [next(from_start) for _ in range(6)][2:]:
    other = next(later)
    for key in ('image', 'label', 'size', 'index'):
      np.testing.assert_array_equal(batch[key], other[key])


def test_unreadable_files_are_named_and_skipped_up_to_a_share(tmp_path, capsys):
  root = make(tmp_path, {'a': 10, 'b': 9})
  (root / 'b' / 'text.png').write_text('no picture')
  with pytest.raises(
    UserError, match=r'^1 of 20 pictures in \S+ cannot be read, and config.data.max_unreadable=0.01 allows 0: '
  ):
    folder.load(root)
  dataset = folder.load(root, max_unreadable=0.05)
  out = capsys.readouterr().out
  assert f'unreadable: {root}/b/text.png is not a picture that can be read' in out
  assert (
    '2 classes, 19 pictures (9 to 10 a class, smallest b); 15 to train on, 2 validation, 2 test; 1 skipped; ' in out
  )
  assert dataset.rows()[-1] == ('b/text.png', 'b', 'skipped')
  assert len(dataset.rows()) == 20


def damaged_set(tmp_path):
  """A folder in which the pixels of a training and of a test picture are damaged, and its splits."""
  root = make(tmp_path / 'set', {'a': 20, 'b': 20}, height=30)
  healthy = folder.load(root)
  for split, index in (('train', 3), ('test', 1)):
    truncate(root / getattr(healthy, split).files[index])
  return root, healthy


def test_damaged_pixels_are_found_before_training_in_memory(tmp_path):
  root, healthy = damaged_set(tmp_path)
  with pytest.raises(UserError, match='2 of 40 pictures'):
    folder.load(root, max_unreadable=0.04)
  found = folder.load(root, max_unreadable=0.05)
  lost = (healthy.train.files[3], healthy.test.files[1])
  assert {file for file, _ in found.skipped} == set(lost)
  kept = [row for row in healthy.rows() if row[0] not in lost]  # nothing else changes its place
  assert found.rows()[:-2] == kept
  dividing.write(tmp_path, found.rows())
  for mb in (100, 0):  # a run that goes on leaves them out too
    assert (
      folder.load(root, max_unreadable=0.05, memory_mb=mb, split_file=tmp_path / 'split.csv').rows() == found.rows()
    )


@pytest.mark.parametrize('memory_mb', [0, 100])
def test_damaged_pixels_change_nothing_else_while_training(tmp_path, capsys, memory_mb):
  """In training the next picture of the class stands in; in a test the place is black, so nothing counts twice."""
  root, healthy = damaged_set(tmp_path)
  dividing.write(tmp_path, healthy.rows())
  found = folder.load(root, max_unreadable=0.05, memory_mb=memory_mb, split_file=tmp_path / 'split.csv')
  assert found.rows() == healthy.rows()
  for _ in range(2):
    for name, place in (('train', 3), ('test', 1)):
      expected = {key: value.copy() for key, value in getattr(healthy, name).batch(np.s_[:]).items()}
      for key in ('image', 'size'):
        expected[key][place] = expected[key][4] if name == 'train' else {'image': 0, 'size': 30}[key]
      batch = getattr(found, name).batch(np.arange(len(expected['label'])))
      for key, value in expected.items():
        np.testing.assert_array_equal(batch[key], value)
  out = capsys.readouterr().out
  assert out.count(f'unreadable: {root}/{healthy.train.files[3]} is damaged') == 1
  assert out.count(f'unreadable: {root}/{healthy.test.files[1]} is damaged') == 1
  assert evaluate.damage({'validation': found.validation, 'test': found.test}) == (
    'note: 1 of 4 test pictures cannot be read: each counts as a black picture'
  )
  assert evaluate.damage({'train': found.train}) == (
    'note: 1 of 32 train pictures cannot be read: each counts as another picture of its class'
  )
  assert evaluate.damage({'validation': None, 'test': healthy.test}) == ''
  assert (found.test.take(np.array([0, 1])).count_damaged(), found.test.take(np.array([0])).count_damaged()) == (1, 0)
  (root / healthy.train.files[3]).write_bytes(b'')  # damaged in its header too: it still counts once
  found = folder.load(root, max_unreadable=0.05, memory_mb=memory_mb, split_file=tmp_path / 'split.csv')
  assert found.rows() == healthy.rows()
  np.testing.assert_array_equal(found.train.picture(3), healthy.train.picture(4))
  found.test.batch(np.arange(len(found.test)))
  truncate(root / healthy.train.files[7])
  if memory_mb == 0:
    with pytest.raises(UserError, match='3 of 40 pictures'):
      found.train.batch(np.array([7]))


@pytest.mark.parametrize(('most', 'bad', 'allowed'), [(0.29, 29, True), (0.29, 30, False), (0.0, 1, False)])
def test_the_share_of_unreadable_files_is_exact(tmp_path, most, bad, allowed):
  reasons = {f'{i}.png': f'{i}.png is damaged' for i in range(bad)}
  with (
    contextlib.nullcontext() if allowed else pytest.raises(UserError, match=f'{bad} of 100 .* allows {bad - 1}: 0.png')
  ):
    decoding.Damage(tmp_path, 100, most, reasons)


def test_the_stand_in_is_the_next_picture_of_the_class_that_can_be_read(tmp_path):
  root = make(tmp_path, {'a': 4, 'b': 2})
  files = np.array(['a/0.png', 'b/0.png', 'a/1.png', 'b/1.png', 'a/2.png', 'a/3.png'], object)
  damage = decoding.Damage(root, 6, 1.0, {})
  images = decoding.FolderImages(root, files, 8, 3, damage, np.array([0, 1, 0, 1, 0, 0]))
  whole = images[np.arange(6)]
  for name in ('a/1', 'a/3', 'a/0', 'b/1'):
    truncate(root / f'{name}.png')
  np.testing.assert_array_equal(images[np.arange(6)], whole[[4, 1, 4, 1, 4, 4]])
  truncate(root / 'b/0.png')
  with pytest.raises(UserError, match=r'no picture of the class of b/1\.png can be read'):
    images[np.array([3])]


def test_a_class_whose_training_pictures_are_all_damaged_is_refused(tmp_path):
  root = make(tmp_path, {'a': 10, 'b': 3}, height=30)
  (file,) = (f for f in folder.load(root).train.files if f.startswith('b'))
  truncate(root / file)
  with pytest.raises(UserError, match='no picture to train on in b can be read'):
    folder.load(root, max_unreadable=0.5)


def test_splits_whose_pictures_are_all_damaged(tmp_path, capsys):
  root = make(tmp_path, {'a': 5, 'b': 5}, height=30)
  healthy = folder.load(root)
  for file in healthy.validation.files:
    truncate(root / file)
  assert folder.load(root, max_unreadable=1).validation is None
  assert '8 pictures (4 a class); 6 to train on, 0 validation, 2 test; 2 skipped; ' in capsys.readouterr().out
  for file in healthy.test.files:
    truncate(root / file)
  with pytest.raises(UserError, match='no test picture can be read: add some'):
    folder.load(root, max_unreadable=1)


def test_evaluation_of_a_streamed_folder_sees_every_picture_once(tmp_path, mesh_of):
  make(tmp_path, {'a': 30, 'b': 25})
  test = folder.load(tmp_path, memory_mb=0, test_share=0.3).test
  batches = list(pipeline.eval_batches(test, 8, mesh_of(2)))
  images = np.concatenate([batch['image'] for batch in batches])[: len(test)]
  np.testing.assert_array_equal(images, test.images[np.arange(len(test))])


# A whole run ---------------------------------------------------------------------------------------------------------


def test_an_ensemble_is_trained_continued_and_evaluated_from_its_folder_of_pictures(tmp_path, monkeypatch):
  monkeypatch.setattr(googlenet, 'TABLE', {'inception_4a': small_table()['inception_4a']})
  take_devices(monkeypatch, 2)
  share_programs(monkeypatch)
  draw_nothing(monkeypatch)
  monkeypatch.setattr(summary, 'estimate', lambda *_: 0.0)
  root = make(tmp_path / 'set', {'a': 24, 'b': 16}, colour=False)
  (root / 'b' / 'text.png').write_text('no picture')
  (tmp_path / 'mine.py').write_text(
    'from configs import default\n'
    'def get_config():\n'
    '  config = default.get_config()\n'
    '  config.data.name, config.data.max_unreadable, config.data.memory_mb = "folder", 0.1, 0\n'
    '  config.image_size, config.batch_size, config.log_every_steps, config.max_steps = 17, 8, 2, 2\n'
    '  config.class_weights = "balanced"\n'
    '  return config\n'
  )
  monkeypatch.chdir(tmp_path)
  run = tmp_path / 'run'
  train = ['--config=mine.py', '--config.data.source_dir=set', '--workdir=run', '--config.ensemble.members=2']
  ended = call_main(*train)
  assert (ended.status, ended.err) == (0, '')
  assert (
    'set: 2 classes, 40 pictures (16 to 24 a class, smallest b); 32 to train on, 4 validation, 4 test; ' in ended.out
  )
  assert re.search(r'step 2/2 epoch 0.50/1: .* examples/s \(decoding up to \d+/s\)', ended.out)
  assert re.search(r'epoch 0.5: .*; decoding (keeps up|is the bottleneck) \(at most \d+ images/s\)', ended.out)
  written = [(tmp_path / 'run' / f'member_{i}' / 'split.csv').read_text() for i in (0, 1)]
  assert written[0] == written[1]
  assert written[0].endswith('b/text.png,b,skipped\n')
  assert runs.read(tmp_path / 'run' / 'member_1').config.data.source_dir == str(root)
  assert read_log(tmp_path / 'run' / 'member_0')[0]['decoded_per_second'] > 0

  for name in ('new.png', '3.png'):  # in colour: the one may not be seen, the other becomes grey
    save(root / 'a' / name, 30, 20)
  truncate(root / next(file for file, _, split in dividing.read(run / 'member_0' / 'split.csv') if split == 'test'))
  note = 'note: 1 of 4 test pictures cannot be read: each counts as a black picture\n'
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  monkeypatch.chdir(elsewhere)
  ended = call_main('--mode=evaluate', f'--workdir={run}', '--crops=1')
  assert (ended.status, ended.err, ended.out.count(note)) == (0, '', 1)
  assert json.loads((run / 'evaluation.json').read_text())['examples'] == 4
  ended = call_main(f'--workdir={run}/member_0', '--config.max_steps=4')
  assert (ended.status, ended.err, ended.out.count(note)) == (0, '', 1)
  assert 'continuing after step 2 of 4' in ended.out
  assert (run / 'member_0' / 'split.csv').read_text() == written[0]
  (root / 'a' / '1.png').unlink()
  go_on = [f'--workdir={run}/member_1', '--config.max_steps=4']
  ended = call_main(*go_on)
  assert ended.status == 2
  assert ended.err.startswith(f'error: {root} lacks a/1.png, listed in {run}/member_1/split.csv: put them back')
  assert len(ended.err.splitlines()) == 1
  (run / 'member_1' / 'split.csv').unlink()
  make(root, {'c': 3})
  ended = call_main(*go_on)
  assert ended.status == 2
  assert 'set has other classes now (new: c; gone: none) than when the run was trained' in ended.err
