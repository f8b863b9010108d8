import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from googlenet_jax.host import sharding
from googlenet_jax.host.errors import UserError


def test_the_mesh_has_one_axis_over_all_devices_or_those_given():
  mesh = sharding.make_mesh()
  assert dict(mesh.shape) == {'data': 8}
  assert list(mesh.devices) == jax.devices()
  mesh = sharding.make_mesh(jax.devices()[2:5])
  assert list(mesh.devices) == jax.devices()[2:5]


def test_each_device_holds_its_part_of_a_batch_in_order(mesh_of):
  mesh = mesh_of(4)
  batch = {'image': np.arange(8 * 6, dtype=np.uint8).reshape(8, 2, 3, 1), 'label': np.arange(8, dtype=np.int32)}
  found = sharding.shard_batch(batch, mesh)
  assert list(found) == ['image', 'label']
  for name, array in found.items():
    assert array.sharding == NamedSharding(mesh, P('data'))
    assert array.dtype == batch[name].dtype
    np.testing.assert_array_equal(array, batch[name])
    for number, shard in enumerate(sorted(array.addressable_shards, key=lambda shard: shard.device.id)):
      np.testing.assert_array_equal(shard.data, batch[name][2 * number : 2 * number + 2])


def test_each_device_holds_the_whole_of_a_replicated_tree(mesh_of):
  tree = {'a': np.arange(5.0, dtype=np.float32), 'b': {'c': np.int32(7)}}
  found = sharding.replicate(tree, mesh_of(3))
  for array, expected in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
    assert array.sharding.is_fully_replicated
    assert len(array.addressable_shards) == 3
    for shard in array.addressable_shards:
      np.testing.assert_array_equal(shard.data, expected)


def test_a_batch_that_does_not_divide_is_refused_with_both_numbers(mesh_of):
  with pytest.raises(UserError, match='batch_size=10 does not divide by 8 devices: take 8'):
    sharding.check_divides(10, mesh_of(8))
  with pytest.raises(UserError, match='batch_size=24 does not divide by 8 devices times 2 micro-batches: take 16'):
    sharding.check_divides(24, mesh_of(8), 2)
  with pytest.raises(UserError, match='batch_size=4 does not divide by 8 devices: take 8'):
    sharding.check_divides(4, mesh_of(8))
  sharding.check_divides(32, mesh_of(8), 2)


@pytest.mark.parametrize(('backend', 'steps'), [('cpu', 0), ('gpu', 2), ('tpu', 2)])
def test_steps_ahead_of_the_device(backend, steps, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  assert sharding.steps_ahead() == steps


def test_devices_are_in_the_order_of_the_processes():
  """Each process makes one piece of a batch, so its devices must be side by side."""
  devices = jax.devices()[:4]
  shuffled = [devices[place] for place in (2, 0, 3, 1)]
  assert sharding.make_mesh(shuffled).devices.tolist() == devices
