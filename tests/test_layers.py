import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import lax

from googlenet_jax.host import sharding
from googlenet_jax.model import cpu_layers, layers, normalisation


def tied(shape, seed=0):
  """Small integers: every window has ties."""
  return np.random.default_rng(seed).integers(0, 3, shape).astype(np.float32)


def values_and_gradients(function, arguments, cotangents):
  """Values and gradients of `function(*arguments[i])` for all i, by one program.

  The cotangents are `cotangents[i]` or `cotangents(value)`.
  """

  @jax.jit
  def run(arguments):
    results = []
    for i, each in enumerate(arguments):
      y, pullback = jax.vjp(function, *each)
      results.append((y, pullback(cotangents(y) if callable(cotangents) else jnp.asarray(cotangents[i]))))
    return results

  return run(arguments)


@pytest.fixture
def only_xla(monkeypatch):
  """`only_xla()`: from then on every platform has XLA's own forms."""
  return lambda: monkeypatch.setattr(layers, 'by_platform', lambda own, *arrays, **_: own(*arrays))


def channels_first(x, **options):
  return torch.tensor(x.transpose(0, 3, 1, 2), **options)


def channels_last(t):
  return t.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize('stride', [1, 2])
def test_max_pool_equals_pytorch_with_ties(stride):
  images = [tied((2, *size, 4)) for size in [(1, 1), (2, 2), (3, 5), (7, 7), (8, 6)]]
  weights = [np.random.default_rng(1).normal(size=x[:, ::stride, ::stride].shape).astype(np.float32) for x in images]
  found = values_and_gradients(lambda x: layers.max_pool(x, stride), [(x,) for x in images], weights)
  without_gradient = jax.jit(lambda images: [layers.max_pool(x, stride) for x in images])(images)  # as in evaluation
  for x, w, (y, (gradient,)), same in zip(images, weights, found, without_gradient, strict=True):
    t = channels_first(x, requires_grad=True)
    expected = torch.nn.functional.max_pool2d(t, 3, stride, padding=1)
    expected.backward(channels_first(w))
    np.testing.assert_array_equal(y, channels_last(expected))
    np.testing.assert_array_equal(same, y)
    np.testing.assert_allclose(gradient, channels_last(t.grad), rtol=1e-6, atol=1e-6)


def test_max_pool_outside_jit_is_the_same():
  x = jnp.asarray(tied((2, 7, 7, 4)))
  y, pullback = jax.vjp(lambda x: layers.max_pool(x, 2), x)
  ((jitted, (gradient,)),) = values_and_gradients(lambda x: layers.max_pool(x, 2), [(x,)], lambda y: y)
  np.testing.assert_array_equal(y, jitted)
  np.testing.assert_array_equal(pullback(y)[0], gradient)


@pytest.mark.parametrize('window', [2, 3])
def test_max_pool_in_ceil_mode_equals_pytorch_with_ties(window):
  images = [tied((2, *size, 4)) for size in [(2, 3), (4, 7), (8, 9)]]
  pool = lambda x: layers.max_pool(x, 2, window, ceil_mode=True)
  found = values_and_gradients(pool, [(x,) for x in images], jnp.cos)
  for x, (y, (gradient,)) in zip(images, found, strict=True):
    t = channels_first(x, requires_grad=True)
    expected = torch.nn.functional.max_pool2d(t, window, 2, ceil_mode=True)
    np.testing.assert_array_equal(y, channels_last(expected))
    expected.backward(torch.cos(expected.detach()))
    np.testing.assert_allclose(gradient, channels_last(t.grad), rtol=1e-6, atol=1e-6)


def test_max_pool_passes_nan_on_and_keeps_bfloat16():
  x = jnp.zeros((1, 4, 4, 4), jnp.bfloat16).at[0, 3, 3, 0].set(jnp.nan).at[0, 0, 0, 1].set(jnp.nan)
  y, pullback = jax.vjp(lambda x: layers.max_pool(x, 2), x)
  np.testing.assert_array_equal(layers.max_pool(x, 2).astype(jnp.float32), y.astype(jnp.float32))
  assert y.dtype == jnp.bfloat16
  assert np.isnan(y[0, 1, 1, 0])
  np.testing.assert_array_equal(np.isnan(y[0, 0, 0]), [False, True, False, False])
  assert pullback(jnp.ones_like(y))[0].dtype == jnp.bfloat16


