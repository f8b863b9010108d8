"""The page of `--mode=page`: its server with clients that behave and others, and in a real browser."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import io
import json
import re
import shutil
import socket
import urllib.error
import urllib.request

import numpy as np
import pytest
from helpers import random_state, small_config
from page_helpers import MOST_BYTES, small_machine, wait_for, write_digits, write_records
from PIL import Image

from googlenet_jax import loading, runs
from googlenet_jax.data import datasets
from googlenet_jax.evaluation import report
from googlenet_jax.page import addresses, answers, app, parts, uploads
from googlenet_jax.page.live import LiveRun
from googlenet_jax.page.uploads import Uploads

# Gradio makes statistics of every so many answers in ways that Pandas will no longer have.
pytestmark = [
  pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
  pytest.mark.filterwarnings('ignore:The copy keyword is deprecated'),
]


@pytest.fixture(autouse=True, scope='module')
def machine():
  with small_machine():
    yield


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  config = small_config(image_size=49)  # its maps have 3x3 cells
  folder = write_digits(tmp_path_factory.mktemp('runs') / 'of <b>', config, (7, random_state(config), 0.5, True))
  write_records(folder)
  return folder


@pytest.fixture(scope='module')
def classifier(workdir):
  return loading.load(workdir)


@contextlib.contextmanager
def served(*found, host='127.0.0.1'):
  """Serves a page, and leaves nothing behind: Gradio does not close the event loops that it makes."""
  loops, new = [], asyncio.new_event_loop
  with socket.socket() as trial:
    trial.bind(('127.0.0.1', 0))
    port = trial.getsockname()[1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(asyncio, 'new_event_loop', lambda: loops.append(new()) or loops[-1])
    page = app.Page([*found], port, host, Uploads())
  yield page
  page.close()
  assert not page.uploads.folder.exists()
  asyncio.set_event_loop(None)
  for loop in loops:
    loop.close()


@pytest.fixture(scope='module')
def page(workdir):
  """A page whose run has answered all test images."""
  run = LiveRun(workdir)
  with served(run) as found:
    wait_for(lambda: run.known.parts.get('matrix'))
    yield found


@pytest.fixture(scope='module')
def digits():
  return datasets.load('digits').test.images


@pytest.fixture
def picture(digits, tmp_path):
  Image.fromarray(digits[3][..., 0]).resize((64, 64)).save(tmp_path / 'drei.png')
  return tmp_path / 'drei.png'


# The server -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def client_of(page):
  """Makes a client of the page, which is a session of its own."""
  from gradio_client import Client

  return lambda: Client(page.address, verbose=False, analytics_enabled=False)


@pytest.fixture(scope='module')
def ask(client_of):
  """`ask(path)`: what the page says of a file, as HTML."""
  from gradio_client import handle_file

  client = client_of()
  return lambda path, client=client: client.predict(handle_file(str(path)), api_name='/answer')


def best_of(html):
  return re.search('<p class=best><bdi>(.*?)</bdi>', html)[1]


def test_an_upload_is_answered(ask, picture, classifier):
  html = ask(picture)
  assert best_of(html) == classifier.predict(str(picture)).name
  assert html.count('src="data:image/') == answers.TOP + 1


def test_users_at_the_same_time_get_their_own_answers(client_of, ask, classifier, digits, tmp_path):
  paths = [tmp_path / f'{number}.png' for number in range(6)]
  for path, image in zip(paths, digits, strict=False):
    Image.fromarray(image[..., 0]).save(path)
  paths[5] = paths[0]  # two users may send one file
  clients = [client_of() for _ in paths]
  with concurrent.futures.ThreadPoolExecutor(len(paths)) as pool:
    found = [*pool.map(ask, paths, clients)]
  for path, html in zip(paths, found, strict=True):
    own = answers.answer(classifier, answers.read(path, path.name, classifier))
    assert answers.html_of(own, 'classes 0') in html
  assert len(set(found)) == len(set(paths))


def bad_files(folder, picture):
  """Files that are no pictures, with what the page must say."""
  whole, large = picture.read_bytes(), io.BytesIO()
  Image.new('1', (10_000, 10_000)).save(large, 'PNG')
  return {
    'text.png': (b'not a picture', 'text.png is not a picture that can be read'),
    'half.png': (whole[: len(whole) // 2], 'half.png is damaged'),
    'empty.jpg': (b'', 'empty.jpg is empty'),
    'site.html': (b'<!doctype html>', 'site.html is a web page'),
    'bomb.png': (large.getvalue(), 'bomb.png is too large'),
    '<b>bold.png': (b'GIF89a', 'bold.png is damaged, or an unusual kind of GIF'),
  }


def test_what_is_no_picture_gets_a_message(ask, picture, tmp_path, capfd):
  for name, (content, message) in bad_files(tmp_path, picture).items():
    (tmp_path / name).write_bytes(content)
    html = ask(tmp_path / name)
    assert message in html, name
    assert html.startswith('<section class=answer><p class=trouble role=alert>')
    assert '<b>' not in html
    assert 'googlenet_jax_page' not in html  # no path of this machine
  assert 'Traceback' not in ''.join(capfd.readouterr())


def get(page, path):
  try:
    with urllib.request.urlopen(f'{page.address}{path}') as answer:
      return answer.status
  except urllib.error.HTTPError as error:
    return error.code


FILE_HEAD = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
FILE_KIND = {'Content-Type': 'multipart/form-data; boundary=x'}


def upload(page, content, **headers):
  """Sends a file without asking for an answer; returns the status, and the path that the server gave it."""
  host = page.address.removeprefix('http://')
  connection = http.client.HTTPConnection(host)
  connection.request('POST', '/gradio_api/upload', FILE_HEAD + content + b'\r\n--x--\r\n', FILE_KIND | headers)
  answer = connection.getresponse()
  found = answer.status, answer.read()
  connection.close()
  return found


def test_a_file_above_the_limit_is_refused(page):
  status, text = upload(page, bytes(MOST_BYTES + 1))
  assert status == 413
  assert b'maximum allowed size' in text
  assert upload(page, bytes(10))[0] == 200
  connection = http.client.HTTPConnection(page.address.removeprefix('http://'))
  parts_of_it = [FILE_HEAD, *[bytes(100_000)] * 3, FILE_HEAD.replace(b'--x', b'\r\n--x'), bytes(100_000)]
  connection.request('POST', '/gradio_api/upload', iter(parts_of_it), FILE_KIND)  # in chunks, and in two files
  assert connection.getresponse().status == 413
  connection.close()


def test_uploads_are_refused_while_the_room_is_full(page, monkeypatch):
  monkeypatch.setattr(uploads, 'ROOM', 0)
  status, text = upload(page, b'a picture')
  assert (status, text) == (503, b'Too many pictures are waiting: try again in a few minutes.')


def test_nobody_reads_files_of_this_machine(page, workdir):
  own = (workdir / runs.FILE, __file__, '/etc/passwd')
  assert [get(page, f'/gradio_api/file={urllib.request.pathname2url(str(path))}') for path in own] == [403] * 3
  with pytest.raises(RuntimeError, match='event: error'):
    predict(page, {'path': '/etc/passwd', 'meta': {'_type': 'gradio.FileData'}})


def test_nobody_gets_answers_to_pictures_of_this_machine(page, picture, capfd):
  assert 'This picture is not here' in predict(
    page, {'path': str(picture), 'orig_name': 'x.png'}
  )  # Gradio looks at meta
  _, path = upload(page, picture.read_bytes())
  assert 'class=best' in predict(page, {'path': json.loads(path)[0]}).replace('\\', '')
  for odd in ({'path': None}, {'path': 'a\0b'}, {}):
    assert 'This picture is not here' in predict(page, odd)
  for odd in ('text', 7, [1], {'path': 7}, {'path': str(picture), 'meta': 3}):
    with pytest.raises(RuntimeError, match='This page cannot read that request'):
      predict(page, odd)
  assert 'Traceback' not in ''.join(capfd.readouterr())


def test_other_sites_cannot_read_the_page_by_a_name_of_their_own(page):
  def status(host):
    connection = http.client.HTTPConnection(page.address.removeprefix('http://'))
    connection.request('GET', '/config', headers={'Host': host})
    found = connection.getresponse().status
    connection.close()
    return found

  port = page.address.rpartition(':')[2]
  assert [*map(status, ('localhost', '127.0.0.1:1', f'[::1]:{port}'))] == [200] * 3  # a forwarded port is another one
  assert [*map(status, ('evil.example', f'evil.example:{port}', '', '0.0.0.0'))] == [403] * 4


def test_requests_that_the_page_does_not_make_are_refused(page):
  for path in ('component_server', 'component_server/', 'process_recording', 'vibe-edit'):
    with pytest.raises(urllib.error.HTTPError, match='403'):
      urllib.request.urlopen(f'{page.address}/gradio_api/{path}', b'{}')
  for site, status in (('cross-site', 403), ('same-origin', 200)):
    assert upload(page, b'a picture', **{'Sec-Fetch-Site': site})[0] == status


def predict(page, file):
  """Asks for the answer to a file of the server; raises what the page says."""
  call = urllib.request.Request(
    f'{page.address}/gradio_api/call/answer',
    json.dumps({'data': [file]}).encode(),
    {'Content-Type': 'application/json'},
  )
  with urllib.request.urlopen(call) as answer:
    event = json.load(answer)['event_id']
  with urllib.request.urlopen(f'{page.address}/gradio_api/call/answer/{event}') as answer:
    text = answer.read().decode()
  if 'event: error' in text:
    raise RuntimeError(text)
  return text


def test_the_server_fetches_nothing_for_anybody(page, monkeypatch):
  import safehttpx

  def fetched(*_, **__):
    raise AssertionError('it fetched')

  monkeypatch.setattr(safehttpx, 'get', fetched)
  monkeypatch.setattr(safehttpx, 'async_validate_url', fetched)
  for path in ('/gradio_api/file=http://example.org/a.png', '/gradio_api/file=HTTPS://example.org/a.png'):
    assert get(page, path) == 403
  assert get(page, '/gradio_api/proxy=https://example.hf.space/') == 403
  with pytest.raises(RuntimeError) as e:
    predict(page, {'path': 'http://example.org/a.png', 'meta': {'_type': 'gradio.FileData'}})
  assert 'it fetched' not in str(e.value)


def test_nothing_is_kept(workdir, monkeypatch, capfd):
  monkeypatch.setattr(uploads, 'KEPT_SECONDS', 2)
  with served(LiveRun(workdir)) as page:
    status, path = upload(page, b'a picture')
    assert status == 200
    files = lambda: [path for path in page.uploads.folder.rglob('*') if path.is_file()]
    assert [str(file) for file in files()] == json.loads(path)
    with socket.create_connection(('127.0.0.1', int(page.address.rpartition(':')[2]))) as broken_off:
      head = 'POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200000\r\n'
      broken_off.sendall(
        f'{head}Content-Type: {FILE_KIND["Content-Type"]}\r\n\r\n'.encode() + FILE_HEAD + bytes(100_000)
      )
      wait_for(lambda: len(files()) == 2)
    wait_for(lambda: not files())
    assert page.uploads._coming == 0
    assert 'Traceback' not in ''.join(capfd.readouterr())
    upload(page, b'another picture')  # which goes at the end


def test_a_file_of_weights_has_the_first_tab_only(classifier, digits, workdir, tmp_path, monkeypatch):
  (tmp_path / 'weights.pth').touch()
  monkeypatch.setattr(loading, 'load', lambda *_, **__: classifier)
  run = LiveRun(tmp_path / 'weights.pth')
  assert best_of(run.answer(lambda _: digits[0], 'x', True)) == classifier.predict(digits[0]).name
  assert 'its classes are numbers' in run.known.note
  assert f'{classifier.recipe.image_size} pixels and the rest are assumed' in run.known.note
  monkeypatch.undo()
  host = '::1' if addresses._trouble('::1', 0) is None else '127.0.0.1'  # some machines have no IPv6
  with served(run, LiveRun(workdir), host=host) as page, urllib.request.urlopen(f'{page.address}/config') as answer:
    components = json.load(answer)['components']
  assert [one['props']['label'] for one in components if one['type'] == 'tabitem'] == ['Try it', 'The other run']
  answers_of_runs = [one['props'] for one in components if 'answer-place' in one['props'].get('elem_classes', ())]
  assert ['scrollIntoView' in props['js_on_load'] for props in answers_of_runs] == [True, False]
  assert all('The answer to your picture appears here' in props['value'] for props in answers_of_runs)


def test_a_cell_that_does_not_exist_opens_nothing(page):
  found = page.runs[0].known.subject.results
  assert [parts.cell(found, place) for place in ('', '1', '1,99', 'a,b', '1,2,3', '-1,0')] == [''] * 6


# The browser ----------------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed (apt-get install chromium)')
OPTIONS = [
  '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync',
]  # fmt: skip


@pytest.fixture(scope='module')
def browser():
  playwright = pytest.importorskip('playwright.sync_api')
  with playwright.sync_playwright() as started:
    opened = started.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
    yield opened
    opened.close()


@pytest.fixture
def open_page(browser, page):
  """`open_page(**options)`: the page in a new window, with its test images."""
  contexts = []

  def opened(**options):
    contexts.append(browser.new_context(**options))
    tab = contexts[-1].new_page()
    tab.requests, tab.errors = [], []
    tab.on('request', lambda request: tab.requests.append(request.url))
    tab.on('pageerror', lambda error: tab.errors.append(str(error)))
    tab.goto(page.address)
    tab.wait_for_selector('.part-samples button')
    return tab

  yield opened
  for context in contexts:
    context.close()


@needs_chromium
def test_a_picture_is_tried_in_the_browser(open_page, page, picture, classifier, tmp_path):
  tab = open_page()
  assert tab.inner_text('.answer') == 'The answer to your picture appears here.'
  tab.set_input_files('input[type=file]', picture)
  tab.wait_for_selector('.best')
  expected = classifier.explain(str(picture), top=answers.TOP)
  assert tab.inner_text('.best') == expected.names[0]
  assert tab.locator('.said .class').all_inner_texts() == [*expected.names]
  shown = lambda: [one.get_attribute('class') for one in tab.locator('.map').all() if one.is_visible()]
  assert shown() == ['map k0']
  tab.get_by_role('radio', name=expected.names[1]).check()
  assert shown() == ['map k1']
  tab.keyboard.press('ArrowDown')
  assert shown() == ['map k2']
  size = tab.evaluate("document.querySelector('.map.k2 img').naturalWidth")
  assert size >= 160
  # A file that is no picture.
  (tmp_path / 'text.png').write_text('no picture')
  tab.get_by_label('Remove Image').click()
  tab.wait_for_selector('.best', state='detached')
  tab.set_input_files('input[type=file]', tmp_path / 'text.png')
  assert 'text.png is not a picture that can be read' in tab.wait_for_selector('.trouble').inner_text()
  # A test image, which takes the place of the upload.
  found = page.runs[0].known.subject.results
  index = found.samples(parts.SAMPLES, only_right=False)[2]
  assert tab.locator('.image-container img').count() == 1
  tab.locator('.part-samples button').nth(2).click()
  tab.wait_for_selector('.best')
  verdict = 'right' if found.answer(index).is_right else 'wrong'
  assert tab.inner_text('.truth') == f'It is {found.answer(index).true}: the answer is {verdict}.'
  assert tab.locator('.image-container img').count() == 0
  assert not tab.errors
  assert [url for url in tab.requests if not url.startswith((page.address, 'data:', 'blob:'))] == []


@needs_chromium
def test_the_run_is_shown_in_the_browser(open_page, page, workdir):
  found = page.runs[0].known.subject.results
  tab = open_page()
  assert tab.inner_text('h1') == workdir.name
  tab.get_by_role('tab', name='The run').click()
  tab.wait_for_selector('.part-curves svg')
  label, other = (tab.locator('.part-curves svg').nth(0).get_attribute('aria-label') for _ in range(2))
  assert 'train ends at' in label
  tab.locator('.part-curves summary').click()
  with (workdir / runs.METRICS).open('a') as file:
    record = runs.records(workdir)[-1] | {'split': 'train'}
    file.write(json.dumps({**record, 'step': 9, 'epoch': 0.9, 'loss': 0.125}) + '\n')
  tab.wait_for_selector('.part-curves svg[aria-label*="train ends at 0.125"]')  # without a reload
  assert label == other
  assert tab.locator('.part-curves details').get_attribute('open') is not None  # as somebody left it
  true, said = np.unravel_index(np.argmax(found.confusion - np.diag(np.diag(found.confusion))), found.confusion.shape)
  cell = tab.locator(f'.matrix button[data-place="{true},{said}"]')
  cell.focus()
  tab.keyboard.press('Enter')
  dialog = tab.get_by_role('dialog')
  dialog.wait_for()
  assert dialog.locator('img').count() == min(found.confusion[true, said], parts.PICTURES)
  assert dialog.locator('.file').first.inner_text() == found.name(found.cell(true, said)[0])
  tab.keyboard.press('Escape')
  dialog.wait_for(state='hidden')
  cell.click()  # the same one
  dialog.wait_for()
  tab.get_by_role('button', name='Close').click()
  dialog.wait_for(state='hidden')
  scores = report.class_scores(found.evaluation)
  row = tab.locator('.part-classes tbody tr').first.inner_text().split()
  assert row[0] == '0'
  assert int(row[-1]) == scores.support[0]
  assert tab.locator('.part-mistakes img').count() > 0
  assert 'conv1' in tab.inner_text('.part-layers')
  assert not tab.errors


@needs_chromium
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_page_fits_a_phone_and_its_parts_have_names(open_page, scheme):
  tab = open_page(viewport={'width': 390, 'height': 844}, color_scheme=scheme)
  tab.locator('.part-samples button').first.click()
  tab.wait_for_selector('.best')
  bright = 'sum = text => text.match(/[0-9.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0)'
  ink = tab.evaluate(f"{{ {bright}; sum(getComputedStyle(document.querySelector('.best')).color) }}")
  paper = tab.evaluate(f'{{ {bright}; sum(getComputedStyle(document.body).backgroundColor) }}')
  assert ink - paper > 400 if scheme == 'dark' else paper - ink > 400
  for name in ('Try it', 'The run'):
    tab.get_by_role('tab', name=name).click()
    assert tab.evaluate('document.documentElement.scrollWidth') <= 390
    nameless = """[...document.querySelectorAll('button, input, img, [role=img]')].filter(e => e.checkVisibility() &&
      !(e.innerText || e.alt || e.ariaLabel || e.title || e.labels?.[0]?.innerText || e.querySelector('img[alt]')))
      .map(e => e.outerHTML.slice(0, 200))"""
    assert tab.evaluate(nameless) == []
