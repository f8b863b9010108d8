import csv
import io
import os
import shutil
import sys

import numpy as np
import pytest
from helpers import call_main, least_table, random_state, small_config, take_devices, write_run
from PIL import Image

import googlenet_jax
from googlenet_jax import classifier as classifier_lib
from googlenet_jax.data import listing, splits
from googlenet_jax.data.splits import Split
from googlenet_jax.evaluation import evaluate, predict, sources
from googlenet_jax.evaluation.output import Output
from googlenet_jax.evaluation.sources import Found, Picture
from googlenet_jax.host import processes
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet

CLASSES = tuple('abcdefghij')
ODD_NAMES = ('with space.png', 'quo"te\',.png', 'new\nline.png', '日本.PNG', os.fsdecode(b'no \xff text.png'))


@pytest.fixture(autouse=True, scope='module')
def small_network():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(googlenet, 'TABLE', least_table())
    take_devices(patch, 2)
    yield


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  config = small_config(**{'augment.resize': 1.2, 'augment.padding': 1, 'data.canvas': 64})
  return write_run(tmp_path_factory.mktemp('runs') / 'run', config, (7, random_state(config), None, True))


@pytest.fixture(scope='module')
def classifier(workdir):
  return googlenet_jax.load(workdir)


def write(path, seed=0, size=(9, 12)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, np.uint8)).save(path, 'PNG')
  return path


def predicted(workdir, *arguments, status=0):
  ended = call_main('--mode=predict', f'--workdir={workdir}', *arguments)
  assert ended.status == status, ended.err
  return ended


def rows_of(folder):
  text = (folder / 'predictions.csv').read_bytes().decode('utf-8', 'surrogateescape')
  return [*csv.DictReader(io.StringIO(text, newline=''))]


# Finding pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('files', 'arguments', 'expected'),
  [
    (['b/2.png', 'b/10.png', 'a/x.JPG'], ['.'], [('a/x.JPG', 'a'), ('b/10.png', 'b'), ('b/2.png', 'b')]),
    (['a/deep/down/1.png'], ['.'], [('a/deep/down/1.png', 'a')]),
    (['test/a/1.png', 'val/b/1.png'], ['.'], [('test/a/1.png', 'a'), ('val/b/1.png', 'b')]),
    (['a/1.png', 'a/deep/2.png'], ['a'], [('a/1.png', 'a'), ('a/deep/2.png', 'a')]),
    (['new/1.png'], ['new'], [('new/1.png', '')]),
    (['other/a/1.png'], ['.'], [('other/a/1.png', '')]),
    (['.hidden/a/1.png', 'a/.x.png', 'a/notes.txt', 'a/1.png'], ['.'], [('a/1.png', 'a')]),
    (['b/2.png', 'a/1.png'], ['b/2.png', 'a/1.png'], [('b/2.png', ''), ('a/1.png', '')]),
    (['a/1.png', 'a/2.png', 'a/x.txt'], ['a/*'], [('a/1.png', ''), ('a/2.png', '')]),
    (['a/1.png', 'b/c/2.png'], ['**/*.png'], [('a/1.png', ''), ('b/c/2.png', '')]),
    (['a[1].png'], ['a[1].png'], [('a[1].png', '')]),  # a file with such a name is no pattern
    (['c'], ['c'], [('c', '')]),  # a file that is named is read whatever its ending
  ],
)
def test_files_folders_and_patterns_are_found_in_order(files, arguments, expected, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  for name in files:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  found = sources.find(arguments, CLASSES)
  assert [(os.path.normpath(one.name), one.true_class) for one in found] == expected


@pytest.mark.parametrize(
  ('listed', 'names'),
  [
    (b'a b.png\n"c".png\r\n\n', ['a b.png', '"c".png']),
    (b'a\nb.png\0c.png\0', ['a\nb.png', 'c.png']),
    (b'\xff.png', [os.fsdecode(b'\xff.png')]),
  ],
)
def test_a_list_on_standard_input(listed, names, monkeypatch):
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(listed)))
  assert [one.name for one in sources.find(['first.png', '-'], CLASSES)] == ['first.png', *names]


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'notes.txt').touch()
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'\n')))
  for arguments, message in (
    (['empty'], r'empty has no pictures \(.jpg, '),
    (['*.png', 'empty'], r'\*.png fits no file \(and 1 more like it\)'),
    (['not*.txt'], r'not\*.txt fits only what is no picture'),
    (['-'], 'no pictures are named'),
  ):
    with pytest.raises(UserError, match=message):
      sources.find(arguments, CLASSES)
  assert [one.error for one in sources.find(['x.png', '*.png'], CLASSES)] == ['', '*.png fits no file']


