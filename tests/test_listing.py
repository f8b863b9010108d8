"""Which pictures of a folder are found, and what is remembered of them."""

import os
import unicodedata

import numpy as np
import pytest
from folder_helpers import files_of, make, save

from googlenet_jax.data import folder, headers, listing, pictures
from googlenet_jax.host import cache
from googlenet_jax.host.errors import UserError

pytestmark = pytest.mark.usefixtures('own_cache')


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
