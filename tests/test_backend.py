import contextlib
import sys

import jax
import numpy as np
import pytest
from helpers import call_main, random_state, small_config

import googlenet_jax
from googlenet_jax import classifier
from googlenet_jax.host import backend, sharding
from googlenet_jax.host.errors import UserError

OTHERS = {
  'jax_default_prng_impl': 'rbg',
  'jax_disable_jit': True,
  'jax_enable_x64': True,
  'jax_legacy_prng_key': 'error',
  'jax_no_execution': True,
  'jax_no_tracing': True,
  'jax_numpy_dtype_promotion': 'strict',
  'jax_numpy_rank_promotion': 'raise',
  'jax_threefry_partitionable': False,
  'jax_transfer_guard_device_to_device': 'disallow',
  'jax_transfer_guard_device_to_host': 'disallow',
  'jax_transfer_guard_host_to_device': 'disallow',
  'jax_custom_vjp3': True,
  'jax_error_checking_behavior_divide': 'raise',
  'jax_error_checking_behavior_nan': 'raise',
  'jax_error_checking_behavior_oob': 'raise',
  'jax_random_seed_offset': 3,
  'jax_refs_to_pins': True,
  'jax_remat3': True,
  'jax_scan3': True,
}


@pytest.fixture
def settings():
  """`settings(name, value)` changes a setting of JAX until the end of the test."""
  before = {name: getattr(jax.config, name) for name in OTHERS}
  yield jax.config.update
  for name, value in before.items():
    jax.config.update(name, value)


def test_a_run_has_our_settings_and_says_so(settings, capsys):
  assert OTHERS.keys() == {*backend.OURS, *backend.EVERYWHERE}
  with backend.our_settings_everywhere():
    assert capsys.readouterr().err == ''
  for name, value in OTHERS.items():
    settings(name, value)
  with backend.our_settings_everywhere():
    for name, value in {**backend.OURS, **backend.EVERYWHERE}.items():
      assert getattr(jax.config, name) == value, name
  for name, value in OTHERS.items():
    assert getattr(jax.config, name) == value, name
  told = capsys.readouterr().err
  begin = 'note: a training does not follow these settings of JAX: jax_default_prng_impl=rbg, jax_disable_jit=True, '
  assert told.startswith(begin)
  assert 'jax_random_seed_offset=3, ' in told
  assert told.endswith('jax_scan3=True\n')


def test_two_trainings_in_threads_have_our_settings_to_their_ends(settings):
  settings('jax_numpy_rank_promotion', 'raise')
  with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
    first.enter_context(backend.our_settings_everywhere())
    second.enter_context(backend.our_settings_everywhere())
    first.close()
    assert jax.config.jax_numpy_rank_promotion == 'allow'
  assert jax.config.jax_numpy_rank_promotion == 'raise'


def test_a_classifier_answers_the_same_under_any_settings(settings, small_network):
  config = small_config()
  state, images = random_state(config), np.arange(2 * 20 * 24, dtype=np.uint8).reshape(2, 20, 24, 1)
  mesh = sharding.make_mesh(jax.devices()[:1])

  def answers():
    network = classifier.Classifier(config, 'abcdefghij', 1, [(state.params, state.batch_stats)], mesh)
    return network.features(images, next(iter(network.stages)))  # the first stage: it compiles soon

  before = answers()
  for name in backend.OURS:
    settings(name, OTHERS[name])
  np.testing.assert_array_equal(answers(), before)


SET = " (set JAX_PLATFORMS='' to automatically choose an available backend)"


@pytest.mark.parametrize(
  ('error', 'says'),
  [
    (AssertionError(), 'JAX cannot start: there is no such platform. Platforms present are: a, b'),
    (
      RuntimeError(
        f"Unable to initialize backend 'rocm': Backend 'rocm' is not in the list of known backends: ['cpu'].{SET}"
      ),
      'JAX cannot start: there is no such platform. Platforms present are: a, b',
    ),
    (
      RuntimeError(f"Unable to initialize backend 'tpu': no libtpu.so{SET}"),
      "JAX cannot start: Unable to initialize backend 'tpu': no libtpu.so. Platforms present are: a, b",
    ),
    (RuntimeError('no gpu. Platforms present are: cpu'), 'JAX cannot start: no gpu. Platforms present are: cpu'),
  ],
)
def test_a_backend_that_cannot_start_is_one_line(error, says, monkeypatch):
  def devices():
    raise error

  monkeypatch.setattr(jax, 'devices', devices)
  monkeypatch.setattr(backend.backend, 'backends', lambda: {'a': 1, 'b': 2})
  cleared = []
  monkeypatch.setattr(backend.backend, 'clear_backends', lambda: cleared.append(1))
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  whole = f'{says}; JAX_PLATFORMS=cuda in the environment asks for something else: leave it out'
  for start in (backend.start, lambda: googlenet_jax.load('x')):
    with pytest.raises(UserError) as caught:
      start()
    assert str(caught.value) == whole
  assert call_main('--mode=inspect', '--config=configs/digits.py').err == f'error: {whole}\n'
  assert len(cleared) == (3 if says.endswith('a, b') else 0)
  assert jax.config.jax_platforms == 'cpu'


def test_jax_that_cannot_be_imported_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, 'jax', None)
  assert call_main('--mode=predict', 'x').err.startswith('error: JAX cannot be imported: import of jax halted')