def test_a_folder_is_read_as_in_training(tmp_path, capsys):
  """Links are followed, but not in circles; what file managers leave is no picture."""
  given, other = tmp_path / 'given', tmp_path / 'other'
  for path in (given / 'a' / '1.png', given / 'c' / '3.png', given / '__MACOSX' / 'a' / '1.png', other / '2.png'):
    path.parent.mkdir(parents=True)
    path.touch()
  (given / 'a' / 'up').symlink_to(given)
  (given / 'b').symlink_to(other)
  found = sources.find([str(given)], CLASSES)
  assert [(os.path.relpath(one.name, given), one.true_class) for one in found] == [
    ('a/1.png', 'a'),
    ('b/2.png', 'b'),
    ('c/3.png', 'c'),
  ]
  assert capsys.readouterr().err == f'note: {given}/a/up is a link to a folder that is read already: it is left out\n'
  trained = listing.find(given)
  assert [*zip(trained.files, trained.classes, strict=True)] == [('a/1.png', 'a'), ('b/2.png', 'b'), ('c/3.png', 'c')]


def test_a_folder_that_cannot_be_opened_is_an_error_and_the_others_are_read(tmp_path, monkeypatch, capsys):
  for name in ('a/1.png', 'b/2.png'):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).touch()
  scandir = os.scandir

  def refuse(path):
    if str(path) == f'{tmp_path}/a':
      raise PermissionError(13, 'Permission denied', path)
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', refuse)
  found = sources.find([str(tmp_path)], CLASSES)
  refused = Found(f'{tmp_path}/a', error=f'{tmp_path}/a cannot be opened: Permission denied')
  assert found == [Found(f'{tmp_path}/b/2.png', 'b'), refused]
  assert capsys.readouterr().err == ''


def test_files_that_are_no_pictures_are_counted(tmp_path, capsys):
  for name in ('1.png', 'b.heic', 'a.heic'):
    (tmp_path / name).touch()
  assert len(sources.find([str(tmp_path)], CLASSES)) == 1
  assert capsys.readouterr().err == f'note: {tmp_path} holds files that are no pictures: 2 .heic\n'


def test_pictures_are_read_in_order_and_not_far_ahead(monkeypatch):
  begun = []
  monkeypatch.setattr(sources, 'AHEAD', 5)
  monkeypatch.setattr(sources.pictures, 'read', lambda name, *_: begun.append(name) or np.full((1, 1, 1), name))
  found = [Found(number) for number in range(50)]
  read = sources.read_ahead(found, 1, 512)
  assert next(read).pixels == 0
  assert len(begun) <= 6
  assert [int(picture.pixels.item()) for picture in read] == [*range(1, 50)]


# The answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def many(workdir, tmp_path_factory):
  """130 pictures of many sizes in two classes, some with odd names or damage; and what predict says."""
  folder = tmp_path_factory.mktemp('pictures')
  for i in range(123):
    write(folder / 'ab'[i % 2] / f'{i:03d}.png', i, (5 + i % 9, 70 if i == 99 else 5 + i % 7))
  for name in ODD_NAMES:
    write(folder / 'odd' / name)
  (folder / 'b' / 'empty.png').touch()
  (folder / 'b' / 'cut.png').write_bytes((folder / 'a' / '000.png').read_bytes()[:60])
  return folder, predicted(workdir, folder, f'--output={folder}/out', '--top=2', status=1)


