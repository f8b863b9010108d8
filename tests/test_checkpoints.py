import concurrent.futures
import os
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from googlenet_jax.host import checkpoints, damage, turns
from googlenet_jax.host.errors import UserError
from googlenet_jax.training import state


@pytest.fixture(autouse=True)
def no_other_runs(monkeypatch):
  """A run saves in another way while there are others, and earlier tests may leave some."""
  monkeypatch.setattr(turns, '_savers', weakref.WeakSet())


def tree(value):
  return {'weights': jax.random.uniform(jax.random.key(0), (100, 100)) + value, 'step': jnp.int32(7)}


def items(value):
  return {'network': tree(value), 'training': tree(-value)}


def abstract():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree(0.0))


def filled(tmp_path, accuracies):
  known = {}
  saved = checkpoints.Checkpoints(tmp_path, known)
  for step, accuracy in enumerate(accuracies, start=1):
    saved.save(step, items(float(step)), {'note': step})
    if accuracy is not None:  # as in training: known after the save
      known[step] = accuracy
  saved.wait()
  return saved


def test_what_was_saved_comes_back(tmp_path):
  saved = filled(tmp_path, [None])
  found, meta = saved.restore({'network': abstract(), 'training': abstract()}, 1)
  assert meta == {'note': 1}
  np.testing.assert_array_equal(found['network']['weights'], tree(1.0)['weights'])
  np.testing.assert_array_equal(found['training']['weights'], tree(-1.0)['weights'])
  found, _ = saved.restore({'training': abstract()}, 1)  # one item without the other
  assert list(found) == ['training']
  np.testing.assert_array_equal(found['training']['weights'], tree(-1.0)['weights'])
  saved.close()


def test_runs_that_save_at_the_same_time_lose_nothing(tmp_path):
  def one(run):
    saved = checkpoints.Checkpoints(tmp_path / str(run))
    for step in range(1, 7):
      saved.save(step, items(float(step + run)), {'run': run})
    saved.wait()
    found, meta = saved.restore({'network': abstract()}, 6)
    saved.close()
    return meta['run'], found['network']['weights']

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for run, (found, weights) in enumerate(pool.map(one, range(4))):
      assert found == run
      np.testing.assert_array_equal(weights, tree(6.0 + run)['weights'])


def test_the_newest_two_and_the_best_are_kept(tmp_path):
  saved = filled(tmp_path, [0.5, 0.9, 0.7, 0.6, 0.1])
  saved.close()
  assert checkpoints.Checkpoints(tmp_path).steps() == [5, 4, 2]


def test_without_validation_the_newest_two_are_kept(tmp_path):
  saved = filled(tmp_path, [None] * 4)
  saved.close()
  assert set(checkpoints.Checkpoints(tmp_path).steps()) >= {4, 3}


def test_reading_leaves_a_save_under_way_alone(tmp_path):
  filled(tmp_path, [None]).close()
  under_way = tmp_path / 'checkpoints' / '2.orbax-checkpoint-tmp' / 'network'
  under_way.mkdir(parents=True)
  reader = checkpoints.Checkpoints(tmp_path, read_only=True)
  assert reader.steps() == [1]
  assert reader.restore({'training': abstract()}, 1)[1] == {'note': 1}
  reader.close()
  assert under_way.is_dir()
  writer = checkpoints.Checkpoints(tmp_path)
  writer.save(2, items(2.0), {})
  writer.close()
  assert not under_way.exists()  # a run that continues clears what a killed one left


