import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from jax.sharding import PartitionSpec as P

from googlenet_jax.model import cpu_layers, layers


def tied(shape, seed=0):
  """Small integers: every window has ties."""
  return np.random.default_rng(seed).integers(0, 3, shape).astype(np.float32)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [(1, 1), (2, 2), (3, 5), (7, 7), (8, 6)])
def test_max_pool_equals_pytorch_with_ties(stride, size):
  x = tied((2, *size, 4))
  weights = np.random.default_rng(1).normal(size=(2, -(-size[0] // stride), -(-size[1] // stride), 4))
  weights = weights.astype(np.float32)
  y, pullback = jax.vjp(lambda x: layers.max_pool(x, stride), jnp.asarray(x))
  (gradient,) = pullback(jnp.asarray(weights))

  t = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
  expected = torch.nn.functional.max_pool2d(t, 3, stride, padding=1)
  expected.backward(torch.tensor(weights.transpose(0, 3, 1, 2)))
  np.testing.assert_array_equal(y, expected.detach().numpy().transpose(0, 2, 3, 1))
  np.testing.assert_array_equal(layers.max_pool(jnp.asarray(x), stride), y)  # without a gradient, as in evaluation
  np.testing.assert_allclose(gradient, t.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('window', [2, 3])
@pytest.mark.parametrize('size', [(2, 3), (4, 7), (8, 9)])
def test_max_pool_in_ceil_mode_equals_pytorch_with_ties(window, size):
  x = tied((2, *size, 4))
  y, pullback = jax.vjp(jax.jit(lambda x: layers.max_pool(x, 2, window, ceil_mode=True)), jnp.asarray(x))
  t = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
  expected = torch.nn.functional.max_pool2d(t, window, 2, ceil_mode=True)
  np.testing.assert_array_equal(y, expected.detach().numpy().transpose(0, 2, 3, 1))
  weights = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
  expected.backward(torch.tensor(weights.transpose(0, 3, 1, 2)))
  np.testing.assert_allclose(
    pullback(jnp.asarray(weights))[0], t.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-6, atol=1e-6
  )


def test_max_pool_passes_nan_on_and_keeps_bfloat16():
  x = jnp.zeros((1, 4, 4, 4), jnp.bfloat16).at[0, 3, 3, 0].set(jnp.nan).at[0, 0, 0, 1].set(jnp.nan)
  y, pullback = jax.vjp(lambda x: layers.max_pool(x, 2), x)
  np.testing.assert_array_equal(layers.max_pool(x, 2).astype(jnp.float32), y.astype(jnp.float32))
  assert y.dtype == jnp.bfloat16
  assert np.isnan(y[0, 1, 1, 0])
  np.testing.assert_array_equal(np.isnan(y[0, 0, 0]), [False, True, False, False])
  assert pullback(jnp.ones_like(y))[0].dtype == jnp.bfloat16


def test_max_pool_on_other_backends_is_the_same_function(monkeypatch):
  x = jnp.asarray(tied((2, 9, 7, 4)))
  fast = jax.vjp(lambda x: layers.max_pool(x, 2), x)
  monkeypatch.setattr(layers, '_cpu', lambda: False)
  plain = jax.vjp(jax.jit(lambda x: layers.max_pool(x, 2)), x)  # jitted: as in the training step
  np.testing.assert_array_equal(fast[0], plain[0])
  np.testing.assert_array_equal(fast[1](fast[0])[0], plain[1](plain[0])[0])


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (8, 8), (9, 9)])
@pytest.mark.parametrize(('kernel_size', 'stride'), [(1, 1), (3, 1), (5, 1), (7, 2), (3, 2)])
def test_conv_equals_pytorch(size, kernel_size, stride):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *size, 4)).astype(np.float32)
  kernel = rng.normal(size=(kernel_size, kernel_size, 4, 6)).astype(np.float32)
  y, pullback = jax.vjp(lambda x, k: layers.conv(x, k, stride), jnp.asarray(x), jnp.asarray(kernel))
  dx, dkernel = pullback(jnp.cos(y))

  tx = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
  tk = torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
  expected = torch.nn.functional.conv2d(tx, tk, stride=stride, padding=kernel_size // 2)
  expected.backward(torch.cos(expected.detach()))
  close = dict(rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(y, expected.detach().numpy().transpose(0, 2, 3, 1), **close)
  np.testing.assert_allclose(dx, tx.grad.numpy().transpose(0, 2, 3, 1), **close)
  np.testing.assert_allclose(dkernel, tk.grad.numpy().transpose(2, 3, 1, 0), **close)


def test_conv_on_a_small_map_equals_the_plain_convolution_in_float64():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 2, 3, 4)), rng.normal(size=(5, 5, 4, 3))
    plain = lax.conv_general_dilated(x, kernel, (1, 1), ((2, 2), (2, 2)), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    np.testing.assert_allclose(layers.conv(jnp.asarray(x), jnp.asarray(kernel)), plain, rtol=1e-12, atol=1e-12)


FAST = {  # what is written another way on a CPU: a function of a map and kernels, and the kernels' shapes
  'pointwise': (lambda x, *kernels: layers.pointwise(x, *kernels), [(4, 3), (4, 1), (4, 5)]),
  'conv 1x1': (layers.conv, [(1, 1, 4, 3)]),
  'conv 3x3': (layers.conv, [(3, 3, 4, 3)]),
  'conv 5x5': (layers.conv, [(5, 5, 4, 3)]),
  'max_pool 1': (lambda x: layers.max_pool(x, 1), []),
  'max_pool 2': (lambda x: layers.max_pool(x, 2), []),
}


def inside_shard_map(function, mesh):
  """`function(x, *kernels)` with the map cut over the devices and the kernels whole on each."""

  def sharded(x, *kernels):
    specs = (P('data'), *[P()] * len(kernels))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P('data'))(x, *kernels)

  return sharded