def test_max_pool_on_other_backends_is_the_same_function(only_xla):
  x = jnp.asarray(tied((2, 9, 7, 4)))
  pool = lambda x: layers.max_pool(x, 2)
  ((fast, (fast_gradient,)),) = values_and_gradients(pool, [(x,)], lambda y: y)
  only_xla()
  ((plain, (plain_gradient,)),) = values_and_gradients(pool, [(x,)], lambda y: y)
  np.testing.assert_array_equal(fast, plain)
  np.testing.assert_array_equal(fast_gradient, plain_gradient)


@pytest.mark.parametrize(('kernel_size', 'stride'), [(1, 1), (3, 1), (5, 1), (7, 2), (3, 2)])
def test_conv_equals_pytorch(kernel_size, stride):
  rng = np.random.default_rng(0)
  images = [rng.normal(size=(2, *size, 4)).astype(np.float32) for size in [(1, 1), (2, 3), (8, 8), (9, 9)]]
  kernel = rng.normal(size=(kernel_size, kernel_size, 4, 6)).astype(np.float32)
  found = values_and_gradients(lambda x, k: layers.conv(x, k, stride), [(x, kernel) for x in images], jnp.cos)
  close = dict(rtol=1e-4, atol=1e-4)
  for x, (y, (dx, dkernel)) in zip(images, found, strict=True):
    tx = channels_first(x, requires_grad=True)
    tk = torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    expected = torch.nn.functional.conv2d(tx, tk, stride=stride, padding=kernel_size // 2)
    expected.backward(torch.cos(expected.detach()))
    np.testing.assert_allclose(y, channels_last(expected), **close)
    np.testing.assert_allclose(dx, channels_last(tx.grad), **close)
    np.testing.assert_allclose(dkernel, tk.grad.numpy().transpose(2, 3, 1, 0), **close)


def test_conv_on_a_small_map_equals_the_plain_convolution_in_float64():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 2, 3, 4)), rng.normal(size=(5, 5, 4, 3))
    plain = lax.conv_general_dilated(x, kernel, (1, 1), ((2, 2), (2, 2)), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    np.testing.assert_allclose(layers.conv(jnp.asarray(x), jnp.asarray(kernel)), plain, rtol=1e-12, atol=1e-12)


FAST = {  # operations with another form on a CPU: a function of a map and kernels, and the kernels' shapes
  'pointwise': (lambda x, *kernels: layers.pointwise(x, *kernels), [(4, 3), (4, 1), (4, 5)]),
  'conv 1x1': (layers.conv, [(1, 1, 4, 3)]),
  'conv 3x3': (layers.conv, [(3, 3, 4, 3)]),
  'conv 5x5': (layers.conv, [(5, 5, 4, 3)]),
  'max_pool 1': (lambda x: layers.max_pool(x, 1), []),
  'max_pool 2': (lambda x: layers.max_pool(x, 2), []),
}


@pytest.mark.parametrize(
  ('transform', 'size'),
  [
    *[('jit', size) for size in [(1, 1), (2, 3), (4, 3), (9, 11)]],
    *[(transform, size) for transform in ('vmap', 'two devices') for size in [(2, 3), (7, 5), (9, 11)]],
  ],
)
def test_fast_forms_equal_the_plain_definitions(transform, size, mesh_of, only_xla):
  transformed = {
    'jit': lambda f: f,
    'vmap': lambda f: lambda x, *kernels: jax.vmap(lambda x: f(x[None], *kernels))(x),
    'two devices': lambda f: f,
  }[transform]

  def one(function, arrays):
    def scalar(*arrays):
      out = jax.tree.leaves(transformed(function)(*arrays))
      return sum((y * (1 + jnp.arange(y.size).reshape(y.shape) % 7)).sum() for y in out), out

    return jax.value_and_grad(scalar, argnums=tuple(range(len(arrays))), has_aux=True)(*arrays)

  def results():  # all functions in one program, which compiles faster
    return jax.jit(lambda arrays: {name: one(FAST[name][0], arrays[name]) for name in FAST})(arrays)

  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    image = jnp.asarray(tied((4, *size, 4)), jnp.float64)
    if transform == 'two devices':  # each holds half of the images
      image = jax.device_put(image, sharding.cut(mesh_of(2)))
    arrays = {name: [image, *[rng.normal(size=shape) for shape in shapes]] for name, (_, shapes) in FAST.items()}
    fast = results()
    only_xla()
    plain = results()
    for name in FAST:
      for a, b in zip(jax.tree.leaves(fast[name]), jax.tree.leaves(plain[name]), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize('size', [(2, 3), (6, 6), (9, 11)])
def test_fast_forms_keep_bfloat16(size, only_xla):
  rng = np.random.default_rng(0)
  shapes = {name: [(2, *size, 4), *kernels] for name, (_, kernels) in FAST.items()}
  arrays = {name: [rng.normal(size=s).astype(jnp.bfloat16) for s in each] for name, each in shapes.items()}

  @jax.jit
  def results(arrays, cotangents):
    found = {}
    for name, (function, _) in FAST.items():
      value, pullback = jax.vjp(function, *arrays[name])
      found[name] = value, pullback(value if cotangents is None else cotangents[name])
    return found

  to_float32 = lambda tree: jax.tree.map(lambda a: a.astype(np.float32), tree)
  found = results(arrays, None)
  only_xla()
  exact = results(to_float32(arrays), {name: to_float32(value) for name, (value, _) in found.items()})
  for name in FAST:
    for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(exact[name]), strict=True):
      assert a.dtype == jnp.bfloat16
      scale = float(jnp.abs(b).max())
      # a bfloat16 has 8 bits
      np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * scale, err_msg=name)