def test_every_picture_has_a_line_and_a_row_with_the_probabilities_of_the_classifier(many, classifier):
  folder, ended = many
  *lines, accuracy, written = ended.out.splitlines()
  assert written == f'written to {folder}/out: predictions.csv, predictions.png'
  rows = rows_of(folder / 'out')
  readable = [row for row in rows if not row['error']]
  assert (len(rows), len(readable), len(lines)) == (130, 128, 128)
  probabilities = classifier.probabilities([row['file'] for row in readable])
  for row, line, p in zip(readable, lines, probabilities, strict=True):
    first, second, *_ = np.argsort(-p, kind='stable')
    assert (row['class_1'], row['class_2']) == (CLASSES[first], CLASSES[second])
    assert float(row['probability_1']) == pytest.approx(p[first], rel=1e-3)
    shown = f'{CLASSES[first]} {float(row["probability_1"]):.2f}  {CLASSES[second]} {float(row["probability_2"]):.2f}'
    assert line.endswith(shown)
  right = sum(row['class_1'] == row['true_class'] for row in readable)
  expected = f'accuracy {right / 123:.4f} ({right} of 123 pictures whose class the folder tells)'
  assert accuracy == expected
  with Image.open(folder / 'out' / 'predictions.png') as picture:
    assert picture.size[0] == 1200
    assert len(np.unique(np.asarray(picture))) > 10


def test_odd_names_are_exact_in_the_csv_and_one_line_on_the_screen(many):
  folder, ended = many
  assert [os.path.basename(row['file']) for row in rows_of(folder / 'out')][-5:] == sorted(ODD_NAMES)
  names = [line.removeprefix(f'{folder}/odd/') for line in ended.out.splitlines() if '/odd/' in line]
  assert [name.split('.')[0] for name in names] == ['new\\nline', 'no \\udcff text', 'quo"te\',', 'with space', '日本']


def test_unreadable_pictures_are_named_and_the_status_says_so(many):
  folder, ended = many
  rows = {os.path.basename(row['file']): row for row in rows_of(folder / 'out')}
  assert rows['empty.png']['error'].startswith(f'{folder}/b/empty.png is empty')
  assert (rows['cut.png']['class_1'], rows['cut.png']['true_class']) == ('', 'b')
  *errors, last = (line for line in ended.err.splitlines() if not line.startswith('warning: no installed font has'))
  assert sorted(error.split(' is ')[0] for error in errors) == [
    f'error: {folder}/b/cut.png',
    f'error: {folder}/b/empty.png',
  ]
  assert last == '2 of 130 pictures could not be read; the column error of predictions.csv says why'


def test_one_picture_and_a_workdir_that_cannot_be_written(workdir, tmp_path, classifier):
  workdir = shutil.copytree(workdir, tmp_path / 'run', ignore=shutil.ignore_patterns('predict'))
  (workdir / 'predict').write_text('in the way')
  path = write(tmp_path / 'one.png', 5)
  ended = predicted(workdir, path)
  p = classifier.probabilities(path)
  assert ended.out == f'{path}  ' + '  '.join(f'{CLASSES[i]} {p[i]:.2f}' for i in np.argsort(-p)[:5]) + '\n'
  assert ended.err == (
    f'warning: {workdir}/predict cannot be written (File exists), so no files are: --output=DIR names another folder\n'
  )
  ended = predicted(workdir, path, f'--output={path}', status=2)
  assert ended.err == f'error: --output={path} cannot be written: File exists\n'


@pytest.mark.parametrize(
  ('rows', 'kept'), [([], 'old'), (['a\nb', 'c'], 'file,class_1,probability_1,true_class,error\n"a\nb"\nc\n')]
)
def test_an_early_end_keeps_the_rows_that_are_complete(rows, kept, tmp_path, capsys):
  path = tmp_path / 'predictions.csv'
  path.write_text('old')

  def interrupted():
    with predict._Rows(Output(tmp_path), 1) as written:
      for row in rows:
        written.write([row])
      written._file.write(b'half a ro')
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    interrupted()
  assert path.read_text() == kept
  assert capsys.readouterr().err == (f'note: {path} holds the first 2 pictures\n' if rows else '')
  assert list(tmp_path.iterdir()) == [path]


