"""The page of `--mode=page` without its server: answers, runs that change, pictures that were sent, addresses."""

import os
import re
import shutil
import signal
import socket
import sys
import threading

import jax
import numpy as np
import pytest
from helpers import random_state, small_config
from page_helpers import small_machine, wait_for, write_digits

from googlenet_jax import ending, loading
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import datasets
from googlenet_jax.host import sharding, signals
from googlenet_jax.host.errors import UserError
from googlenet_jax.page import addresses, answers, app, guard, live, sections, subject, uploads
from googlenet_jax.page.live import LiveRun
from googlenet_jax.page.subject import NO_DATA
from googlenet_jax.page.uploads import Uploads


@pytest.fixture(autouse=True, scope='module')
def machine():
  with small_machine():
    yield


@pytest.fixture(scope='module')
def config():
  return small_config(image_size=49)  # its maps have 3x3 cells


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory):
  return write_digits(tmp_path_factory.mktemp('runs') / 'run', config, (7, random_state(config), None, True))


@pytest.fixture(scope='module')
def classifier(workdir):
  return loading.load(workdir)


@pytest.fixture(scope='module')
def digits():
  return datasets.load('digits').test.images


def free_port():
  with socket.socket() as trial:
    trial.bind(('127.0.0.1', 0))
    return trial.getsockname()[1]


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
  shutil.rmtree(workdir)
  assert 'is not there any more' in sections.curves(run.known.subject)
  other = small_config(**{'model.pool': 'torchvision'})  # in the same place, with the same step
  write_digits(workdir, other, (2, random_state(other), None, True))
  run.look()
  wait_for(lambda: run.known.classifier.recipe.model.pool == 'torchvision')
  before = wait_for(lambda: run.known.subject.results)
  shutil.rmtree(workdir)
  write_digits(workdir, other, (2, random_state(other, 1), None, True))  # it differs in its weights only
  run.look()
  wait_for(lambda: run.known.subject.results not in (None, before))
  run.close()


def test_a_page_lives_on_without_the_data_and_with_a_broken_checkpoint(config, tmp_path, monkeypatch, capfd):
  workdir = write_digits(tmp_path / 'run', config, (1, random_state(config), None, True))
  monkeypatch.setattr(datasets, 'load', lambda **_: (_ for _ in ()).throw(UserError('the disk is away')))
  run = LiveRun(workdir)
  run.start()
  wait_for(lambda: run.known.note == NO_DATA)
  assert 'the disk is away' in capfd.readouterr().out  # and not on the page, which others may see
  assert run.known.parts['layers']
  (workdir / 'checkpoints' / '5').mkdir()
  run.look()
  run.close()
  assert run.known.classifier.steps == [1]
  assert run.known.note in (NO_DATA, live.TROUBLE)


def test_where_images_are_now_is_for_another_run_on_the_same_images_too(config, workdir, tmp_path):
  other = write_digits(tmp_path / 'other', config)
  data = {'source_dir': str(tmp_path)}
  assert subject.of_both(data, workdir, other) == data
  config = small_config(**{'data.source_dir': '/elsewhere'})
  write_digits(tmp_path / 'third', config)
  (tmp_path / 'weights.pth').touch()
  assert [subject.of_both(data, workdir, tmp_path / name) for name in ('third', 'weights.pth')] == [None, None]


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match='holds no run'):
    LiveRun(tmp_path)


# Pictures that were sent ----------------------------------------------------------------------------------------------


@pytest.fixture
def sent():
  found = Uploads()
  yield found
  found.forget()


