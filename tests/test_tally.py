"""What the loop counts between two log points, and how it ends where a loss is not finite."""

import json

import numpy as np
import pytest
from helpers import small_config

from googlenet_jax.data import datasets
from googlenet_jax.data.pipeline import train_indices
from googlenet_jax.data.splits import Split
from googlenet_jax.host.errors import UserError
from googlenet_jax.training import optimizers, tally
from googlenet_jax.training.metrics import Metrics
from googlenet_jax.training.plan import Plan

BATCH, STEPS = 16, 10  # steps in an epoch
LOW = (
  'Lower --config.learning_rate, or set --config.clip_norm=1, in a new --workdir; if only single batches are bad, '
  'leave them out with'
)


@pytest.fixture
def make(tmp_path):
  """`make(files, changes)`: the counts of a run that has not begun."""

  def make(files=None, **changes):
    config = small_config(batch_size=BATCH, learning_rate=0.5, decay_epochs=1, epochs=5, **changes)
    split = Split(np.zeros((BATCH * STEPS, 8, 8, 1), np.uint8), np.zeros(BATCH * STEPS, np.int32), None, files)
    dataset = datasets.Dataset('set', split, None, split, ('a',), (8, 8, 1))
    schedule = optimizers.learning_rate_schedule(config, STEPS)
    plan = Plan(config, tmp_path, dataset, None, None, None, STEPS, 5 * STEPS, schedule, None)
    counts = tally.Tally(plan, tally.new_meta(config), 3, lambda: 'Last good checkpoint: there')
    counts.watch.start()
    return counts

  return make


def of_step(number, loss=None, **more):
  return Metrics({'loss': np.float32(number if loss is None else loss), **more}, np.int32(number % 3), np.int32(BATCH))


def skipped():
  """An update that `skip_nonfinite` left out."""
  return Metrics({'loss': np.float32(0)}, np.int32(0), np.int32(0), np.int32(1))


def log_point(counts, *steps, step):
  for one in steps:
    counts.add(one)
  return counts.log_point(step)


def test_the_first_step_whose_loss_is_not_finite_is_named_with_its_rate_and_images(make, tmp_path):
  counts, fine = make(), [of_step(number) for number in (9, 10)]
  with pytest.raises(UserError) as error:
    log_point(counts, *fine, of_step(11, np.nan), of_step(12, np.inf), of_step(13), step=13)
  images = train_indices(10, BATCH * STEPS, BATCH, 3).tolist()
  assert str(error.value) == (
    f'step 11: the loss is not finite, at a learning rate of 0.48. Its batch has the training images '
    f'{", ".join(map(str, images[:5]))}, ... (all of them: {tmp_path}/diverged.json). {LOW} --config.skip_nonfinite. '
    'Last good checkpoint: there'
  )
  assert json.loads((tmp_path / 'diverged.json').read_text()) == {
    'step': 11, 'learning_rate': pytest.approx(0.48), 'images': images
  }  # fmt: skip
  with pytest.raises(UserError, match='^step 10: the loss is not finite, at a learning rate of 0.5. '):
    log_point(make(), of_step(9), of_step(10, -np.inf), of_step(11, np.nan), step=11)


def test_weights_that_the_last_update_made_infinite_are_told_like_a_loss(make, tmp_path):
  counts = make()
  counts.check_weights(11, [{'kernel': np.ones(3)}])
  with pytest.raises(UserError, match='^step 11: its update makes weights that are not finite, .* checkpoint: there$'):
    counts.check_weights(11, [{'kernel': np.ones(3)}, {'kernel': np.array([1, np.inf])}])
  assert json.loads((tmp_path / 'diverged.json').read_text())['step'] == 11