class Disk:
  """A file on a disk that is full after some bytes."""

  def __init__(self, file, room):
    self._file, self._room = file, room

  def write(self, data):
    if len(data) > self._room:
      self._file.write(data[: self._room])
      raise OSError(28, 'No space left on device')
    self._room -= len(data)
    return self._file.write(data)

  def __getattr__(self, name):
    return getattr(self._file, name)


@pytest.mark.parametrize(('room', 'kept'), [(0, 'old'), (4, 'old'), (5, 'a\nbb\n'), (6, 'a\nbb\n'), (7, 'a\nbb\nc\n')])
def test_on_a_full_disk_the_rows_so_far_stay_and_one_warning_is_given(room, kept, tmp_path, capsys):
  path, output = tmp_path / 'predictions.csv', Output(tmp_path)
  path.write_text('old')
  with predict._Rows(output, 1) as rows:
    rows._file.truncate(0)
    rows._file.seek(0)
    rows._file, rows._ends = Disk(rows._file, room), []
    for cell in ('a', 'bb', 'c', 'd', 'e'):
      rows.write([cell])
  assert path.read_text() == kept
  assert list(tmp_path.iterdir()) == [path]
  *notes, warning = capsys.readouterr().err.splitlines()
  assert notes == ([] if kept == 'old' else [f'note: {path} holds the first {kept.count(chr(10)) - 1} pictures'])
  assert warning.startswith(f'warning: {path} cannot be written (No space left on device), so no more files are')
  assert not output.is_open


def test_crops_get_a_canvas_that_only_grows(workdir, tmp_path, monkeypatch):
  """Another canvas is another program of the whole network to compile."""
  asked = []

  def probabilities(self, batch, crop_count):
    asked.append((crop_count, batch['image'].shape[1]))
    return np.full((len(batch['image']), 10), 0.1, np.float32)

  monkeypatch.setattr(classifier_lib.Classifier, 'batch_probabilities', probabilities)
  monkeypatch.setattr(predict, 'PARTS', (1,))
  paths = [write(tmp_path / f'{i}.png', i, (side, side)) for i, side in enumerate((9, 30, 5))]
  predicted(workdir, *paths, '--crops=10')
  predicted(workdir, *paths)
  assert asked == [(10, 16), (10, 32), (10, 32), (1, 16), (1, 32), (1, 8)]


def test_nothing_that_can_be_read_is_a_mistake(workdir, tmp_path):
  (tmp_path / 'x.png').write_text('no picture')
  ended = predicted(workdir, tmp_path / 'x.png', status=2)
  assert ended.err.startswith(f'error: {tmp_path}/x.png is not a picture')
  assert len(ended.err.splitlines()) == 1
  ended = predicted(workdir, tmp_path / 'x.png', tmp_path / 'y.png', status=2)
  assert ended.err.splitlines()[-1] == 'error: none of 2 pictures can be read'
  rows = rows_of(workdir / 'predict')
  assert ['is not a picture' in rows[0]['error'], 'does not exist' in rows[1]['error']] == [True, True]


def test_files_get_the_probabilities_that_evaluation_finds(workdir, classifier, tmp_path):
  """Both prepare the same pixels in the same way, also pictures that are larger than the canvas."""
  sizes = [(9, 12), (64, 64), (200, 90), (30, 100), (8, 8)]
  paths = [write(tmp_path / f'{i}.png', i, size) for i, size in enumerate(sizes)]
  images, shapes = splits.on_canvas([np.asarray(Image.open(path))[..., None] for path in paths], 64)
  split = Split(images, np.zeros(len(paths), np.int32), shapes)
  (found,) = evaluate.evaluate(classifier, split)
  np.testing.assert_allclose(classifier.probabilities(paths), np.exp(found.log_probabilities), rtol=1e-4)


def test_an_ensemble_predicts_together(tmp_path, classifier):
  config, states = classifier.recipe.copy_and_resolve_references(), []
  for member in range(2):
    config.ensemble.members, config.ensemble.member = 2, member
    states.append(random_state(config, member))
    write_run(tmp_path / f'member_{member}', config, (1, states[-1], None, True))
  path = write(tmp_path / 'a.png')
  predicted(tmp_path, path)
  found = float(rows_of(tmp_path / 'predict')[0]['probability_1'])
  both = classifier.with_networks([(state.params, state.batch_stats) for state in states])
  assert found == pytest.approx(both.probabilities(path).max(), rel=1e-4)


