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
import sys
import time
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest
from helpers import random_state, small_config, small_table, write_run
from PIL import Image

from googlenet_jax import loading, runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import datasets
from googlenet_jax.evaluation import report
from googlenet_jax.host import sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet
from googlenet_jax.page import answers, app, live, parts
from googlenet_jax.page.live import LiveRun

MOST_BYTES = 300_000  # of an upload, here


@pytest.fixture(autouse=True, scope='module')
def small_machine():
  """A small network, one device, and a page that takes small files only."""
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.local_devices()[:1]
    patch.setattr(jax, 'local_devices', lambda: devices)
    patch.setattr(googlenet, 'TABLE', small_table())
    patch.setattr(app, 'MOST_BYTES', MOST_BYTES)
    patch.setattr(live, 'LOOK_SECONDS', 0.1)
    yield


def wait_for(what, seconds=60.0):
  """Waits until `what()` is true, and returns it."""
  end = time.monotonic() + seconds
  while not (found := what()):
    assert time.monotonic() < end, 'it did not happen'
    time.sleep(0.02)
  return found


def free_port():
  with socket.socket() as trial:
    trial.bind(('127.0.0.1', 0))
    return trial.getsockname()[1]


@pytest.fixture(scope='module')
def config():
  return small_config(image_size=49)  # its maps have 3x3 cells


def write_digits(workdir, config, *saves):
  """Writes a run with the classes of the digits, so its test images are found."""
  write_run(workdir, config, *saves)
  runs.write(workdir, runs.Run(config, tuple('0123456789'), (8, 8, 1)))
  return workdir


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory):
  folder = write_digits(tmp_path_factory.mktemp('runs') / 'of <b>', config, (7, random_state(config), 0.5, True))
  numbers = {name: 0.5 for name, kind in runs.RECORD.items() if kind is float}
  records = [{**numbers, 'step': step, 'epoch': step / 10, 'split': 'train', 'loss': 2.0 / step} for step in (1, 2, 3)]
  with (folder / runs.METRICS).open('a') as file:
    file.writelines(json.dumps(record) + '\n' for record in records)
  return folder


@pytest.fixture(scope='module')
def classifier(workdir):
  return loading.load(workdir)


@contextlib.contextmanager
def served(run):
  """Serves a page, and leaves nothing behind: Gradio does not close the event loops that it makes."""
  loops, new = [], asyncio.new_event_loop
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(asyncio, 'new_event_loop', lambda: loops.append(new()) or loops[-1])
    found = app.Page([run], free_port())
  yield found
  found.close()
  assert not found.uploads.exists()
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


# Answers --------------------------------------------------------------------------------------------------------------


def test_an_answer_has_likeliest_classes_their_maps_and_what_the_network_sees(classifier, digits):
  found = answers.answer(classifier, digits[0])
  expected = classifier.probabilities(digits[0])
  assert found.names == tuple(classifier.classes[label] for label in np.argsort(-expected)[: answers.TOP])
  np.testing.assert_allclose(found.probabilities, np.sort(expected)[::-1][: answers.TOP], atol=1e-5)
  np.testing.assert_allclose(found.prepared, classifier.prepared(digits[0]), atol=1e-6)
  assert [one.shape for one in found.maps] == [(160, 160, 3)] * answers.TOP
  html = answers.html_of(found, 'classes 0', found.names[0])
  assert html.count('type=radio') == html.count('class="map ') == answers.TOP
  assert 'the answer is <b>right</b>' in html


@pytest.mark.parametrize(
  ('head', 'why'), [('average_pool', 'a single cell'), ('fully_connected', 'fully connected head')]
)
def test_a_network_without_maps_says_so(head, why, digits, monkeypatch):
  config = small_config()
  state, mesh = random_state(config), sharding.make_mesh(jax.devices()[:1])
  classifier = Classifier(config, tuple('abcdefghij'), 1, [(state.params, state.batch_stats)], mesh)
  monkeypatch.setattr(Classifier, 'tells_places', False)
  classifier.recipe.model.head = head
  html = answers.html_of(answers.answer(classifier, digits[0]), 'classes 0')
  assert why in html
  assert 'radio' not in html
  assert html.count('class=track') == answers.TOP


def test_names_are_never_markup():
  found = answers.Answer(('<script>', '&lt;'), np.array([0.7, 0.3]), np.zeros((4, 4, 1)), (), 'no <maps>')
  html = answers.html_of(found, 'x', '"<i>')
  assert not re.search('<script|<maps|<i>', html)
  assert '&amp;lt;' in html
  assert '<img' not in answers.trouble('<img src=x>')


@pytest.mark.parametrize(('channels', 'given'), [(1, 3), (3, 1), (1, 1)])
def test_a_picture_of_another_data_set_gets_the_channels_of_the_network(channels, given):
  picture = np.full((2, 3, given), 77, np.uint8)
  classifier = Classifier.__new__(Classifier)
  classifier.channels = channels
  np.testing.assert_array_equal(answers.recoloured(picture, classifier), np.full((2, 3, channels), 77))


# Runs that change -----------------------------------------------------------------------------------------------------


