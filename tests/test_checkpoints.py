import jax
import jax.numpy as jnp
import numpy as np
import pytest

from googlenet_jax import checkpoints
from googlenet_jax.errors import UserError


def tree(value):
  return {'weights': jax.random.uniform(jax.random.key(0), (100, 100)) + value, 'step': jnp.int32(7)}


def abstract():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree(0.0))


def filled(tmp_path, accuracies):
  saved = checkpoints.Checkpoints(tmp_path)
  for step, accuracy in enumerate(accuracies, start=1):
    saved.save(step, tree(float(step)), {'note': step}, accuracy)
  saved.wait()
  return saved


def test_what_was_saved_comes_back(tmp_path):
  saved = filled(tmp_path, [None])
  state, meta = saved.restore(abstract(), 1)
  assert meta == {'note': 1}
  np.testing.assert_array_equal(state['weights'], tree(1.0)['weights'])
  saved.close()


def test_newest_two_and_best_are_kept(tmp_path):
  saved = filled(tmp_path, [0.5, 0.9, 0.7, 0.6, 0.1])
  saved.close()
  assert checkpoints.Checkpoints(tmp_path).steps() == [5, 4, 2]


def test_without_validation_the_newest_two_are_kept(tmp_path):
  saved = filled(tmp_path, [None] * 4)
  saved.close()
  assert set(checkpoints.Checkpoints(tmp_path).steps()) >= {4, 3}


def test_a_changed_byte_is_found(tmp_path):
  saved = filled(tmp_path, [None])
  saved.close()
  files = [path for path in (tmp_path / 'checkpoints' / '1').glob('**/d/*') if path.is_file()]
  files.sort(key=lambda path: path.stat().st_size)
  content = bytearray(files[-1].read_bytes())
  content[len(content) // 2] ^= 255
  files[-1].write_bytes(content)
  with pytest.raises(checkpoints.DamagedError, match='checkpoint 1 in'):
    checkpoints.Checkpoints(tmp_path).restore(abstract(), 1)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
  saved = filled(tmp_path, [None])
  with pytest.raises(UserError, match='weights is not finite.*Last good checkpoint: .*/1'):
    saved.save(2, tree(np.nan), {})
  assert saved.steps() == [1]
  saved.close()


def test_json_is_replaced_whole(tmp_path):
  path = tmp_path / 'a.json'
  checkpoints.write_json(path, {'a': 1})
  checkpoints.write_json(path, {'a': 2})
  assert path.read_text() == '{\n  "a": 2\n}\n'
  assert list(tmp_path.iterdir()) == [path]