def test_a_cpu_does_not_use_xlas_slow_forms():
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


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('train', [True, False])
def test_batch_norm_equals_flaxs(train, dtype):
  """In float32 bit for bit: values, running statistics and gradients. In bfloat16 within its 8 bits."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(1, 2, size=(3, 5, 4, 6)), dtype)
  vectors = [rng.uniform(0.5, 1.5, 6).astype(np.float32) for _ in range(4)]
  options = {'momentum': 0.9, 'epsilon': 1e-3}
  graphdef, state = nnx.split(nnx.BatchNorm(6, dtype=dtype, rngs=nnx.Rngs(0), **options))

  def flaxs(x, *vectors):
    values = dict(zip(('scale', 'bias', 'mean', 'var'), vectors, strict=True))
    layer = nnx.merge(graphdef, {name: nnx.to_pure_dict(state)[name] * 0 + a for name, a in values.items()})
    return layer(x, use_running_average=not train), ((layer.mean[...], layer.var[...]) if train else ())

  ours = lambda x, *vectors: normalisation.batch_norm(x, *vectors, train=train, **options)

  def results(function):
    y, pullback, statistics = jax.vjp(function, x, *vectors, has_aux=True)
    return y, statistics, pullback(jnp.cos(x))

  found, expected = jax.jit(lambda: (results(ours), results(flaxs)))()
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    a, b = np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32))
    np.testing.assert_allclose(a, b, rtol=0, atol=0 if dtype == jnp.float32 else 0.02 * abs(b).max())


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
  ((y, (gradient,)),) = values_and_gradients(normalisation.local_response_norm, [(x,)], jnp.cos)
  t = channels_first(x, requires_grad=True)
  expected = torch.nn.LocalResponseNorm(5)(t)
  expected.backward(torch.cos(expected.detach()))
  np.testing.assert_allclose(y, channels_last(expected), rtol=1e-5)
  np.testing.assert_allclose(gradient, channels_last(t.grad), rtol=1e-4, atol=1e-5)
  assert normalisation.local_response_norm(jnp.ones((1, 1, 1, 3), jnp.bfloat16)).dtype == jnp.bfloat16