def test_a_run_is_shown_before_its_first_checkpoint_and_follows_later_ones(config, tmp_path):
  workdir, state = tmp_path / 'young', random_state(config)
  run = LiveRun(write_digits(workdir, config))
  assert run.known.note == live.NO_CHECKPOINT
  assert live.NO_CHECKPOINT in run.answer(lambda _: None, 'x', False)
  run.start()
  wait_for(lambda: run.known.parts.get('layers'))
  assert run.known.parts['matrix'] == run.known.parts['samples'] == ''
  write_digits(workdir, config, (1, state, None, True))
  wait_for(lambda: run.known.parts['matrix'])  # by itself
  assert run.known.classifier.steps == [1]
  write_digits(workdir, config, (2, random_state(config, 1), None, True))
  assert run.known.classifier.steps == [1]
  run.look()  # as somebody who reloads the page does
  first = wait_for(lambda: run.known.subject.results)
  wait_for(lambda: run.known.classifier.steps == [2] and run.known.subject.results not in (None, first))
  run.close()


def test_a_page_lives_on_without_the_data_and_with_a_broken_checkpoint(config, tmp_path, monkeypatch):
  workdir = write_digits(tmp_path / 'run', config, (1, random_state(config), None, True))
  monkeypatch.setattr(datasets, 'load', lambda **_: (_ for _ in ()).throw(UserError('the disk is away')))
  run = LiveRun(workdir)
  run.start()
  wait_for(lambda: 'the disk is away' in run.known.note)
  assert run.known.parts['layers']
  (workdir / 'checkpoints' / '5').mkdir()
  run.look()
  run.close()
  assert run.known.classifier.steps == [1]


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match='holds no run'):
    LiveRun(tmp_path)


def test_a_cell_that_does_not_exist_opens_nothing(page):
  found = page.runs[0].known.subject.results
  assert [parts.cell(found, place) for place in ('', '1', '1,99', 'a,b', '1,2,3', '-1,0')] == [''] * 6


# Addresses and packages -----------------------------------------------------------------------------------------------


def test_a_port_in_use_is_answered_with_a_free_one():
  with socket.socket() as other:
    other.bind(('127.0.0.1', 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(UserError, match=rf'^port {port} cannot be used .*: give another one, such as --port=\d+$') as e:
      app.serve(None, port=port)
  app.check_address('127.0.0.1', int(str(e.value).rpartition('=')[2]))


def test_an_address_of_another_machine_is_refused():
  with pytest.raises(UserError, match='^--host=192.0.2.7: this machine cannot listen there'):
    app.check_address('192.0.2.7', free_port())


def test_only_this_machine_can_reach_a_loopback_address():
  assert [app.is_of_this_machine(host) for host in ('127.0.0.1', '127.1.2.3', '::1', 'localhost')] == [True] * 4
  assert [app.is_of_this_machine(host) for host in ('0.0.0.0', '::', '10.0.0.1', 'node1')] == [False] * 4


def test_without_gradio_there_is_a_line(workdir, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gradio', None)
  with pytest.raises(UserError, match=r"needs the package gradio: pip install -e '.\[page\]'"):
    app.Page([LiveRun(workdir)], free_port())


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


def upload(page, content):
  """Sends a file without asking for an answer; returns the status, and the path that the server gave it."""
  host = page.address.removeprefix('http://')
  connection = http.client.HTTPConnection(host)
  head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
  kind = {'Content-Type': 'multipart/form-data; boundary=x'}
  connection.request('POST', '/gradio_api/upload', head + content + b'\r\n--x--\r\n', kind)
  answer = connection.getresponse()
  found = answer.status, answer.read()
  connection.close()
  return found


def test_a_file_above_the_limit_is_refused(page):
  status, text = upload(page, bytes(MOST_BYTES + 1))
  assert status == 413
  assert b'maximum allowed size' in text
  assert upload(page, bytes(10))[0] == 200


def test_nobody_reads_files_of_this_machine(page, workdir):
  own = (workdir / runs.FILE, __file__, '/etc/passwd')
  assert [get(page, f'/gradio_api/file={urllib.request.pathname2url(str(path))}') for path in own] == [403] * 3
  with pytest.raises(RuntimeError, match='event: error'):
    predict(page, {'path': '/etc/passwd', 'meta': {'_type': 'gradio.FileData'}})


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


def test_nothing_is_kept(workdir, monkeypatch):
  monkeypatch.setattr(app, 'KEPT_SECONDS', 4)
  with served(LiveRun(workdir)) as page:
    status, path = upload(page, b'a picture')
    assert status == 200
    files = lambda: [path for path in page.uploads.rglob('*') if path.is_file()]
    assert [str(file) for file in files()] == json.loads(path)
    wait_for(lambda: not files())
    upload(page, b'another picture')  # which goes at the end


def test_a_file_of_weights_has_the_first_tab_only(classifier, digits, tmp_path, monkeypatch):
  (tmp_path / 'weights.pth').touch()
  monkeypatch.setattr(loading, 'load', lambda *_: classifier)
  run = LiveRun(tmp_path / 'weights.pth')
  assert best_of(run.answer(lambda _: digits[0], 'x', True)) == classifier.predict(digits[0]).name
  with served(run) as page, urllib.request.urlopen(f'{page.address}/config') as answer:
    components = json.load(answer)['components']
  assert [one['props']['label'] for one in components if one['type'] == 'tabitem'] == ['Try it']


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
  # A test image.
  tab.locator('.part-samples button').first.click()
  tab.wait_for_selector('.best')
  assert 'the answer is right' in tab.inner_text('.truth')
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
  with (workdir / runs.METRICS).open('a') as file:
    record = runs.records(workdir)[-1]
    file.write(json.dumps({**record, 'step': 9, 'epoch': 0.9, 'loss': 0.125}) + '\n')
  tab.wait_for_selector('.part-curves svg[aria-label*="train ends at 0.125"]')  # without a reload
  assert label == other
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
