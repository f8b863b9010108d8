import numpy as np
import pytest

from googlenet_jax.data import decoding, pipeline
from googlenet_jax.data.splits import Pace, Split
from googlenet_jax.host import processes
from googlenet_jax.host.errors import UserError


def split(count):
  images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
  return Split(images, np.arange(count, dtype=np.int32))


def order(steps, examples, batch_size, seed=0):
  return np.concatenate([pipeline.train_indices(step, examples, batch_size, seed) for step in steps])


def test_every_epoch_is_another_permutation():
  epochs = [order(range(start, start + 5), 40, 8) for start in (0, 5)]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(40))
  assert (epochs[0] != epochs[1]).any()


def test_every_epoch_leaves_out_other_examples():
  left_out = [set(range(10)) - set(order([2 * e, 2 * e + 1], 10, 4).tolist()) for e in range(6)]
  assert {len(rest) for rest in left_out} == {2}
  assert len({frozenset(rest) for rest in left_out}) > 1


def test_the_order_depends_on_the_seed_and_the_epoch_only():
  np.testing.assert_array_equal(order([0], 10, 10, seed=0), [0, 2, 9, 1, 8, 5, 4, 3, 6, 7])  # the same for ever
  orders = [tuple(order([step], 40, 40, seed)) for seed in (0, 1, 2) for step in (0, 1, 2)]
  assert len(set(orders)) == 9


def test_every_example_is_first_equally_often():
  first = [pipeline.train_indices(10 * epoch, 10, 1, 5)[0] for epoch in range(2000)]
  np.testing.assert_allclose(np.bincount(first, minlength=10), 200, atol=60)


def test_the_shares_of_processes_form_the_global_batch(monkeypatch):
  whole = pipeline.train_indices(4, 40, 8, seed=3)
  monkeypatch.setattr(processes, 'count', lambda: 4)
  shares = []
  for process in range(4):
    monkeypatch.setattr(processes, 'index', lambda process=process: process)
    shares.append(pipeline.my_share(whole))
  assert {len(share) for share in shares} == {2}
  np.testing.assert_array_equal(np.concatenate(shares), whole)


def test_batches_from_a_later_step_continue_the_stream(mesh_of):
  batches = pipeline.train_batches(split(40), 8, 0, 0, mesh_of(2))
  stream = [next(batches) for _ in range(9)]
  later = next(pipeline.train_batches(split(40), 8, 0, 7, mesh_of(2)))
  np.testing.assert_array_equal(later['label'], stream[7]['label'])
  assert later['image'].dtype == np.uint8
  np.testing.assert_array_equal(later['image'][:, 0, 0, 0], later['label'])
  np.testing.assert_array_equal(later['index'], later['label'])
  assert len(later['image'].sharding.device_set) == 2


def test_evaluation_batches_hold_every_image_once(mesh_of):
  batches = list(pipeline.eval_batches(split(19), 8, mesh_of(4)))
  assert [batch['image'].shape for batch in batches] == [(8, 2, 2, 1)] * 3
  seen = np.concatenate([batch['label'] for batch in batches])
  np.testing.assert_array_equal(seen[:19], np.arange(19))
  np.testing.assert_array_equal(seen[19:], 0)


class OnDisk:
  """Images that are decoded on demand, 3000 bytes each."""

  def fetch(self, indices):
    return np.zeros((len(indices), 10, 100, 3), np.uint8) + indices[:, None, None, None].astype(np.uint8), None

  def __getitem__(self, indices):
    return self.fetch(indices)[0]

  pace = Pace()


@pytest.mark.parametrize(
  ('in_memory', 'most', 'expected'),
  [
    (False, 24_000 * 99, (16, 16)),
    (False, 24_000 * 6 - 1, (5, 5)),  # a batch has 8 images
    (False, 10, (1, 1)),  # one batch is always prepared
    (True, 10**9, (1, 4)),
    (True, 2 * 32, (1, 2)),
  ],
)
def test_batches_prepared_ahead_are_bounded_in_bytes(monkeypatch, mesh_of, in_memory, most, expected):
  monkeypatch.setattr(decoding, 'threads', lambda: 16)
  monkeypatch.setattr(pipeline, 'PREFETCH_BYTES', most)
  data = split(40) if in_memory else Split(OnDisk(), np.arange(40, dtype=np.int32))
  assert pipeline.ahead(data, 8) == expected
  batches = pipeline.train_batches(data, 8, 3, 1, mesh_of(2))
  for step, batch in zip(range(1, 4), batches, strict=False):
    np.testing.assert_array_equal(batch['label'], pipeline.train_indices(step, 40, 8, 3))
    np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])


def test_a_batch_larger_than_the_data_is_refused():
  assert pipeline.steps_per_epoch(60_000, 256) == 234
  with pytest.raises(UserError, match='batch_size=11 is larger than the 10'):
    pipeline.steps_per_epoch(10, 11)
