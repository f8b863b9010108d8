import numpy as np
import pytest

from googlenet_jax.data import pipeline
from googlenet_jax.data.splits import Split
from googlenet_jax.host.errors import UserError


def split(count):
  images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
  return Split(images, np.arange(count, dtype=np.int32))


def test_every_epoch_is_another_permutation():
  order = pipeline.train_order(40, 8, seed=0)
  epochs = [np.concatenate([order[step] for step in range(start, start + 5)]) for start in (0, 5)]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(40))
  assert (epochs[0] != epochs[1]).any()


def test_every_epoch_leaves_out_other_examples():
  order = pipeline.train_order(10, 4, seed=0)
  left_out = [set(range(10)) - set(np.concatenate([order[2 * e], order[2 * e + 1]]).tolist()) for e in range(6)]
  assert {len(rest) for rest in left_out} == {2}
  assert len({frozenset(rest) for rest in left_out}) > 1


def test_order_is_reproducible_and_depends_on_the_seed():
  first, again, other = (pipeline.train_order(40, 8, seed)[7] for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_the_shares_of_processes_are_disjoint_and_form_the_global_batch():
  whole = pipeline.train_order(40, 8, seed=3)
  shares = [pipeline.train_order(40, 8, 3, process, 4) for process in range(4)]
  for step in (0, 4, 11):
    parts = [share[step] for share in shares]
    assert {len(part) for part in parts} == {2}
    np.testing.assert_array_equal(np.concatenate(parts), whole[step])
    assert len(set(np.concatenate(parts).tolist())) == 8


def test_batches_from_a_later_step_continue_the_stream(mesh_of):
  batches = pipeline.train_batches(split(40), 8, 0, 0, mesh_of(2))
  stream = [next(batches) for _ in range(9)]
  later = next(pipeline.train_batches(split(40), 8, 0, 7, mesh_of(2)))
  np.testing.assert_array_equal(later['label'], stream[7]['label'])
  assert later['image'].dtype == np.uint8
  np.testing.assert_array_equal(later['image'][:, 0, 0, 0], later['label'])
  assert len(later['image'].sharding.device_set) == 2


def test_evaluation_batches_hold_every_image_once(mesh_of):
  batches = list(pipeline.eval_batches(split(19), 8, mesh_of(4)))
  assert [batch['image'].shape for batch in batches] == [(8, 2, 2, 1)] * 3
  seen = np.concatenate([batch['label'] for batch in batches])
  np.testing.assert_array_equal(seen[:19], np.arange(19))
  np.testing.assert_array_equal(seen[19:], 0)


def test_a_batch_larger_than_the_data_is_refused():
  assert pipeline.steps_per_epoch(60_000, 256) == 234
  with pytest.raises(UserError, match='batch_size=11 is larger than the 10'):
    pipeline.steps_per_epoch(10, 11)
