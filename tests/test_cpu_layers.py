"""The CPU's forms of convolutions against the plain convolution: values, and gradients of map and kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from googlenet_jax.host import sharding
from googlenet_jax.model import cpu_layers, winograd

SIZES = [(1, 1), (1, 4), (2, 3), (3, 3), (4, 4), (9, 7)]
# Sides of kernels and tiles. 5x5 kernels have no tiles of 3 except where one covers the map.
FORMS = [(3, 2), (3, 3), (3, 4), (5, 2)]
WHOLE = [(5, 3, (3, 3)), (5, 3, (2, 3)), (5, 3, (1, 2)), (3, 1, (1, 1)), (5, 1, (1, 1))]


def plain(x, kernel):
  pad = (kernel.shape[0] // 2,) * 2
  return lax.conv_general_dilated(x, kernel, (1, 1), (pad, pad), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def example(k, size, images=2, dtype=np.float64, features=(3, 5)):
  """Map, kernel and gradient of the result."""
  rng = np.random.default_rng(0)
  shapes = (images, *size, features[0]), (k, k, *features), (images, *size, features[1])
  return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def winograds(m):
  """A function (map, kernel, gradient) to value, gradient of the map, gradient of the kernel."""

  def function(x, kernel, gradient):
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    k = kernel.shape[0]
    return winograd.conv(x, kernel, m), winograd.conv(gradient, flipped, m), winograd.kernel_gradient(x, gradient, k, m)

  return function


def with_gradients(function):
  def run(x, kernel, gradient):
    y, pullback = jax.vjp(function, x, kernel)
    return y, *pullback(gradient)

  return run


def assert_close(found, expected, error, **names):
  for name, a, b in zip(('value', 'map', 'kernel'), found, expected, strict=False):
    assert a.dtype == b.dtype, name
    np.testing.assert_allclose(a, b, rtol=0, atol=error * float(abs(np.asarray(b)).max()), err_msg=f'{name} {names}')


@pytest.mark.parametrize(('k', 'm', 'sizes'), [(k, m, SIZES) for k, m in FORMS] + [(k, m, [s]) for k, m, s in WHOLE])
def test_winograd_equals_the_plain_convolution(k, m, sizes):
  with jax.enable_x64(True):
    examples = [example(k, size) for size in sizes]
    run = lambda function: jax.jit(lambda examples: [function(*each) for each in examples])(examples)
    for size, found, expected in zip(sizes, run(winograds(m)), run(with_gradients(plain)), strict=True):
      assert_close(found, expected, 1e-13, size=size)


# Greatest error over greatest value. PyTorch's own is 4e-7 to 1.9e-6 (experiments/results/README.md).
@pytest.mark.parametrize(
  ('k', 'm', 'size', 'error'), [(3, 2, 2, 1e-6), (3, 2, 8, 1e-6), (3, 4, 8, 4e-6), (5, 2, 8, 4e-6)]
)
def test_rounding_of_winograd_in_float32(k, m, size, error):
  arrays = example(k, (size, size), dtype=np.float32, features=(64, 64))
  found = jax.jit(winograds(m))(*arrays)
  with jax.enable_x64(True):
    expected = jax.jit(with_gradients(plain))(*[a.astype(np.float64) for a in arrays])
  assert_close([np.asarray(a, np.float64) for a in found], expected, error)


@pytest.mark.parametrize(
  ('images', 'tiles', 'devices', 'cores', 'size'),
  [
    (256, 4, 2, 2, 32),
    (256, 4, 1, 2, 32),
    (64, 36, 2, 2, 4),
    (6, 1000, 1, 1, 1),
    (7, 1000, 2, 2, 1),
    (251, 1, 1, 1, 251),
    (36, 1000, 8, 2, 4),  # all that 8 and 36 have in common
  ],
)
def test_part_size(images, tiles, devices, cores, size):
  assert winograd.part_size(images, tiles, devices, cores) == size


@pytest.mark.parametrize('devices', [1, 2])
def test_a_batch_in_parts_equals_the_whole(devices, mesh_of, monkeypatch):
  monkeypatch.setattr(winograd, 'part_size', lambda images, *_: images // 3)
  with jax.enable_x64(True):
    x, kernel, gradient = (jnp.asarray(a) for a in example(3, (4, 5), 12))
    x, gradient = (jax.device_put(a, sharding.cut(mesh_of(devices))) for a in (x, gradient))
    compiled = jax.jit(winograds(4)).lower(x, kernel, gradient).compile()
    text = compiled.as_text()
    assert ' while(' in text
    assert 'all-gather' not in text  # every device works on its own images
    assert 'all-to-all' not in text
    assert_close(compiled(x, kernel, gradient), with_gradients(plain)(x, kernel, gradient), 1e-13)


# Forms that `cpu_layers.conv` may choose: all of Winograd's, in batches of any size, and none.
@pytest.mark.parametrize('least', [1, 10**9])
@pytest.mark.parametrize('k', [1, 3, 5])
def test_conv_equals_the_plain_convolution(k, least, monkeypatch):
  monkeypatch.setattr(cpu_layers, 'MIN_TILES', least)
  with jax.enable_x64(True):
    examples = [example(k, size, images) for size, images in zip(SIZES, [1, 2] * len(SIZES), strict=False)]
    run = lambda function: jax.jit(lambda examples: [function(*each) for each in examples])(examples)
    found, expected = run(with_gradients(cpu_layers.conv)), run(with_gradients(plain))
    inference = jax.jit(lambda examples: [cpu_layers.conv(x, kernel) for x, kernel, _ in examples])(examples)
    for each, y, right, size in zip(found, inference, expected, SIZES, strict=True):
      assert_close(each, right, 1e-13, size=size)
      assert_close((y,), right[:1], 1e-13, size=size)


@pytest.mark.parametrize('k', [3, 5])
def test_bfloat16_is_not_transformed(k, monkeypatch):
  monkeypatch.setattr(cpu_layers, 'MIN_TILES', 1)
  arrays = example(k, (4, 4), dtype=jnp.bfloat16)
  found = jax.jit(with_gradients(cpu_layers.conv))(*arrays)
  expected = jax.jit(with_gradients(plain))(*[a.astype(np.float32) for a in arrays])
  assert all(a.dtype == jnp.bfloat16 for a in found)
  assert_close([a.astype(jnp.float32) for a in found], expected, 0.01)
  monkeypatch.setattr(winograd, 'conv', None)  # calling it would raise
  monkeypatch.setattr(winograd, 'kernel_gradient', None)
  jax.eval_shape(with_gradients(cpu_layers.conv), *arrays)