def test_an_answer_reads_files_of_the_folder_only(sent, tmp_path):
  own, other = sent.folder / 'a' / 'own.png', tmp_path / 'other.png'
  own.parent.mkdir()
  own.touch()
  other.touch()
  (sent.folder / 'link.png').symlink_to(other)
  assert sent.find({'path': str(own), 'orig_name': 'mine.png'}) == (own, 'mine.png')
  assert sent.find({'path': str(own), 'orig_name': 7}) == (own, '')
  paths = [other, sent.folder, sent.folder / 'link.png', sent.folder / '..' / 'x', sent.folder / 'none', '/dev/zero']
  odd = [{'path': path} for path in (*map(str, paths), None, 7, '', 'own.png', 'a\0b', 'x' * 9999)]
  for one in (*odd, {}, str(own), 7, [own]):
    with pytest.raises(UserError, match='^This picture is not here'):
      sent.find(one)


def test_all_uploads_together_have_a_bound(sent, monkeypatch):
  monkeypatch.setattr(uploads, 'ROOM', 10 * uploads.FILE_BYTES)
  for number in range(4):  # small ones count, too
    (sent.folder / str(number)).touch()
  half = 5 * uploads.FILE_BYTES
  assert sent.begin(half)
  assert not sent.begin(half)  # the first may still come
  sent.end(half)
  assert sent.begin(half)
  sent.forget()
  assert not sent.begin(1)


def test_a_second_signal_does_not_disturb_the_deleting(sent, monkeypatch, capfd):
  before, delete, statuses = signal.signal(signal.SIGTERM, signals.interrupt), uploads.shutil.rmtree, []

  def interrupted(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    delete(*arguments, **options)

  monkeypatch.setattr(uploads.shutil, 'rmtree', interrupted)
  monkeypatch.setattr(signals, 'farewell', lambda: app._forget(sent))
  monkeypatch.setattr(os, '_exit', statuses.append)
  try:
    ending.after_signal(None, signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signals.interrupt
  finally:
    monkeypatch.undo()
    signal.signal(signal.SIGTERM, before)
  assert not sent.folder.exists()
  assert statuses == [143]
  assert capfd.readouterr().err == 'The page has ended; pictures that were sent to it are deleted.\n'


def test_threads_may_delete_at_the_same_time(sent):
  for number in range(200):
    (sent.folder / f'{number}.png').touch()
  threads = [threading.Thread(target=sent.forget) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
    assert not sent.folder.exists()


# Addresses and packages -----------------------------------------------------------------------------------------------


def test_a_port_in_use_is_answered_with_a_free_one():
  with socket.socket() as other:
    other.bind(('127.0.0.1', 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(UserError, match=rf'^port {port} cannot be used .*: give another one, such as --port=\d+$') as e:
      app.serve(None, port=port)
  addresses.check('127.0.0.1', int(str(e.value).rpartition('=')[2]))


def test_an_address_of_another_machine_is_refused():
  with pytest.raises(UserError, match='^--host=192.0.2.7: this machine cannot listen there'):
    addresses.check('192.0.2.7', free_port())


def test_only_this_machine_can_reach_a_loopback_address():
  assert [addresses.is_of_this_machine(host) for host in ('127.0.0.1', '127.1.2.3', '::1', 'localhost')] == [True] * 4
  assert [addresses.is_of_this_machine(host) for host in ('0.0.0.0', '::', '10.0.0.1', 'node1')] == [False] * 4


def test_names_of_this_machine():
  ours = b'127.0.0.1', b'127.0.0.1:7860', b'localhost:1', b'LOCALHOST', b'[::1]:7860', b'127.1.2.3'
  others = (
    b'',
    b'evil.example',
    b'evil.example:7860',
    b'127.0.0.1.evil.example',
    b'localhost.evil',
    b'[::1',
    b'0.0.0.0',
  )
  odd = b'127.0.0.1@evil.example', b'10.0.0.1', b'\xff'
  assert [*map(guard._is_here, ours)] == [True] * len(ours)
  assert [*map(guard._is_here, (*others, *odd))] == [False] * len(others + odd)


def test_without_gradio_there_is_a_line(workdir, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gradio', None)
  with pytest.raises(UserError, match=r"needs the package gradio: pip install -e '.\[page\]'"):
    app.serve(workdir, port=free_port())