def test_weights_that_became_infinite_though_bad_updates_are_left_out_are_no_fault_of_one_batch(make, tmp_path):
  counts = make(skip_nonfinite=True)
  log_point(counts, of_step(1), skipped(), skipped(), step=3)
  with pytest.raises(UserError) as error:
    counts.check_weights(3, [{'kernel': np.array([1, np.nan])}])
  assert str(error.value) == (
    'step 3: the weights are not finite, at a learning rate of 0.5; not saved. Updates left out so far: 2. '
    'Lower --config.learning_rate, in a new --workdir. Last good checkpoint: there'
  )
  assert not (tmp_path / 'diverged.json').exists()


@pytest.mark.parametrize('name', ['loss', 'total', 'aux_4a'])
def test_every_part_of_the_loss_must_be_finite_and_files_are_named(name, make, tmp_path):
  counts = make(np.array([f'f{number}.png' for number in range(BATCH * STEPS)]))
  bad = of_step(2, total=9.0, aux_4a=6.0)
  bad.losses[name] = np.float32(np.inf)
  first = train_indices(1, BATCH * STEPS, BATCH, 3)[0]
  with pytest.raises(UserError, match=f'step 2: .* images f{first}.png, '):
    log_point(counts, of_step(1, total=9.0, aux_4a=6.0), bad, step=2)
  assert json.loads((tmp_path / 'diverged.json').read_text())['files'][0] == f'f{first}.png'


def test_metrics_are_added_since_the_log_point_and_since_the_epoch_began(make):
  counts, steps, seen = make(), [of_step(number) for number in range(1, 25)], 0
  for first, last, began in ((1, 4, 1), (5, 10, 1), (11, 14, 11), (15, 23, 21)):
    assert not counts.is_ahead_of_log()
    record = log_point(counts, *steps[first - 1 : last], step=last)
    count = BATCH * (last - first + 1)
    assert record['loss'] == sum(range(first, last + 1)) / count
    assert (record['step'], record['epoch'], record['split']) == (last, last / STEPS, 'train')
    numbers = range(began, last + 1)
    epoch = Metrics({'loss': float(sum(numbers))}, sum(number % 3 for number in numbers), BATCH * len(numbers))
    assert counts.epoch == epoch
    assert Metrics(**json.loads(json.dumps(counts.meta))['epoch_sums']) == epoch  # a resumed run goes on from there
    seen += count
    assert counts.meta['train_examples'] == seen
    counts.watch.start()


def test_updates_that_are_left_out_are_counted_and_change_no_mean(make):
  counts = make(skip_nonfinite=True)
  record = log_point(counts, of_step(1), skipped(), of_step(3), step=3)
  assert (record['loss'], counts.meta['skipped_updates']) == (4 / (2 * BATCH), 1)
  counts.watch.start()
  assert log_point(counts, skipped(), step=4) is None  # no mean to log
  assert counts.meta['skipped_updates'] == counts.epoch.skipped == 2
  assert tally.epoch_line(1.0, counts.epoch, {}) == (
    'epoch 1: train loss 0.125, acc 0.0312; 2 updates were not finite and are left out'
  )


def test_an_epoch_whose_updates_are_all_left_out_ends_the_run(make):
  with pytest.raises(UserError, match=r'^step 10: no update of this epoch .* Lower .*Last good checkpoint: there$'):
    log_point(make(), *[skipped()] * STEPS, step=10)


@pytest.mark.parametrize(
  ('accuracies', 'count'),
  [
    ({}, 0),
    ({10: 0.5}, 0),
    ({10: 0.5, 20: 0.4}, 1),
    ({10: 0.5, 20: 0.5, 30: 0.4}, 2),  # as good is not better
    ({10: 0.5, 20: 0.4, 30: 0.6}, 0),
    ({10: 0.6, 30: 0.5, 45: 0.4}, 3),  # evaluated now and then
  ],
)
def test_early_stopping_counts_epochs_without_a_better_accuracy(accuracies, count, make):
  for patience in range(5):
    plan = make(early_stopping=patience).plan
    assert plan.epochs_without_better(accuracies) == count
    assert plan.stops_early(accuracies) == (0 < patience <= count)