def change_a_byte(folder):
  files = [path for path in folder.glob('**/d/*') if path.is_file()]
  files.sort(key=lambda path: path.stat().st_size)
  content = bytearray(files[-1].read_bytes())
  content[len(content) // 2] ^= 255
  files[-1].write_bytes(content)


def test_a_changed_byte_is_found(tmp_path):
  saved = filled(tmp_path, [None])
  saved.close()
  change_a_byte(tmp_path / 'checkpoints' / '1')
  with pytest.raises(damage.DamagedError, match=r'checkpoint .*/checkpoints/1 is damaged: '):
    checkpoints.Checkpoints(tmp_path).restore({'network': abstract(), 'training': abstract()}, 1)


@pytest.mark.parametrize(
  ('read_only', 'damaged', 'stay'),
  [
    (False, [3, 2], [1]),
    (True, [3, 2], [3, 2, 1]),
    (False, [3, 2, 1], [3, 2, 1]),  # there is nothing to continue from: nothing is touched
  ],
)
def test_damaged_checkpoints_are_moved_aside_once_an_older_one_is_read(tmp_path, capsys, read_only, damaged, stay):
  first = state.TrainState(jnp.int32(0), tree(0.0), tree(1.0), tree(2.0), tree(3.0), jnp.int32(0))
  saved = checkpoints.Checkpoints(tmp_path, {1: 0.9, 2: 0.5, 3: 0.6})  # the first is the best, or it would be gone
  for step in (1, 2, 3):
    saved.save(step, state.items(first.replace(step=jnp.int32(step))), {})
  saved.close()
  for step in damaged:
    change_a_byte(tmp_path / 'checkpoints' / str(step))
  (tmp_path / 'damaged' / '3').mkdir(parents=True)  # moved there earlier
  saved = checkpoints.Checkpoints(tmp_path, read_only=read_only)
  if 1 in damaged:
    with pytest.raises(UserError, match='every checkpoint tried in .* is damaged: bring that folder back'):
      state.restore(saved, first)
  else:
    assert int(state.restore(saved, first)[0].step) == 1
  warnings = capsys.readouterr().out.splitlines()
  for step, warning, moved in zip(damaged, warnings, ('3_2', '2'), strict=False):
    expected = f'warning: checkpoint {tmp_path}/checkpoints/{step} is damaged: network/.* is not what was saved'
    expected += f'; moved to {tmp_path}/damaged/{moved}' * (stay == [1]) + '; step 1 is used' * (1 not in damaged)
    assert re.fullmatch(expected, warning)
  assert len(warnings) == len(damaged)
  assert saved.steps() == stay
  if stay == [1]:
    assert (tmp_path / 'damaged' / '3_2' / 'network').is_dir()
    saved.save(2, state.items(first.replace(step=jnp.int32(2))), {})
  saved.close()
  assert checkpoints.Checkpoints(tmp_path).steps() == ([2, 1] if stay == [1] else stay)


def test_a_step_that_orbax_passes_over_is_not_called_saved(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path)
  saved.save(5, items(5.0), {})
  with pytest.raises(UserError, match='step 4 could not be saved in .*: step 5 is there already'):
    saved.save(4, items(4.0), {})
  saved.close()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
  saved = filled(tmp_path, [None])
  for meta, left_out in (({}, ''), ({'skipped_updates': 3}, r' Updates left out so far: 3\.')):
    helps = r'Lower --config\.learning_rate, in a new --workdir\. Last good checkpoint: .*/1$'
    with pytest.raises(UserError, match=rf'network/weights is not finite; not saved\.{left_out} {helps}'):
      saved.save(2, items(np.nan), meta)
  assert saved.steps() == [1]
  saved.close()


def test_a_disk_that_does_not_take_it_is_one_line(tmp_path, monkeypatch):
  saved = filled(tmp_path, [None])

  def full(*_, **__):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(saved._manager, 'wait_until_finished', full)
  with pytest.raises(UserError, match=r'could not be written in .*checkpoints: .*No space left'):
    saved.wait()
  monkeypatch.undo()
  saved.close()


def test_after_a_save_that_failed_the_next_one_is_waited_for(tmp_path, monkeypatch, capsys):
  saved, manager = checkpoints.Checkpoints(tmp_path), ocp.CheckpointManager
  fails = {2: True, 3: False, 4: True, 5: True}
  finalize = manager._finalize

  def finalize_or_fail(self, step, *rest):
    finalize(self, step, *rest)
    if fails.get(step):
      (tmp_path / 'checkpoints' / str(step)).rename(tmp_path / 'checkpoints' / f'{step}.orbax-checkpoint-tmp')
      raise OSError(28, 'No space left on device')

  monkeypatch.setattr(manager, '_finalize', finalize_or_fail)
  for step in (1, 2):
    saved.save(step, items(float(step)), {})
  assert saved.newest().endswith('checkpoints/1')
  assert saved.failed()
  assert capsys.readouterr().out == ''
  saved.save(3, items(3.0), {})
  text = 'warning: a checkpoint could not be written (No space left on device); step 3 is saved\n'
  assert capsys.readouterr().out == text
  assert not saved.failed()
  assert os.listdir(saved.directory) == ['3', '1'] or os.listdir(saved.directory) == ['1', '3']
  saved.save(4, items(4.0), {})
  with pytest.raises(
    UserError, match=r'step 5 could .* in .*: No space left on device\. Last good .*/3; make room there, '
  ):
    saved.save(5, items(5.0), {})


def test_the_reason_is_named_even_from_far_back_in_the_text(tmp_path, monkeypatch):
  saved = filled(tmp_path, [None])
  text = 'RESOURCE_EXHAUSTED: Error writing "a/0.0" ' + 'a long path ' * 20 + '[OS error 28: No space left on device]'

  def full(*_, **__):
    raise ValueError(text)

  monkeypatch.setattr(saved._manager, 'save', full)
  with pytest.raises(UserError, match=r'^step 2 could not be saved in .*/checkpoints: No space left on device\. Last'):
    saved.save(2, items(2.0), {})
  saved.close()


def whole(saved, step=None, **options):
  """The weights that `restore_whole` reads, as the number they were made of."""
  found, meta = saved.restore_whole({'network': abstract()}, step, **options)
  return round(float(found['network']['weights'][0, 0] - tree(0.0)['weights'][0, 0])), meta


def test_the_newest_the_best_or_any_step_is_read(tmp_path):
  saved = filled(tmp_path, [0.5, 0.9, 0.7, 0.6])
  assert saved.steps() == [4, 3, 2]
  assert whole(saved) == (4, {'note': 4})
  assert whole(saved, 3) == (3, {'note': 3})
  assert whole(saved, 'best') == (2, {'note': 2})
  assert saved.best() == 2
  with pytest.raises(UserError, match=r'^there is no checkpoint of step 1 in .*/checkpoints: there are \[4, 3, 2\]$'):
    whole(saved, 1)
  saved.close()


def test_without_validation_there_is_no_best(tmp_path):
  saved = filled(tmp_path, [None])
  with pytest.raises(UserError, match=r'^no checkpoint in .* has a validation accuracy: .*Give --step=N, or leave'):
    whole(saved, 'best')
  saved.close()
  saved = checkpoints.Checkpoints(tmp_path, {1: 0.0, 7: 0.5})  # the worst accuracy there is; and a step that is gone
  assert whole(saved, 'best')[0] == 1
  saved.close()


def test_an_empty_folder_has_no_checkpoint(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path)
  assert saved.restore_whole({'network': abstract()}) is None
  assert saved.restore_whole({'network': abstract()}, 'best') is None
  with pytest.raises(UserError, match='there is no checkpoint of step 1 in .*: there are none$'):
    saved.restore_whole({'network': abstract()}, 1)
  assert saved.newest() == 'There is no checkpoint yet'
  saved.close()


def test_a_checkpoint_whose_statistics_fit_its_weights_comes_first_where_that_is_asked_for(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path, {2: 0.5})
  for step, fresh in ((1, False), (2, True), (3, False)):
    saved.save(step, items(float(step)), {}, fresh)
    saved.wait()
  assert [saved.is_fresh(step) for step in saved.steps()] == [fresh for fresh in (False, True)]
  assert whole(saved)[0] == 3  # training continues from the newest
  assert whole(saved, fresh_first=True)[0] == 2
  assert whole(saved, 3, fresh_first=True)[0] == 3
  saved.save(4, items(4.0), {})
  saved.wait()
  assert whole(saved, fresh_first=True)[0] == 4
  saved.close()


def test_a_step_that_is_saved_is_left_alone(tmp_path):
  saved = filled(tmp_path, [None])
  saved.save(1, items(9.0), {'note': 9})
  saved.wait()
  assert whole(saved) == (1, {'note': 1})
  saved.close()


def test_a_checkpoint_is_written_again_with_statistics_that_fit(tmp_path, monkeypatch):
  saved = checkpoints.Checkpoints(tmp_path)
  for step in (1, 2):
    saved.save(step, items(float(step)), {'note': 'old'}, fresh=False)
  saved.replace(2, items(5.0), {'note': 'new'})
  assert (saved.steps(), saved.is_fresh(2), saved.is_fresh(1)) == ([2, 1], True, False)
  assert whole(saved) == (5, {'note': 'new'})

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(saved, 'save', killed)
    patch.setattr(saved, '_bring_back', lambda: None)
    with pytest.raises(KeyboardInterrupt):
      saved.replace(2, items(7.0), {})
  assert checkpoints.Checkpoints(tmp_path, read_only=True).steps() == [1]
  again = checkpoints.Checkpoints(tmp_path)
  assert whole(again) == (5, {'note': 'new'})
  again.close()
  assert [path.name for path in tmp_path.iterdir()] == ['checkpoints']
