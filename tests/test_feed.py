import types

import jax
import numpy as np
import pytest
from helpers import small_config

from googlenet_jax.classifier import Classifier
from googlenet_jax.data import decoding, pipeline
from googlenet_jax.data.splits import RecordImages, Split
from googlenet_jax.host import sharding
from googlenet_jax.training import feed


@pytest.mark.parametrize(
  ('first', 'last', 'most', 'every', 'ends'),
  [
    (0, 3, 1, [11, 50, 0], [1, 2, 3]),
    (0, 10, 4, [10], [4, 8, 9, 10]),
    (0, 12, 4, [6, 8, 0], [4, 5, 6, 7, 8, 12]),  # ends at 6 and 12, and at 8
    (5, 12, 4, [6], [6, 10, 11, 12]),
    (0, 5, 10, [3, 100], [1, 2, 3, 4, 5]),  # no room for a long call
    (7, 7, 4, [10], []),
  ],
)
def test_calls_end_where_the_loop_has_something_to_do(first, last, most, every, ends):
  assert list(feed.call_ends(first, last, most, every)) == ends


@pytest.mark.parametrize(
  ('last', 'most', 'every', 'length'),
  [
    (1000, 10, [100, 50, 0], 10),
    (1000, 16, [100, 50, 0], 10),  # 16 makes as many calls and leaves single steps
    (1000, 10, [214, 1000, 0], 10),
    (1620, 3, [108, 54, 0], 3),  # fashion_speed: no single steps
    (22, 5, [11, 4, 10], 4),
    (3, 10, [100, 50], 3),
    (1000, 1, [100, 50], 1),
  ],
)
def test_the_length_of_a_call_makes_the_fewest_calls(last, most, every, length):
  assert feed.best_length(last, most, every) == length


def most_steps(config, images, platform='cuda', devices=1, multiply_adds=None):
  """On devices that only have a platform."""
  labels = np.zeros(len(images) if isinstance(images, np.ndarray) else 100, np.int32)
  mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)] * devices), size=devices)
  if multiply_adds is None:
    classes = [str(i) for i in range(10)]
    multiply_adds = Classifier(config, classes, 1, [], sharding.make_mesh(jax.devices()[:1])).multiply_adds
  return feed.most_steps(config, Split(images, labels), multiply_adds, mesh)


SMALL = np.zeros((100, 8, 8, 1), np.uint8)
LARGE = np.broadcast_to(SMALL[:1], (2**25, 8, 8, 1))  # 2 GiB, were it written out


@pytest.mark.parametrize(
  ('changes', 'images', 'platform', 'steps'),
  [
    ({}, SMALL, 'cuda', feed.MOST_STEPS),
    ({}, SMALL, 'tpu', feed.MOST_STEPS),
    ({}, SMALL, 'cpu', 1),
    ({'steps_per_call': 3}, SMALL, 'cpu', 3),
    ({'steps_per_call': 1}, SMALL, 'cuda', 1),
    ({}, LARGE, 'cuda', 1),
    ({'steps_per_call': 3}, LARGE, 'cuda', 1),
    ({}, RecordImages(None, np.arange(100), 'here'), 'cuda', 1),
    ({'image_size': 224, 'batch_size': 4096}, SMALL, 'cuda', 1),  # long steps
  ],
)
def test_several_steps_a_call_are_for_short_steps_and_small_data_sets(changes, images, platform, steps):
  assert most_steps(small_config(**changes), images, platform) == steps


def test_each_device_counts_its_own_work():
  config = small_config(batch_size=64)
  work = feed.CALL_WORK / 3 / 64  # 64 images fill a call
  assert [most_steps(config, SMALL, devices=n, multiply_adds=work) for n in (1, 2, 4, 16)] == [1, 2, 4, feed.MOST_STEPS]


class Step:
  """In the place of a jitted function: compiled, it returns its arguments, and `compiled` lists shapes of batches."""

  def __init__(self):
    self.compiled = []

  def lower(self, state, *arguments):
    self.compiled.append(jax.tree.map(np.shape, arguments))
    return types.SimpleNamespace(compile=lambda: lambda state, *arguments: arguments)


def test_both_ways_train_on_the_same_images():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (43, 2, 2, 1), np.uint8)
  split = Split(images, rng.integers(0, 10, 43).astype(np.int32))
  state = types.SimpleNamespace(step=np.int32(3), seed=np.int32(7))
  mesh = sharding.make_mesh(jax.devices()[:2])
  seen = []
  for steps_per_call in (1, 4):
    config = small_config(batch_size=8, steps_per_call=steps_per_call, log_every_steps=100)
    plan = types.SimpleNamespace(
      config=config,
      dataset=types.SimpleNamespace(train=split),
      mesh=mesh,
      classifier=types.SimpleNamespace(multiply_adds=None),  # the recipe decides
      steps_per_epoch=5,
      last_step=12,
    )
    one, several = Step(), Step()
    batches, ends = [], []
    for end, call, arguments in feed.calls(plan, state, one, several):
      ends.append(end)
      found = jax.device_get(call(state, *arguments))
      if steps_per_call == 1:
        batches += [{name: found[0][name] for name in ('image', 'label', 'index')}]
      else:
        data, indices = found
        batches += [{**{name: a[index] for name, a in data.items()}, 'index': index} for index in indices]
        assert arguments[1].sharding.is_equivalent_to(sharding.cut_steps(mesh), 2)
    seen.append(batches)
    if steps_per_call == 1:
      assert ends == [*range(4, 13)]
      assert len(one.compiled) == 1
      assert not several.compiled
    else:
      assert ends == [4, 5, 9, 10, 11, 12]
      assert sorted(indices for _, indices in several.compiled) == [(1, 8), (4, 8)]
      assert not one.compiled
  assert len(seen[0]) == len(seen[1]) == 9
  for number, (a, b) in enumerate(zip(*seen, strict=True)):
    np.testing.assert_array_equal(a['index'], pipeline.train_indices(3 + number, 43, 8, 7))
    for name in ('image', 'label', 'index'):
      np.testing.assert_array_equal(a[name], b[name])


def test_the_rate_of_decoding_is_that_of_all_threads_and_says_who_waits(monkeypatch):
  monkeypatch.setattr(decoding, 'threads', lambda: 3)
  source = types.SimpleNamespace(__getitems__=lambda i: [{'image': np.zeros((4, 4, 1), np.uint8)}] * len(i))
  images = RecordImages(source, np.arange(9), 'here')
  split = Split(images, np.zeros(9, np.int32))
  assert feed.decoding_speed(split, 4) == {}  # nothing was decoded yet
  images.pace.add(30, 0.5)
  images.pace.add(10, 1.5)
  assert feed.decoding_speed(split, 4) == {'decoded_per_second': pytest.approx(60)}
  assert feed.decoding_speed(split, 4) == {}  # since the last call
  images.pace.add(10, 1)
  monkeypatch.setattr(pipeline, 'PREFETCH_BYTES', 2 * 64)  # two batches: two threads
  assert feed.decoding_speed(split, 4) == {'decoded_per_second': pytest.approx(20)}
  assert feed.decoding_speed(Split(np.zeros((9, 4, 4, 1), np.uint8), split.labels), 4) == {}
  assert feed.bottleneck({'examples_per_second': 55}) == ''
  found = [feed.bottleneck({'decoded_per_second': 60.0, 'examples_per_second': speed}) for speed in (49, 51)]
  assert found == ['decoding keeps up (at most 60 images/s)', 'decoding is the bottleneck (at most 60 images/s)']
