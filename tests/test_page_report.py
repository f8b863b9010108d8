import dataclasses
import errno
import importlib.util
import json
import shutil

import numpy as np
import pytest
from helpers import small_config
from report_helpers import CLASSES, SIZE, Page, make_run, pixels, small_runs

from googlenet_jax import runs
from googlenet_jax.data import datasets
from googlenet_jax.evaluation import evaluate
from googlenet_jax.host import files
from googlenet_jax.host.errors import UserError
from googlenet_jax.page import galleries, report, results, sections, subject

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
needs_browser = pytest.mark.skipif(
  not CHROMIUM or importlib.util.find_spec('playwright') is None, reason='no Chromium, or no playwright, is installed'
)


@pytest.fixture(autouse=True, scope='module')
def machine():
  with small_runs():
    yield


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp('runs') / 'first <run>')


@pytest.fixture(scope='module')
def one(workdir):
  return subject.read(workdir, None)


@pytest.fixture(scope='module')
def text(one):
  return report.page(one, None, '2026-01-31')


@pytest.fixture(scope='module')
def page(text):
  return Page(text)


def test_the_file_is_written_and_its_size_is_said(one, workdir, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(subject, 'read', lambda *_: one)
  report.write_report(workdir, output=tmp_path / 'out')
  path = tmp_path / 'out/report.html'
  assert [*path.parent.iterdir()] == [path]
  assert capsys.readouterr().out == f'written to {path}: {path.stat().st_size / 1e3:.0f} kB, all in one file\n'
  Page(path.read_text(encoding='utf-8'))


def test_the_page_fetches_nothing_and_runs_nothing(page, text):
  policy = page.all('meta', **{'http-equiv': 'Content-Security-Policy'})[0][1]['content']
  assert policy.startswith("default-src 'none'; img-src data:;")
  assert not page.all('script')
  links = [attrs['href'] for _, attrs in page.all('a') if not attrs['href'].startswith('#')]
  assert links == ['https://arxiv.org/abs/1409.4842', 'https://arxiv.org/abs/1512.04150']
  assert text.count('http') == len(links) + 1  # and http-equiv
  for _, attrs, _ in page.elements:
    assert not [name for name in attrs if name.startswith('on')]
    assert attrs.get('src', 'data:').startswith('data:')
  assert 'url(' not in text


def test_names_are_text(page, text):
  assert '<script' not in text
  title = page.all('title')[0]  # those of the curves follow
  assert page.texts[title[0]] == 'first <run>: report of a GoogLeNet'
  rows = [page.texts[number] for number, _ in page.all('th', scope='row')]
  long = f'{"x" * 30}…{"x" * 29}'
  shown = [*CLASSES[:4], long, 'two\\nlines', *CLASSES[6:8], '\\u202eturned', 'plain']
  assert [name for name in rows if name in shown][-10:] == shown
  assert '<b>3 & "é"_.png' in ''.join(page.texts[number] for number, _ in page.all('figcaption'))
  assert all(page.inside(number, 'bdi') for number, attrs in page.all('td') if attrs.get('class') == 'name')


def test_the_page_is_accessible(page):
  assert page.all('html', lang='en')
  assert all(attrs['alt'] for _, attrs in page.all('img'))
  assert all(attrs['scope'] in ('col', 'row') for _, attrs in page.all('th'))
  assert all(attrs['aria-label'] for _, attrs in page.all('svg', role='img'))
  ids = [attrs['id'] for _, attrs, _ in page.elements if 'id' in attrs]
  assert len(ids) == len(set(ids))
  used = [attrs[key] for _, attrs, _ in page.elements for key in ('popovertarget', 'aria-labelledby') if key in attrs]
  used += [attrs['href'][1:] for _, attrs in page.all('a') if attrs['href'].startswith('#')]
  assert set(used) <= set(ids)


def test_the_cells_have_the_counts_and_open_their_images(page, one):
  counts, found = one.results.confusion, one.results
  (table,) = page.all('table', **{'class': 'matrix'})
  cells = [
    (number, attrs)
    for number, (name, attrs, parents) in enumerate(page.elements)
    if name == 'td' and attrs.get('class', '')[:1] == 'c' and table[0] in [parent for _, parent in parents]
  ]
  assert [int(page.texts[number] or 0) for number, _ in cells] == counts.flatten().tolist()
  shown = 0
  for true, said in zip(*np.nonzero(counts), strict=True):
    (dialog,) = page.all('div', id=f'cell-{true}-{said}')
    sources = [pixels(attrs['src']) for attrs in page.inside(dialog[0], 'img')]
    indices = found.cell(true, said)[: galleries.PER_CELL]
    assert len(sources) == len(indices)
    for source, index in zip(sources, indices, strict=True):
      np.testing.assert_array_equal(source, found.split.images[index, ..., 0])
    assert f'{counts[true, said]} image' in page.texts[dialog[0]]
    shown += len(sources)
  assert shown > 50


def test_mistakes_and_right_answers_have_maps(page, one):
  for anchor, indices in (('mistakes', one.results.mistakes[:36]), ('right', one.results.samples(24))):
    (section,) = page.all('section', id=anchor)
    sources = [pixels(attrs['src']) for attrs in page.inside(section[0], 'img')]
    assert len(sources) == 2 * len(indices)
    for source, index in zip(sources[::2], indices, strict=True):
      np.testing.assert_array_equal(source, one.results.split.images[index, ..., 0])
    assert sources[1].shape == (160, 160, 3)
    expected = np.asarray(one.results.heat_maps(indices[:1])[0], float)
    assert np.abs(sources[1] - expected).mean() < 5  # JPEG


def test_figures_of_the_run(page, one):
  text = ' '.join(page.texts[0].split())
  accuracy = one.results.evaluation.accuracy
  right = round(104 * accuracy)
  for part in (
    f'{100 * accuracy:.2f} %', f'{right} of 104 test images', 'made on 2026-01-31', 'cpu: 1 used; 2 CPU cores',
    '360 train, 104 test images', 'step 7', f'1.515{"2.00000.7500" * 3}',
  ):  # fmt: skip
    assert part in text
  layers = results.layer_rows(one.classifier)[-1]
  assert layers[-1] in text
  assert layers[-2] in text
  assert len(page.all('svg', role='img')) == 3


def test_paths_of_this_machine_stay_here(tmp_path):
  config = small_config(image_size=SIZE, **{'data.name': 'folder', 'data.source_dir': '/home/me/secret/pictures'})
  run = runs.Run(config, CLASSES, (8, 8, 1))
  tmp_path = tmp_path / 'run'
  tmp_path.mkdir()
  runs.write(tmp_path, run)
  text = report.page(subject.read(tmp_path, None), None, '')
  assert '…/pictures' in text
  assert 'secret' not in text
  assert str(tmp_path) not in text


def test_durations():
  assert [*map(sections.seconds, (-1.0, 0.0, 23.4, 89.0, 594.0, 7200.0))] == [
    '-1 seconds', '0 seconds', '23.4 seconds', '89 seconds', '9.9 minutes', '2 hours',
  ]  # fmt: skip


# What is missing -----------------------------------------------------------------------------------------------------


@pytest.fixture
def without_data(monkeypatch):
  def load(**_):
    raise UserError('/data/there: there is no such folder')

  monkeypatch.setattr(datasets, 'load', load)


def test_without_the_data_the_files_of_the_run_are_shown(workdir, one, tmp_path, without_data, capsys):
  copy = shutil.copytree(workdir, tmp_path / 'run')
  report.write_report(copy)
  assert 'there is no such folder' in capsys.readouterr().out
  text = (copy / 'report.html').read_text()
  page = Page(text)
  assert 'The images of this run are not on the machine' in text
  assert not page.all('img')
  assert not page.all('table', **{'class': 'matrix'})
  assert len(page.all('svg', role='img')) == 3

  (copy / 'summary.json').write_text(json.dumps({'test_accuracy': 0.625, 'test_loss': 1.5, 'steps': 7}))
  page = Page(report.page(subject.read(copy, None), None, ''))
  assert '62.50\u00a0%test images, from summary.json at step 7' in page.texts[0]

  evaluation = one.results.evaluation
  content = {
    'split': 'test', 'step': 7, 'examples': 104, 'models': 1, 'accuracy': evaluation.accuracy, 'loss': evaluation.loss,
    'confusion_matrix': evaluation.confusion.tolist(),
    'table': [{'models': 1, 'crops': 10, 'top1_error': 0.125, 'top5_error': 0.0625}],
  }  # fmt: skip
  (copy / 'evaluation.json').write_text(json.dumps(content))
  found = subject.read(copy, None)
  page = Page(report.page(found, None, ''))
  assert f'{100 * evaluation.accuracy:.2f}\u00a0%104 test images, from evaluation.json at step 7' in page.texts[0]
  assert page.all('table', **{'class': 'matrix'})
  assert not page.all('button')
  assert '12.50\u00a0%6.25\u00a0%' in page.texts[0]
  assert found.per_class()[0] == one.results.per_class()
  for table in ([{}], 5, [None], [{**content['table'][0], 'crops': '<b>'}]):  # damaged
    (copy / 'evaluation.json').write_text(json.dumps({**content, 'table': table}))
    assert 'top-1 error' not in report.page(subject.read(copy, None), None, '')
  (copy / 'evaluation.json').unlink()
  (copy / 'summary.json').write_text(json.dumps({'test_accuracy': 0.5, 'steps': '<b>'}))
  assert 'at step &lt;b&gt;' in report.page(subject.read(copy, None), None, '')


def test_scores_from_per_class_csv(workdir, one, tmp_path, without_data):
  from googlenet_jax.evaluation import report as of_evaluation

  copy = shutil.copytree(workdir, tmp_path / 'run')
  csv = of_evaluation.per_class_csv(one.results.evaluation, CLASSES)
  (copy / 'per_class.csv').write_text(csv)
  rows, source = subject.read(copy, None).per_class()
  assert source == 'from per_class.csv'
  for own, other in zip(rows, one.results.per_class(), strict=True):
    assert (own.name, own.support) == (other.name, other.support)
    np.testing.assert_allclose(np.array(own[1:4], float), np.array(other[1:4], float), rtol=1e-5)  # None is NaN
  for damaged in (csv.replace('plain', 'other'), csv[: len(csv) // 2], 'class\na,b\n', ''):
    (copy / 'per_class.csv').write_text(damaged)
    assert subject.read(copy, None).per_class()[0] == []


@pytest.mark.parametrize(
  'content',
  ['{', '[]', '{"split": "test"}', '{"split": "test", "confusion_matrix": [[1, 2], [3]]}', '{"confusion_matrix": {}}'],
)
def test_a_damaged_evaluation_is_left_out(workdir, one, tmp_path, content):
  (tmp_path / 'evaluation.json').write_text(content)
  assert dataclasses.replace(one, workdir=tmp_path, results=None).evaluation == {}


def test_without_a_checkpoint_there_are_curves_and_layers(workdir, tmp_path, capsys):
  copy = shutil.copytree(workdir, tmp_path / 'run', ignore=shutil.ignore_patterns('checkpoints'))
  report.write_report(copy)
  assert 'has saved no checkpoint yet' in capsys.readouterr().out
  page = Page((copy / 'report.html').read_text())
  assert [attrs['id'] for _, attrs in page.all('section')] == ['run', 'curves', 'layers', 'recipe']
  (copy / 'metrics.jsonl').unlink()
  assert 'metrics.jsonl holds no figures yet' in report.page(subject.read(copy, None), None, '')
  with pytest.raises(UserError, match='holds no checkpoint yet'):
    subject.read(copy, 7)


def test_without_a_run_there_is_one_line(workdir, tmp_path):
  with pytest.raises(UserError, match='holds no run'):
    report.write_report(tmp_path)
  with pytest.raises(UserError, match='is no folder'):
    report.write_report(tmp_path / 'none')
  with pytest.raises(UserError, match='is no folder'):
    report.write_report(workdir, compare=tmp_path / 'none')
  assert not [*tmp_path.iterdir()]
  weights = tmp_path / 'x.pth'
  weights.touch()
  with pytest.raises(UserError, match='is a file of weights, which knows no run'):
    report.write_report(weights)


def test_a_folder_that_cannot_be_written(workdir, one, tmp_path, monkeypatch):
  monkeypatch.setattr(subject, 'read', lambda *_: one)
  monkeypatch.setattr(subject, 'run_in', lambda *_: one.run)
  taken = tmp_path / 'file'
  taken.touch()
  with pytest.raises(UserError, match='--output=.*file/in cannot be written'):
    report.write_report(workdir, output=taken / 'in')
  with pytest.raises(UserError, match='cannot be written .*: name another folder with --output=DIR'):
    report.write_report(taken / 'in')

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(files, 'write_text', full)
  with pytest.raises(UserError, match=r'report.html cannot be written \(No space left on device\): make room there'):
    report.write_report(workdir, output=tmp_path / 'out')


# Ensembles and comparisons -------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def ensemble(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'both'
  for member in range(2):
    make_run(folder / f'member_{member}', member + 3, **{'ensemble.members': 2, 'ensemble.member': member})
  return folder


def test_members_of_an_ensemble_and_a_comparison(one, ensemble):
  found = subject.read(ensemble, None)
  page = Page(report.page(found, one, ''))
  (section,) = page.all('section', id='members')
  text = page.texts[section[0]]
  accuracies = [100 * e.accuracy for e in found.results.evaluations]
  for share in (*accuracies, np.mean(accuracies), 100 * evaluate.together(found.results.evaluations).accuracy):
    assert f'{share:.2f}' in text
  assert 'A line for each of 2 networks' in page.texts[0]

  (section,) = page.all('section', id='compared')
  text = page.texts[section[0]]
  a, b, labels = (found.results.evaluation.predictions, one.results.evaluation.predictions, found.results.split.labels)
  only = int(((a == labels) & (b != labels)).sum()), int(((a != labels) & (b == labels)).sum())
  assert min(only) > 0
  assert f'only both is right{only[0]}{100 * only[0] / 104:.2f}' in text
  assert f'only first <run> is right{only[1]}{100 * only[1] / 104:.2f}' in text
  assert 'ensemble.members21' in text
  images = page.inside(section[0], 'img')
  first = np.flatnonzero((a == labels) & (b != labels))
  sure = np.maximum(found.results.evaluation.confidences, one.results.evaluation.confidences)[first]
  own = found.results.split.images[first[np.argsort(-sure, kind='stable')[0]], ..., 0]
  np.testing.assert_array_equal(pixels(images[0]['src']), own)
  assert 'where it speaks for' in images[1]['alt']
  assert 'where it speaks for' in images[2]['alt']


def test_runs_on_other_images_are_not_compared_image_by_image(one):
  split = one.results.split
  fewer = dataclasses.replace(one.results, split=split.take(np.arange(50)))
  text = report.page(one, dataclasses.replace(one, results=fewer), '')
  assert 'not compared image by image: their test images differ' in text
  assert 'first &lt;run&gt; (1)' in text  # two runs of one name
  other = dataclasses.replace(one, run=dataclasses.replace(one.run, classes=tuple('abcdefghij')))
  assert 'they have different classes' in report.page(one, other, '')
  assert 'there are no answers of both' in report.page(one, dataclasses.replace(one, results=None), '')


# The browser ---------------------------------------------------------------------------------------------------------


@needs_browser
def test_a_cell_opens_its_pictures_in_a_browser(text, one, tmp_path):
  from playwright.sync_api import sync_playwright

  (tmp_path / 'report.html').write_text(text, encoding='utf-8')
  counts = one.results.confusion
  (true, said), (other, _) = [divmod(int(place), 10) for place in np.argsort(-counts, axis=None)[[0, 3]]]
  options = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking']
  options += ['--disable-component-update', '--disable-sync']
  with sync_playwright() as play:
    browser = play.chromium.launch(executable_path=CHROMIUM, args=options)
    tab = browser.new_page(viewport={'width': 390, 'height': 800}, color_scheme='dark')
    asked, complaints = [], []
    tab.on('request', lambda request: asked.append(request.url))
    tab.on('console', lambda message: complaints.append(message.text))
    tab.goto((tmp_path / 'report.html').as_uri())
    dialog, button = (tab.locator(f'{start}cell-{true}-{said}"]').first for start in ('[id="', '[popovertarget="'))
    assert not dialog.is_visible()
    button.click()
    assert dialog.is_visible()
    shown = dialog.locator('img')
    shown.first.wait_for(state='visible')
    assert shown.count() == min(int(counts[true, said]), galleries.PER_CELL)
    assert shown.evaluate_all('images => images.map(image => image.naturalWidth)') == [8] * shown.count()
    tab.keyboard.press('Escape')
    assert not dialog.is_visible()
    button.focus()
    tab.keyboard.press('Enter')
    assert dialog.is_visible()
    tab.keyboard.press('Enter')  # the button that closes has the focus
    assert not dialog.is_visible()
    assert tab.evaluate('document.documentElement.scrollWidth') == 390
    assert [url for url in asked if not url.startswith('data:')] == [(tmp_path / 'report.html').as_uri()]
    assert complaints == []
    browser.close()