@pytest.mark.parametrize('name', FAST)
@pytest.mark.parametrize(
  ('transform', 'size'),
  [
    *[('jit', size) for size in [(1, 1), (2, 3), (4, 3), (9, 11)]],
    *[(transform, size) for transform in ('vmap', 'shard_map') for size in [(2, 3), (7, 5), (9, 11)]],
  ],
)
def test_what_is_fast_on_a_cpu_equals_the_plain_definition(name, transform, size, mesh_of, monkeypatch):
  function, shapes = FAST[name]
  rng = np.random.default_rng(0)
  transforms = {
    'jit': lambda f: f,
    'vmap': lambda f: lambda x, *kernels: jax.vmap(lambda x: f(x[None], *kernels))(x),
    'shard_map': lambda f: inside_shard_map(f, mesh_of(2)),
  }

  def results():
    def scalar(*arrays):
      out = jax.tree.leaves(transforms[transform](function)(*arrays))
      return sum((y * (1 + jnp.arange(y.size).reshape(y.shape) % 7)).sum() for y in out), out

    return jax.jit(jax.value_and_grad(scalar, argnums=tuple(range(1 + len(shapes))), has_aux=True))(*arrays)

  with jax.enable_x64(True):
    arrays = [jnp.asarray(tied((4, *size, 4)), jnp.float64)]
    arrays += [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
    fast = results()
    monkeypatch.setattr(layers, '_cpu', lambda: False)
    plain = results()
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
      assert a.dtype == jnp.float64
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', FAST)
@pytest.mark.parametrize('size', [(2, 3), (6, 6), (9, 11)])
def test_what_is_fast_on_a_cpu_keeps_bfloat16(name, size, monkeypatch):
  function, shapes = FAST[name]
  keys = jax.random.split(jax.random.key(0), 1 + len(shapes))
  arrays = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, [(2, *size, 4), *shapes], strict=True)]
  value, pullback = jax.vjp(jax.jit(lambda *arrays: function(*arrays)), *arrays)
  monkeypatch.setattr(layers, '_cpu', lambda: False)
  exact, exact_pullback = jax.vjp(function, *[a.astype(jnp.float32) for a in arrays])
  gradients, exact_gradients = pullback(value), exact_pullback(jax.tree.map(lambda y: y.astype(jnp.float32), value))
  for a, b in zip(jax.tree.leaves((value, gradients)), jax.tree.leaves((exact, exact_gradients)), strict=True):
    assert a.dtype == jnp.bfloat16
    scale = float(jnp.abs(b).max())
    np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * scale)  # a bfloat16 has 8 bits