# The command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--mode=predict', 'a.png'], '--workdir is missing: give the folder of a run'),
    (['--mode=predict', '--workdir=x'], '--mode=predict needs pictures: give files, folders, or -'),
    (['--mode=explain', '--workdir=x'], '--mode=explain needs pictures'),
    (['--mode=predict', '--workdir=x', '--config=c.py', 'a'], '--config is for --mode=train or evaluate or inspect'),
    (['--mode=predict', '--workdir=x', '--config.seed=1', 'a'], '--config.seed is not for --mode=predict: the run'),
    (['--mode=predict', '--workdir=x', '--split=test', 'a'], '--split is for --mode=evaluate, not for --mode=predict'),
    (['--mode=predict', '--workdir=x', '--crops=1,10', 'a'], '--crops=1,10: --mode=predict takes one of 1,6,10,144'),
    (['--mode=predict', '--workdir=x', '--top=0', 'a'], '--top'),
    (['--mode=explain', '--workdir=x', '--crops=6', 'a'], '--crops is for --mode=evaluate or predict'),
    (['--mode=evaluate', '--workdir=x', '--top=2'], '--top is for --mode=predict or explain, not for --mode=evaluate'),
    (['--mode=inspect', '--workdir=x', 'a.png'], 'unexpected argument a.png'),
    (['--mode=predict', '--workdir={tmp}/none', 'a.png'], 'is no folder: train first'),
  ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
  ended = call_main(*(argument.format(tmp=tmp_path) for argument in arguments))
  assert (ended.status, len(ended.err.splitlines())) == (2, 1)
  assert message in ended.err


def test_a_file_whose_name_looks_like_a_flag(workdir, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write(tmp_path / '--config.png')
  assert predicted(workdir, '--', '--config.png').out.startswith('--config.png  ')


@pytest.mark.parametrize('total', [1, 64, 65, 200, 400])
def test_processes_share_the_pictures_and_get_all_answers_in_order(total, monkeypatch):
  found = [Found(str(number)) for number in range(total)]
  monkeypatch.setattr(processes, 'count', lambda: 3)
  groups = []  # of each process
  for number in range(3):
    monkeypatch.setattr(processes, 'index', lambda number=number: number)
    own = predict.share(found)
    groups.append([own[start : start + 64] for start in range(0, len(own), 64)])
  assert sorted(one for own in groups for group in own for one in group) == sorted(found)
  assert len(groups[0]) - len(groups[2]) <= 1
  for number in range(3):
    monkeypatch.setattr(processes, 'index', lambda number=number: number)
    rounds = iter(range(1000))

    def gather(own, rounds=rounds, number=number):
      place = next(rounds)
      everyone = [[[int(one.name), ''] for one in group] for own in groups for group in own[place : place + 1] or [()]]
      assert everyone[number] == own
      return everyone

    monkeypatch.setattr(processes, 'gather', gather)
    own = ([(Picture(one, np.zeros(1)), int(one.name)) for one in group] for group in groups[number])
    parts = [*predict.gathered(own, found)]
    assert all(len(part) == 64 for part in parts[:-1])
    assert [(picture.found, result) for part in parts for picture, result in part] == [
      (one, place) for place, one in enumerate(found)
    ]
    assert sum(picture.pixels is not None for part in parts for picture, _ in part) == sum(map(len, groups[number]))


def test_pictures_of_other_processes_are_read_again_for_the_gallery(tmp_path):
  path = write(tmp_path / 'a.png')
  gallery = predict._Gallery(2, lambda one: sources.read(one, 1, 64))
  for place, name in enumerate((tmp_path / 'removed.png', path), 1):
    gallery.add(predict.Answer(Picture(Found(str(name))), [0], [1.0]), place)
  (answer,) = gallery._answers
  np.testing.assert_array_equal(answer.picture.pixels, np.asarray(Image.open(path))[..., None])
