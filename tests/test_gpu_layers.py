"""The forms for a GPU, run on a CPU against the plain definitions, and the choice of forms by platform."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from googlenet_jax.host import sharding
from googlenet_jax.model import cpu_layers, googlenet, gpu_layers, layers, normalisation
from googlenet_jax.model.options import Options


def with_gradients(function, transform=lambda function: function):
  """A program: value of `function(*arrays)`, and gradients for a cotangent that differs from value to value."""

  def run(*arrays):
    y, pullback = jax.vjp(transform(function), *arrays)
    weights = lambda y: (1 + jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape) % 7).astype(y.dtype)
    return y, pullback(jax.tree.map(weights, y))

  return run


def assert_equal(found, expected, tolerance, message=''):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype), message
    a, b = (np.asarray(array.astype(jnp.promote_types(array.dtype, jnp.float32))) for array in (a, b))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(initial=0), err_msg=str(message))


def tied(*shape):
  """Small integers: every window has ties."""
  return np.random.default_rng(0).integers(0, 3, shape).astype(np.float32)


def normal(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def on_two_devices(mesh_of):
  """Transforms a function of images: each of two devices applies it to half of them."""
  spec = PartitionSpec(sharding.cut(mesh_of(2)).spec[0])

  def transform(function):
    def mapped(x, *kernels):
      specs = (spec, *[PartitionSpec()] * len(kernels))
      return jax.shard_map(function, mesh=mesh_of(2), in_specs=specs, out_specs=spec)(x, *kernels)

    return mapped

  return transform


@pytest.fixture
def only_gpu(monkeypatch):
  """`only_gpu()`: from then on every platform has the forms for a GPU."""
  forms = lambda own, *arrays, cpu=None, gpu=None: (gpu or own)(*arrays)
  return lambda: monkeypatch.setattr(layers, 'by_platform', forms)


# Max-pooling ---------------------------------------------------------------------------------------------------------

POOLS = [(1, 3, False), (2, 3, False), (2, 3, True), (2, 2, True), (1, 2, True)]  # stride, window, ceil_mode
SIZES = [(1, 1), (2, 2), (1, 5), (3, 4), (7, 7), (8, 9)]


@pytest.mark.parametrize('pool', POOLS)
def test_max_pool_equals_xlas_with_ties(pool):
  images = [tied(batch, *size, 3) for size in SIZES for batch in (1, 2) if min(size) >= pool[1] or not pool[2]]

  def results(form):
    one = with_gradients(lambda x: form(x, *pool))
    return jax.jit(lambda images: [(form(x, *pool), one(x)) for x in images])(images)

  assert_equal(results(gpu_layers.max_pool), results(layers.xla_max_pool), 1e-6)


@pytest.mark.parametrize('stride', [1, 2])
def test_the_first_maximum_in_row_major_order_gets_the_gradient(stride):
  y, pullback = jax.vjp(lambda x: gpu_layers.max_pool(x, stride), jnp.zeros((1, 4, 4, 1)))
  windows = [4, 2, 2, 0, 2, 1, 1, 0, 2, 1, 1, 0, 0, 0, 0, 0] if stride == 1 else [1, 1, 0, 0, 1, 1, 0, 0, *[0] * 8]
  np.testing.assert_array_equal(pullback(jnp.ones_like(y))[0][0, :, :, 0], np.reshape(windows, (4, 4)))


@pytest.mark.parametrize('pool', POOLS)
def test_max_pool_passes_nan_and_infinities_on(pool):
  x = normal(2, 7, 6, 2)
  x[0, 0, 0], x[0, 3, 4, 0], x[1, 2:], x[1, 6, 5], x[0, 5, 1] = np.nan, -np.nan, -np.inf, np.inf, np.inf
  found = jax.jit(lambda x: (gpu_layers.max_pool(x, *pool), jax.vjp(lambda x: gpu_layers.max_pool(x, *pool), x)[0]))(x)
  expected = layers.xla_max_pool(x, *pool)
  assert np.isnan(expected).any()
  assert np.isneginf(expected).any()
  for y in found:
    np.testing.assert_array_equal(y, expected)


def test_the_gradient_passes_minus_infinity_by():
  x = normal(2, 7, 6, 2)
  x[:, ::2] = -np.inf  # each window has other values too

  def results(form):
    return jax.jit(lambda x: [with_gradients(functools.partial(form, stride=stride))(x) for stride in (1, 2)])(x)

  assert_equal(results(gpu_layers.max_pool), results(layers.xla_max_pool), 1e-6)


def test_the_gradient_of_max_pool_is_no_scatter_and_stride_1_needs_no_concatenation():
  for stride in (1, 2):
    pool = functools.partial(gpu_layers.max_pool, stride=stride)
    text = jax.jit(with_gradients(pool)).lower(tied(2, 8, 8, 3)).as_text()
    for slow in ('scatter', 'reduce_window', 'concatenate'):
      assert slow not in text, (stride, slow)


# Convolutions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('k', 'stride'), [(7, 2), (5, 2), (3, 2), (3, 1), (5, 1)])
@pytest.mark.parametrize('features', [1, 3])
def test_conv_of_few_channels_equals_xlas(k, stride, features):
  arrays = [(normal(2, *size, features), normal(k, k, features, 5)) for size in [(1, 1), (2, 3), (8, 7), (9, 12)]]

  def results(form):
    one = with_gradients(lambda x, kernel: form(x, kernel, stride))
    return jax.jit(lambda arrays: [one(*each) for each in arrays])(arrays)

  assert_equal(results(gpu_layers.conv), results(cpu_layers.xla_conv), 1e-5)


@pytest.mark.parametrize(('k', 'stride', 'features'), [(7, 2, 1), (7, 2, 3), (3, 1, 1), (3, 1, 3)])
def test_conv_of_few_channels_has_channels_for_tensor_cores(k, stride, features):
  arrays = normal(2, 9, 9, features), normal(k, k, features, 8)
  jaxpr = jax.make_jaxpr(lambda x, kernel: gpu_layers.conv(x, kernel, stride))(*arrays)
  (convolution,) = [equation for equation in jaxpr.eqns if equation.primitive is lax.conv_general_dilated_p]
  assert convolution.invars[0].aval.shape[-1] % 8 == 0
  assert convolution.params['window_strides'] == (1, 1)


# One layer for layers that read one map ------------------------------------------------------------------------------


def three_layers(norm, dtype=jnp.float32):
  """Three 1x1 layers that read 4 channels, and their trees: no value in them is a constant."""
  rngs = nnx.Rngs(0)
  module = nnx.List([layers.Conv(4, width, 1, norm=norm, dtype=dtype, rngs=rngs) for width in (5, 1, 3)])
  graphdef, *trees = nnx.split(module, nnx.Param, nnx.BatchStat)
  rng = np.random.default_rng(0)
  drawn = lambda tree: jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), tree)
  return graphdef, *[drawn(nnx.to_pure_dict(tree)) for tree in trees]


def read_once(graphdef, batch_stats, train, form):
  """A program: maps and gradients of the three layers for an image, and their running statistics afterwards."""

  def run(params, x):
    def maps(params, x):
      module = nnx.merge(graphdef, params, batch_stats)
      return form(module, x, train), nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    found, pullback, batch_stats_after = jax.vjp(maps, params, x, has_aux=True)
    return found, pullback(jax.tree.map(jnp.cos, found)), batch_stats_after

  return jax.jit(run)


def separately(module, x, train):
  return [layer(x, train) for layer in module]


@pytest.mark.parametrize(('norm', 'train'), [('none', True), ('batch', True), ('batch', False)])
def test_joined_layers_equal_separate_ones(norm, train, only_gpu):
  graphdef, params, batch_stats = three_layers(norm)
  x = normal(2, 5, 6, 4)
  expected = read_once(graphdef, batch_stats, train, separately)(params, x)
  only_gpu()
  program = read_once(graphdef, batch_stats, train, layers.read_one_map)
  assert_equal(program(params, x), expected, 2e-6)


def test_joined_layers_are_one_convolution(only_gpu):
  only_gpu()
  graphdef, params, batch_stats = three_layers('batch')
  text = read_once(graphdef, batch_stats, True, layers.read_one_map).lower(params, normal(2, 5, 6, 4)).as_text()
  assert text.count('stablehlo.convolution') == 3  # the forward pass and two gradients
  assert text.count('stablehlo.rsqrt') == 1


# Sums over all pixels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64'])
def test_batch_norm_equals_the_plain_one(dtype):
  old, options = (jnp.full(3, 0.5), jnp.full(3, 2.0)), {'train': True, 'momentum': 0.9, 'epsilon': 1e-3}

  def form(module):
    def normalised(*arrays):
      y, statistics = module.batch_norm(*arrays, *old, **options)
      return y, lax.stop_gradient(statistics)

    return normalised

  with jax.enable_x64(True):
    wide = normal(4, 5, 6, 3) + 0.3, normal(3) + 1, normal(3)
    arrays = wide[0].astype(dtype), *[v.astype(jnp.promote_types(dtype, jnp.float32)) for v in wide[1:]]
    wide = [array.astype(jnp.float64) for array in arrays]
    found = jax.jit(lambda: with_gradients(form(gpu_layers))(*arrays))()
    expected = jax.jit(lambda: with_gradients(form(normalisation))(*wide))()
    assert [a.dtype for a in found[1]] == [a.dtype for a in arrays]
    found = jax.tree.map(lambda a: a.astype(jnp.float64), found)
    assert_equal(found, expected, {'float32': 2e-5, 'bfloat16': 0.03, 'float64': 1e-12}[dtype])


def test_sums_are_taken_image_by_image_first():
  text = jax.jit(gpu_layers.channel_sums).lower(jnp.ones((2, 5, 6, 3), jnp.bfloat16)).as_text()
  assert 'optimization_barrier' in text
  assert 'tensor<2x3xf32>' in text


# Every form ----------------------------------------------------------------------------------------------------------

FORMS = {  # the form for a GPU and the plain one, functions of images and kernels; shapes of image and kernels
  'max_pool 1': (lambda x: gpu_layers.max_pool(x, 1), lambda x: layers.xla_max_pool(x, 1), [(7, 6, 3)]),
  'max_pool 2': (lambda x: gpu_layers.max_pool(x, 2), lambda x: layers.xla_max_pool(x, 2), [(7, 6, 3)]),
  'conv 7x7': (lambda *a: gpu_layers.conv(*a, 2), lambda *a: cpu_layers.xla_conv(*a, 2), [(9, 8, 1), (7, 7, 1, 4)]),
  'conv 3x3': (gpu_layers.conv, cpu_layers.xla_conv, [(5, 6, 3), (3, 3, 3, 4)]),
  'joined': (
    lambda x, *kernels: [y for y, _ in gpu_layers.read_one_map(lambda y: (y, ()), x, kernels, [(), ()])],
    lambda x, *kernels: [cpu_layers.xla_conv(x, kernel[None, None]) for kernel in kernels],
    [(5, 6, 3), (3, 4), (3, 2)],
  ),
}


@pytest.mark.parametrize('transform', ['jit', 'vmap', 'shard_map', 'bfloat16', 'float64'])
def test_forms_equal_the_plain_ones_under_transformations(transform, mesh_of):
  transforms = {
    'vmap': lambda f: lambda x, *kernels: jax.vmap(lambda x: f(x[None], *kernels))(x),
    'shard_map': on_two_devices(mesh_of),
  }
  dtype = jnp.dtype(transform) if 'float' in transform else jnp.float32
  tolerance = {'bfloat16': 0.02, 'float64': 1e-12}.get(transform, 1e-5)  # a bfloat16 has 8 bits
  with jax.enable_x64(transform == 'float64'):
    arrays = {
      name: [jnp.asarray(tied(4, *image), dtype), *[jnp.asarray(normal(*kernel), dtype) for kernel in kernels]]
      for name, (_, _, (image, *kernels)) in FORMS.items()
    }

    def results(number):
      return {
        name: with_gradients(FORMS[name][number], transforms.get(transform, lambda f: f))(*arrays[name])
        for name in FORMS
      }

    found, expected = jax.jit(lambda: (results(0), results(1)))()
    for name in FORMS:
      assert_equal(found[name], expected[name], tolerance, name)


# A network -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def training(monkeypatch):
  """`training(dtype, **options)`: a function for loss, statistics and gradients of a narrow network; its arguments."""
  monkeypatch.setattr(googlenet, 'TABLE', {'inception_3b': googlenet.Widths(4, 6, 8, 3, 4, 5)})

  def make(dtype=jnp.float32, **options):
    network = lambda rngs: googlenet.GoogLeNet(4, options=Options(**options), dtype=dtype, rngs=rngs)
    graphdef, *trees = nnx.split(googlenet.with_shapes(network), nnx.Param, nnx.BatchStat)
    rng = np.random.default_rng(0)
    draw = lambda a: (rng.normal(size=a.shape) / np.sqrt(np.prod(a.shape[:-1]))).astype(dtype)
    params, batch_stats = (jax.tree.map(draw, nnx.to_pure_dict(tree)) for tree in trees)

    def gradients(params, batch_stats, image):
      def loss(params):
        model = nnx.merge(graphdef, params, batch_stats)
        logits = model(image, train=True)
        total = -jax.nn.log_softmax(logits)[jnp.arange(4), jnp.arange(4)].mean()
        return total, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

      return jax.value_and_grad(loss, has_aux=True)(params)

    return gradients, (params, batch_stats, rng.uniform(size=(4, 21, 21, 1)).astype(dtype))

  return make


@pytest.mark.parametrize('options', [{}, {'norm': 'batch', 'stem': 'small'}, {'pool': 'torchvision', 'stem': 'small'}])
def test_a_training_step_is_that_of_the_plain_forms(options, training, monkeypatch, only_gpu):
  with jax.enable_x64(True):
    gradients, arguments = training(jnp.float64, **options)
    monkeypatch.setattr(layers, 'by_platform', lambda own, *arrays, **_: own(*arrays))
    plain = jax.jit(lambda *arguments: gradients(*arguments))(*arguments)
    only_gpu()
    assert_equal(jax.jit(lambda *arguments: gradients(*arguments))(*arguments), plain, 1e-9)


@pytest.mark.parametrize('norm', ['none', 'batch'])
def test_a_program_has_the_forms_of_the_platform_that_it_is_lowered_for(norm, training):
  gradients, arguments = training(norm=norm)
  traced = jax.jit(gradients).trace(*arguments)
  marks = {
    'a separate call of the CPU': 'inlineable = "false"',
    "XLA's gradient of max-pooling": 'select_and_scatter',
    'pixels as channels in the first layer': r'stablehlo.convolution.*tensor<4x4x8x64xf32>',
    'joined 1x1 layers': r'stablehlo.convolution.*tensor<1x1x192x13xf32>',
  }
  found = {}
  for platform in ('cpu', 'cuda', 'rocm', 'tpu'):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    found[platform] = [bool(re.search(mark, text)) for mark in marks.values()]
  gpu = [False, False, True, True]
  assert found == {'cpu': [True, False, False, False], 'cuda': gpu, 'rocm': gpu, 'tpu': [False, True, False, False]}


def test_an_exported_program_runs_the_forms_of_its_platform(monkeypatch):
  pool = jax.jit(lambda x: layers.max_pool(x, 2))
  monkeypatch.setattr(gpu_layers, 'max_pool', lambda x, *_: x[:, ::2, ::2] - 1)  # a form is looked up at tracing
  exported = jax.export.export(pool, platforms=('cpu', 'cuda', 'tpu'))(jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
  assert 'reduce_window' in exported.mlir_module()  # for a TPU
  assert 'subtract' in exported.mlir_module()
  x = tied(2, 8, 8, 3)
  np.testing.assert_array_equal(exported.call(x), layers.xla_max_pool(x, 2))


@pytest.mark.parametrize(('window', 'own'), [(3, True), (7, True), (9, False)])
def test_windows_too_large_for_the_indices_are_pooled_by_xla(window, own):
  gradient = jax.jit(jax.grad(lambda x: layers.max_pool(x, 2, window, ceil_mode=True).sum()))
  text = gradient.trace(jnp.ones((1, 11, 11, 2))).lower(lowering_platforms=('cuda',)).as_text()
  assert ('select_and_scatter' not in text) == own