def test_on_a_cpu_xlas_slow_forms_are_not_used():
  def compiled(function, *arrays):
    gradients = jax.grad(lambda *arrays: sum((y**2).sum() for y in jax.tree.leaves(function(*arrays))), (0, 1))
    return jax.jit(gradients).lower(*arrays).compile().as_text()

  def convolutions(size, side):
    arrays = jnp.ones((2, size, size, 4)), jnp.ones((side, side, 4, 4))
    return compiled(layers.conv, *arrays).count(' convolution(')

  assert convolutions(2, 3) == convolutions(2, 5) == 0
  assert convolutions(4, 5) == 1  # the gradient of the kernel
  assert convolutions(8, 3) == 1  # the gradient of the input
  assert convolutions(9, 3) == 2  # that, and the forward pass
  x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
  assert 'scatter(' not in compiled(lambda x, _: layers.max_pool(x, 2), x, kernel)  # nor select-and-scatter
  assert 'convolution(' not in compiled(layers.pointwise, x, kernel[0, 0])


def test_windows_of_another_size_need_ceil_mode():
  with pytest.raises(ValueError, match='window=2 needs ceil_mode'):
    layers.max_pool(jnp.ones((1, 4, 4, 1)), 2, window=2)


def test_unfused_is_a_call_in_the_compiled_program():
  double = cpu_layers.unfused(lambda x: x + x)
  compiled = jax.jit(lambda x: double(x) * 3).lower(jnp.ones(8)).compile()
  assert ' call(' in compiled.as_text()


def test_xavier_uniform_has_pytorchs_bound():
  kernel = layers.xavier_uniform(jax.random.key(0), (5, 5, 16, 32))
  bound = (6 / (25 * 16 + 25 * 32)) ** 0.5  # torch.nn.init.xavier_uniform_ on [32, 16, 5, 5]
  assert 0.99 * bound < float(jnp.abs(kernel).max()) <= bound
  reference = torch.nn.init.xavier_uniform_(torch.empty(32, 16, 5, 5))
  assert float(kernel.std()) == pytest.approx(float(reference.std()), rel=0.03)
  np.testing.assert_array_equal(kernel, jax.jit(lambda k: layers.xavier_uniform(k, (5, 5, 16, 32)))(jax.random.key(0)))
  assert (kernel != layers.xavier_uniform(jax.random.key(1), (5, 5, 16, 32))).any()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_relu_and_its_gradient_at_zero_are_pytorchs(dtype):
  x = [-1.5, -0.0, 0.0, 1e-30, 2.0, float('nan')]
  y, pullback = jax.vjp(layers.relu, jnp.array(x, dtype))
  t = torch.tensor(x, requires_grad=True)
  expected = torch.relu(t)
  expected.sum().backward()
  assert y.dtype == dtype
  np.testing.assert_allclose(y.astype(jnp.float32), expected.detach(), rtol=0.01)
  np.testing.assert_array_equal(pullback(jnp.ones_like(y))[0].astype(jnp.float32), t.grad)


def test_dropout_masks_belong_to_the_example():
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(8))
  x = jnp.ones((8, 1000))
  whole = layers.dropout(x, 0.4, keys)
  np.testing.assert_array_equal(layers.dropout(x[5:], 0.4, keys[5:]), whole[5:])
  assert set(np.unique(whole).tolist()) == {0.0, float(np.float32(1 / 0.6))}
  assert float((whole == 0).mean()) == pytest.approx(0.4, abs=0.02)


def test_local_response_norm_equals_pytorch():
  x = np.random.default_rng(0).normal(scale=50, size=(2, 3, 5, 16)).astype(np.float32)
  y, pullback = jax.vjp(jax.jit(layers.local_response_norm), jnp.asarray(x))
  t = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
  expected = torch.nn.LocalResponseNorm(5)(t)
  expected.backward(torch.cos(expected.detach()))
  np.testing.assert_allclose(y, expected.detach().numpy().transpose(0, 2, 3, 1), rtol=1e-5)
  np.testing.assert_allclose(pullback(jnp.cos(y))[0], t.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
  assert layers.local_response_norm(jnp.ones((1, 1, 1, 3), jnp.bfloat16)).dtype == jnp.bfloat16
