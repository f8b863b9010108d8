import errno
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from googlenet_jax.host import checkpoints, damage, files, trial
from googlenet_jax.host.errors import UserError

META = {'seconds': 0.1, 'sums': [1, 2]}


def items(value=0.0, shape=(50, 50)):
  weights = jax.random.uniform(jax.random.key(0), shape) + value
  return {'network': {'params': {'a': weights, 'b': weights[0]}}, 'training': {'seed': jnp.int32(7)}}


def abstract(tree):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A folder with checkpoints 1 and 2."""
  folder = tmp_path_factory.mktemp('whole')
  saved = checkpoints.Checkpoints(folder)
  for step in (1, 2):
    saved.save(step, items(float(step)), META)
  saved.close()
  return folder


@pytest.fixture
def run(whole, tmp_path):
  return shutil.copytree(whole, tmp_path / 'run')


def restored(run, wanted=None):
  """The step whose values come back, and what is printed."""
  saved = checkpoints.Checkpoints(run)
  found, meta = saved.restore_whole(abstract(items() if wanted is None else wanted))
  saved.close()
  step = round(float((found['network']['params']['b'] - items()['network']['params']['b'])[0]))
  for array, expected in zip(jax.tree.leaves(found), jax.tree.leaves(items(float(step))), strict=True):
    np.testing.assert_array_equal(array, expected)
  assert meta == META
  return step


def truncated(content):
  return content[: len(content) // 2]


def emptied(content):
  return b''


def flipped(content):
  content = bytearray(content)
  content[len(content) // 3] ^= 1
  return bytes(content)


def other_digit(content):
  """The file stays valid JSON."""
  return content.replace(b'0.1', b'0.2')


FOUND = (
  ('meta/metadata', truncated, 'meta/metadata holds no JSON'),
  ('meta/metadata', emptied, 'meta/metadata holds no JSON'),
  ('meta/metadata', None, 'meta/metadata is missing or damaged'),
  ('meta/metadata', other_digit, 'it cannot be read .not what was saved.'),
  ('meta/metadata', lambda content: content.replace(b'/params/a', b'/params/c'), 'it cannot be .*not what was saved.'),
  ('meta/metadata', lambda content: b'[]', '.*'),
  ('meta/metadata', lambda content: b'[' * 100_000, 'meta/metadata holds no JSON'),
  ('network/_METADATA', emptied, 'network/_METADATA holds no JSON'),
  ('network/_METADATA', lambda content: content.replace(b'params', b'paramz'), '.*'),
  ('network/manifest.ocdbt', None, 'params/[ab] cannot be read'),
  ('network/manifest.ocdbt', truncated, 'network/manifest.ocdbt is missing or damaged'),
  ('network/manifest.ocdbt', flipped, 'network/manifest.ocdbt is missing or damaged'),
  ('training/d/*', None, r'training/d/\w+ is missing or damaged'),
  ('training', None, '.*'),
  ('.', emptied, '.*'),  # a folder without anything in it
)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize(('name', 'change', 'named'), FOUND)
def test_damage_is_found_and_named_and_the_step_before_is_used(name, change, named, run, capsys):
  folder = run / 'checkpoints' / '2'
  for path in [folder] if name == '.' else folder.glob(name):
    if path.is_dir():
      shutil.rmtree(path)
    elif change is None:
      path.unlink()
    else:
      path.write_bytes(change(path.read_bytes()))
  folder.mkdir(exist_ok=True)
  assert restored(run) == 1
  expected = f'warning: checkpoint {folder} is damaged: {named}; moved to {run}/damaged/2; step 1 is used\n'
  assert re.fullmatch(expected, capsys.readouterr().out)
  assert os.listdir(run / 'checkpoints') == ['1']
  assert restored(run) == 1


@pytest.mark.parametrize('name', ['_CHECKPOINT_METADATA', 'commit_success.txt', 'network/_sharding'])
def test_some_files_may_be_lost(name, run, capsys):
  (run / 'checkpoints' / '2' / name).write_bytes(b'')
  assert restored(run) == 2
  assert capsys.readouterr().out == ''


def test_an_array_that_orbax_reads_without_complaint_is_compared_with_its_checksum(run, capsys):
  (largest,) = sorted((run / 'checkpoints/2/network').glob('**/d/*'), key=lambda path: path.stat().st_size)[-1:]
  largest.write_bytes(flipped(largest.read_bytes()))
  assert restored(run) == 1
  assert 'is damaged: network/params/a is not what was saved; moved' in capsys.readouterr().out


def test_a_step_that_orbax_does_not_list_is_no_new_start(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'checkpoints' / '7').touch()  # a file, where a folder was
  saved = checkpoints.Checkpoints(tmp_path)
  with pytest.raises(UserError, match='every checkpoint tried in .* is damaged: bring that folder back'):
    saved.restore_whole(abstract(items()))
  assert (tmp_path / 'checkpoints' / '7').exists()
  saved.close()


OTHER = (
  (items(shape=(50, 40)), r"network/params/a is float32 \[50, 50\] there and float32 \[50, 40\] in the recipe .2 ar"),
  (
    {'network': {'params': {'a': items()['network']['params']['a']}}, 'training': items()['training']},
    r'network/params/b is float32 \[50\] there and missing in the recipe\. .*/run.json or --config was changed',
  ),
  ({'training': {'seed': jnp.float32(1)}}, r'training/seed is int32 \[\] there and float32 \[\] in the recipe'),
)  # fmt: skip


@pytest.mark.parametrize(('wanted', 'message'), OTHER)
def test_another_network_is_no_damage(wanted, message, run):
  with pytest.raises(UserError, match=message):
    restored(run, wanted)
  assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == ['1', '2']


def test_an_older_checkpoint_is_read_and_compared(tmp_path):
  """It had checksums of the arrays only, and `fresh` among metrics."""
  digest = {name: crc32 for name, (_, _, crc32) in damage.described(items(3.0))[0].items()}
  options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics['accuracy'])
  arguments = {name: ocp.args.StandardSave(tree) for name, tree in items(3.0).items()}
  with ocp.CheckpointManager(tmp_path / 'checkpoints', options=options) as manager:
    arguments = ocp.args.Composite(**arguments, meta=ocp.args.JsonSave({**META, 'crc32': digest}))
    manager.save(3, args=arguments, metrics={'accuracy': -1.0, 'fresh': 1.0})
  saved = checkpoints.Checkpoints(tmp_path)
  assert saved.is_fresh(3)
  assert restored(tmp_path) == 3
  for wanted, message in OTHER:
    with pytest.raises(UserError, match=message):
      saved.restore_whole(abstract(wanted))
  saved.close()


def test_troubles_of_the_machine_are_no_damage(run, monkeypatch):
  saved = checkpoints.Checkpoints(run)
  open_files = ValueError("NOT_FOUND: Error opening: Failed to open: Too many open files [os_error_code='24']")
  for error, reason in (
    (open_files, 'Too many open files; raise the limit, such as by ulimit -n 4096'),
    (PermissionError(errno.EACCES, 'Permission denied', 'x'), 'Permission denied'),
    (OSError(errno.EIO, 'Input/output error'), 'Input/output error; look at the disk .*'),
    (MemoryError(), 'MemoryError'),
  ):

    def fails(*_, error=error, **__):
      raise error

    with monkeypatch.context() as patch:
      patch.setattr(saved._reader, 'restore', fails)
      with pytest.raises(UserError, match=f'checkpoint {run}/checkpoints/2 cannot be read: {reason}$'):
        saved.restore_whole(abstract(items()))
  assert saved.steps() == [2, 1]
  saved.close()


def test_a_folder_that_orbax_cannot_name_or_open_is_one_line(tmp_path):
  with pytest.raises(UserError, match=r'x\\udcff/checkpoints: no UTF-8, which Orbax needs: give another --workdir'):
    checkpoints.Checkpoints(tmp_path / os.fsdecode(b'x\xff'))
  (tmp_path / 'checkpoints').touch()
  with pytest.raises(UserError, match=f'{tmp_path}/checkpoints cannot be opened: File exists$'):
    checkpoints.Checkpoints(tmp_path)


@pytest.mark.parametrize(
  ('number', 'helps'),
  [
    (errno.EMFILE, 'raise the limit, such as by ulimit -n 4096'),
    (errno.EFBIG, 'raise the limit, such as by ulimit -f unl'),
  ],
)
def test_a_limit_of_the_machine_is_named_at_the_end(number, helps, tmp_path, monkeypatch):
  def fails(*_, **__):
    raise OSError(number, os.strerror(number))

  saved = checkpoints.Checkpoints(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(ocp, 'CheckpointManager', fails)
    with pytest.raises(UserError, match=f'/checkpoints cannot be opened: {os.strerror(number)}; {helps}'):
      checkpoints.Checkpoints(tmp_path)
    patch.setattr(saved._manager, 'save', fails)
    with pytest.raises(UserError, match=rf'{os.strerror(number)}\. There is no checkpoint yet; {helps}'):
      saved.save(1, items(), META)
  saved.close()


# What is tried before the first step ---------------------------------------------------------------------------------


def test_the_space_of_all_checkpoints_is_tried_and_given_back(run, monkeypatch):
  saved, taken, take_space = checkpoints.Checkpoints(run), [], files.take_space

  def noted(path, size):
    taken.append(size)
    take_space(path, size)

  monkeypatch.setattr(files, 'take_space', noted)
  saved.try_to_write(items(), at_once=4)  # two are there
  assert taken == [2550 * 4 + 4 + checkpoints.EXTRA_BYTES] * 2
  assert sorted(path.name for path in saved.directory.iterdir()) == ['1', '2']
  saved.save(3, items(3.0), META)
  saved.close()


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES])
def test_a_disk_that_takes_no_checkpoint_is_found_before_the_first_step(number, tmp_path, monkeypatch):
  def fails(path, size):
    raise OSError(number, os.strerror(number), str(path))

  monkeypatch.setattr(files, 'take_space', fails)
  with pytest.raises(
    UserError, match=f'{tmp_path} does not take the checkpoints of this run: {os.strerror(number)}. Up'
  ) as caught:
    trial.take(tmp_path, 48_000_000, 3, jnp.zeros(1))
  helps = 'raise the limit, such as by ulimit -f unlimited' if number == errno.EFBIG else 'make room'
  assert str(caught.value).endswith(f': {helps}, or give another --workdir')
  assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_rename_is_found_before_the_first_step(tmp_path, monkeypatch):
  def fails(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

  monkeypatch.setattr(os, 'rename', fails)
  monkeypatch.setattr(os, 'replace', fails)
  with pytest.raises(
    UserError, match='does not take the checkpoints of this run: Function not implemented. Up to 3 of'
  ):
    trial.take(tmp_path, 1_000_000, 3, jnp.zeros(1))
  assert list(tmp_path.iterdir()) == []


def test_the_checksum_of_json_survives_writing_and_reading():
  value = {'b': [0.1, 1e-300, 3], 'a': {'é': None, 'x': (1, 2)}}
  assert damage.crc32_of_json(json.loads(json.dumps(value))) == damage.crc32_of_json(value)
