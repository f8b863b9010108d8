import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from googlenet_jax.model import auxiliary_classifiers, googlenet
from googlenet_jax.model.layers import dropout, max_pool
from googlenet_jax.model.normalisation import local_response_norm
from googlenet_jax.model.options import MIN_IMAGE_SIZE, STAGES, Options, map_sides


@functools.cache
def make(num_classes=10, channels=1, image_size=None, dtype=jnp.float32, **options):
  """A network without values: shapes only."""
  options = Options(**options)
  return googlenet.with_shapes(
    lambda rngs: googlenet.GoogLeNet(num_classes, channels, options, image_size=image_size, dtype=dtype, rngs=rngs)
  )


def shapes(model, size):
  image = jax.ShapeDtypeStruct((2, size, size, model.channels), jnp.float32)
  return {k: v.shape for k, v in end_points(model, image).items()}


def initialised(**options):
  """A network with its initial weights, made by one program: graphdef and state."""
  make = lambda rngs: googlenet.GoogLeNet(options=Options(**options), rngs=rngs)
  graphdef, _ = nnx.split(googlenet.with_shapes(make))
  return graphdef, jax.jit(lambda: nnx.state(make(nnx.Rngs(0))))()


def end_points(model, image):
  """Shapes and dtypes only: nothing is computed."""
  graphdef, state = nnx.split(model)
  return jax.eval_shape(lambda state, image: nnx.merge(graphdef, state).end_points(image), state, image)


def test_a_network_with_shapes_is_that_of_flax():
  model = nnx.eval_shape(lambda: googlenet.GoogLeNet(options=Options(norm='batch'), rngs=nnx.Rngs(0)))
  for ours, flaxs in zip(nnx.split(make(norm='batch')), nnx.split(model), strict=True):
    assert ours == flaxs


def test_parameters_in_total():
  assert googlenet.count_parameters(make()) == 5_977_530
  assert googlenet.count_parameters(make(num_classes=1000, channels=3)) == 6_998_552


def test_parameters_by_block():
  model = make()
  counts = {name: googlenet.count_parameters(getattr(model, name)) for name in ('conv1', 'conv2_reduce', 'conv2', *googlenet.TABLE, 'logits')}  # fmt: skip  # noqa: E501
  # Summed by hand from the paper's table: weights and biases.
  assert counts == {
    'conv1': 3_200,
    'conv2_reduce': 4_160,
    'conv2': 110_784,
    'inception_3a': 163_696,
    'inception_3b': 388_736,
    'inception_4a': 376_176,
    'inception_4b': 449_160,
    'inception_4c': 510_104,
    'inception_4d': 605_376,
    'inception_4e': 868_352,
    'inception_5a': 1_043_456,
    'inception_5b': 1_444_080,
    'logits': 10_250,
  }


def test_parameters_of_batch_norm_replace_biases():
  # 57 convolutions of 7,280 output channels in all: a scale and a bias instead of a bias.
  plain, norm = googlenet.count_parameters(make()), googlenet.count_parameters(make(norm='batch'))
  assert norm - plain == sum(p.size for p in jax.tree.leaves(nnx.state(make(norm='batch'), nnx.BatchStat))) // 2


def test_multiply_adds():
  assert googlenet.count_multiply_adds(make(num_classes=1000, channels=3), 224) == 1_581_647_872
  model = make()
  assert [googlenet.count_multiply_adds(model, s) for s in (96, 64, 32)] == [276_056_064, 122_691_584, 30_672_896]


def test_shapes_by_stage_at_224():
  assert shapes(make(), 224) == {
    'conv1': (2, 112, 112, 64),
    'conv2_reduce': (2, 56, 56, 64),
    'conv2': (2, 56, 56, 192),
    'inception_3a': (2, 28, 28, 256),
    'inception_3b': (2, 28, 28, 480),
    'inception_4a': (2, 14, 14, 512),
    'inception_4b': (2, 14, 14, 512),
    'inception_4c': (2, 14, 14, 512),
    'inception_4d': (2, 14, 14, 528),
    'inception_4e': (2, 14, 14, 832),
    'inception_5a': (2, 7, 7, 832),
    'inception_5b': (2, 7, 7, 1024),
    'head': (2, 1024),
    'logits': (2, 10),
  }


def test_shapes_of_the_small_stem_at_28():
  found = shapes(make(stem='small'), 28)
  assert found['conv1'] == (2, 28, 28, 64)
  assert found['inception_3a'] == (2, 14, 14, 256)
  assert found['inception_4a'] == (2, 7, 7, 512)
  assert found['inception_5b'] == (2, 4, 4, 1024)


def test_naive_blocks_grow_as_in_figure_2a():
  found = shapes(make(inception='naive'), 32)
  channels = [found[name][-1] for name in googlenet.TABLE]
  assert channels == [416, 832, 1280, 1728, 2176, 2640, 3344, 4048, 4944]
  # 3a by hand: 192 * 64 + 9 * 192 * 128 + 25 * 192 * 32 weights, 224 biases.
  assert googlenet.count_parameters(make(inception='naive').inception_3a) == 387_296


def test_fully_connected_head():
  model = make(head='fully_connected', image_size=224)
  assert googlenet.count_parameters(model.hidden) == 50_176 * 1024 + 1024
  assert googlenet.count_parameters(model) == 5_977_530 + 51_381_248
  assert shapes(make(head='fully_connected', image_size=33, stem='article'), 33)['logits'] == (2, 10)
  with pytest.raises(ValueError, match='needs image_size'):
    make(head='fully_connected')


def test_parameters_of_the_papers_auxiliary_classifiers():
  paper = {'auxiliary': 'average_pool', 'image_size': 224}
  assert googlenet.count_parameters(make(**paper)) == 5_977_530 + 4_350_228
  assert googlenet.count_parameters(make(**paper, num_classes=1000, channels=3)) == 6_998_552 + 6_379_728
  # torchvision's have the same at any size; at 96 pixels the paper's window fits once into the map of 6.
  assert googlenet.count_parameters(make(auxiliary='adaptive_pool')) == 5_977_530 + 4_350_228
  assert make(auxiliary='average_pool', image_size=96).aux_4d.fc1.kernel.shape == (128, 1024)


def test_auxiliary_classifiers_are_end_points_and_change_nothing_else():
  found = shapes(make(auxiliary='average_pool', image_size=224), 224)
  assert found.pop('aux_4a') == found.pop('aux_4d') == (2, 10)
  assert found == shapes(make(), 224)


def test_the_other_initial_weights_are_the_same_with_auxiliary_classifiers(monkeypatch):
  widths = googlenet.Widths(8, 8, 8, 4, 8, 4)
  monkeypatch.setattr(googlenet, 'TABLE', dict.fromkeys(auxiliary_classifiers.AFTER.values(), widths))
  plain, with_heads = (nnx.merge(*initialised(auxiliary=a)) for a in ('none', 'adaptive_pool'))
  for name in ('conv1', 'inception_4d', 'logits'):
    for a, b in zip(*(jax.tree.leaves(nnx.state(getattr(m, name))) for m in (plain, with_heads)), strict=True):
      np.testing.assert_array_equal(a, b)


def test_auxiliary_classifiers_need_a_map_that_holds_their_window():
  with pytest.raises(ValueError, match="auxiliary='average_pool' needs image_size"):
    make(auxiliary='average_pool')
  with pytest.raises(ValueError, match='needs maps of 5 pixels in stage 4, image_size=64 gives 4'):
    make(auxiliary='average_pool', image_size=64)
  assert make(auxiliary='average_pool', image_size=65).aux_4a.fc1.kernel.shape == (128, 1024)


def test_the_papers_auxiliary_classifier_equals_pytorchs_operations():
  head = auxiliary_classifiers.AuxiliaryClassifier(8, 3, 'average_pool', 14, dtype=jnp.float32, rngs=nnx.Rngs(0))
  head.fc1.bias[...] = jnp.linspace(-1, 1, 1024)
  x = np.random.default_rng(0).normal(size=(2, 14, 14, 8)).astype(np.float32)
  weight = lambda layer: torch.tensor(np.asarray(layer.kernel[...])).movedim((-1, -2), (0, 1))
  t = torch.nn.functional.avg_pool2d(torch.tensor(x.transpose(0, 3, 1, 2)), 5, 3)
  t = torch.relu(torch.nn.functional.conv2d(t, weight(head.conv)))
  t = torch.relu(t.flatten(1) @ weight(head.fc1).T + torch.tensor(np.asarray(head.fc1.bias[...])))
  t = t @ weight(head.fc2).T
  assert t.shape == (2, 3)
  graphdef, state = nnx.split(head)
  found = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
  np.testing.assert_allclose(found, t, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (4, 4), (7, 6), (14, 14)])
def test_adaptive_average_pool_equals_pytorchs(size):
  x = np.random.default_rng(0).normal(size=(2, *size, 4)).astype(np.float32)
  expected = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(x.transpose(0, 3, 1, 2)), 4)
  ours = jax.jit(auxiliary_classifiers.adaptive_average_pool, static_argnums=1)(x, 4)
  np.testing.assert_allclose(ours, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


def test_auxiliary_dropout_zeroes_seventy_percent_with_keys_of_its_own():
  model = auxiliary_classifiers.AuxiliaryClassifier(4, 3, 'adaptive_pool', 0, dtype=jnp.float32, rngs=nnx.Rngs(0))
  model.fc1.bias[...] = jnp.ones(1024)
  model.fc2.kernel[...] = jnp.ones((1024, 3))
  keys = jax.random.split(jax.random.key(0), 64)
  graphdef, state = nnx.split(model)
  apply = jax.jit(lambda state, keys: nnx.merge(graphdef, state)(jnp.zeros((64, 5, 5, 4)), True, keys))
  logits = apply(state, keys)  # the sum of 1024 ones: 30 % are kept, and scaled by 1 / 0.3
  assert float(logits.mean() * 0.3 / 1024) == pytest.approx(0.3, abs=0.01)
  assert len(np.unique(logits[:, 0])) > 20


@pytest.mark.parametrize('stem', ['article', 'small'])
@pytest.mark.parametrize('pool', ['padded', 'torchvision'])
def test_map_sides_are_those_of_the_network(stem, pool, monkeypatch):
  blocks = ('inception_3b', 'inception_4a', 'inception_4e', 'inception_5b')  # those beside a pool
  monkeypatch.setattr(googlenet, 'TABLE', {name: googlenet.TABLE[name] for name in blocks})
  model = make.__wrapped__(stem=stem, pool=pool)
  for size in (17, 33, 46, 224):
    found = shapes(model, size)
    assert (found['inception_4a'][1], found['inception_5b'][1]) == map_sides(size, stem, pool), size


def test_images_are_normalised_at_the_entrance(small_network):
  options = Options(input_mean='0.485,0.456,0.406', input_std='0.229,0.224,0.225')
  model = googlenet.GoogLeNet(channels=3, options=options, rngs=nnx.Rngs(0))
  plain = googlenet.GoogLeNet(channels=3, rngs=nnx.Rngs(0))
  image = np.random.default_rng(0).random((2, 17, 17, 3), np.float32)
  conv1 = lambda model, image: jax.jit(lambda image: model.end_points(image)['conv1'])(image)
  normalised = (image - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
  np.testing.assert_allclose(conv1(model, image), conv1(plain, normalised), atol=1e-5)


@pytest.mark.parametrize('option', ['inception', 'head', 'stem', 'norm', 'auxiliary', 'pool', 'ch5x5_kernel'])
def test_unknown_options_are_named(option):
  with pytest.raises(ValueError, match=f"{option}='x' is unknown"):
    make(**{option: 'x'})


def test_images_that_do_not_fit_are_refused():
  for shape in [(2, 16, 40, 1), (2, 32, 32, 3), (32, 32, 1)]:
    with pytest.raises(ValueError, match='do not fit'):
      end_points(make(), jax.ShapeDtypeStruct(shape, jnp.float32))


# test_parity.py compares other gradients with PyTorch's: without batch normalisation, and torchvision's with it.
def test_every_parameter_gets_a_finite_gradient_with_batch_norm(small_network):
  graphdef, state = initialised(norm='batch')
  params, stats = map(nnx.to_pure_dict, nnx.split_state(state, nnx.Param, nnx.BatchStat))
  # 20 pixels: the last map is 2x2, so only the middle of a 5x5 kernel reads it.
  image = jax.random.uniform(jax.random.key(1), (8, 20, 20, 1))

  @jax.jit
  def gradients(params):
    def loss(params):
      logits = nnx.merge(graphdef, params, stats)(image, train=True)
      return -jax.nn.log_softmax(logits)[jnp.arange(8), jnp.arange(8)].mean()

    return jax.grad(loss)(params)

  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients(params)):
    assert np.isfinite(gradient).all(), path
    assert np.abs(gradient).max() > 0, path


def test_local_response_norm_follows_the_first_pool_and_precedes_the_second(small_network):
  graphdef, state = initialised(norm='lrn')
  image = 1000 * jax.random.uniform(jax.random.key(1), (2, 33, 33, 1))  # large values make a difference

  @jax.jit
  def apply(state):
    model = nnx.merge(graphdef, state)
    out = model.end_points(image)
    pooled = max_pool(out['conv1'], stride=2)
    normalised = model.conv2_reduce(local_response_norm(pooled)), model.conv2_reduce(pooled)
    after = (max_pool(f(out['conv2']), stride=2) for f in (local_response_norm, lambda x: x))
    return [(out['conv2_reduce'], *normalised), (out['inception_3b'], *map(model.inception_3b, after))]

  for found, expected, without in apply(state):
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not np.allclose(found, without, rtol=1e-2)


def test_dropout_precedes_the_linear_layer_of_the_head(small_network):
  graphdef, state = initialised(dropout=0.4)
  keys = jax.random.split(jax.random.key(2), 16)
  image = jax.random.uniform(jax.random.key(1), (16, 33, 33, 1))

  @jax.jit
  def apply(state):
    out = nnx.merge(graphdef, state).end_points(image, keys=keys)
    return out['head'], dropout(out['head'], 0.4, keys), out['logits']

  whole, head, logits = (np.asarray(a) for a in apply(state))
  assert 0.3 < (head == 0).mean() - (whole == 0).mean() < 0.5
  expected = head @ np.asarray(state.logits.kernel[...]) + np.asarray(state.logits.bias[...])
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_local_response_norm_has_no_parameters():
  assert googlenet.count_parameters(make(norm='lrn')) == 5_977_530


def test_bfloat16_keeps_float32_parameters_and_logits():
  model = make(dtype=jnp.bfloat16, norm='batch')
  assert {p.dtype for p in jax.tree.leaves(nnx.state(model))} == {jnp.dtype('float32')}
  out = end_points(model, jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32))
  assert out['inception_5b'].dtype == jnp.bfloat16
  assert out['logits'].dtype == jnp.float32


def test_initial_weights_and_biases():
  @jax.jit
  def leaves():
    model = googlenet.GoogLeNet(rngs=nnx.Rngs(0))
    block = model.inception_3b.ch3x3
    return block.kernel[...], block.bias[...], model.logits.bias[...]

  kernel, *biases = leaves()
  bound = (6 / (9 * 128 + 9 * 192)) ** 0.5
  assert 0.99 * bound < float(jnp.abs(kernel).max()) <= bound
  assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize(
  ('options', 'image_size', 'channels', 'message'),
  [
    ({'dropout': 1.0}, 224, 1, 'dropout=1.0 is out of range: it must be below 1'),
    ({'dropout': float('nan')}, 224, 1, 'dropout=nan is out of range: it must be at least 0'),
    ({}, 16, 1, 'image_size=16 is too small for the network: with model.stem=article it needs at least 17 pixels'),
    ({'stem': 'small'}, 4, 1, 'image_size=4 is too small for the network: with model.stem=small it needs at least 5'),
    ({'head': 'fully_connected'}, None, None, "head='fully_connected' needs image_size"),
    ({'input_mean': '0.5,0.4'}, 224, 3, "input_mean='0.5,0.4' must be one number, or three such as 0.485,0.456,0.406"),
    ({'input_mean': 'grey'}, 224, 3, "input_mean='grey' must be one number"),
    ({'input_mean': 'nan'}, 224, 3, "input_mean='nan' must be one number"),
    ({'input_std': '0.2,0,0.2'}, 224, 3, 'a standard deviation must be above 0'),
    ({'input_std': '0.2,0.2,0.2'}, 224, 4, "input_std='0.2,0.2,0.2' is for images of 3 channels, not 4"),
  ],
)
def test_options_that_make_no_network_are_named(options, image_size, channels, message):
  with pytest.raises(ValueError, match=message):
    Options(**options).check(image_size, channels)


def test_options_fit_the_smallest_images():
  Options().check(None)
  for stem, size in MIN_IMAGE_SIZE.items():
    Options(stem=stem).check(size, 1)


def test_every_option_has_a_meaning_and_a_default_among_its_choices():
  for field in dataclasses.fields(Options):
    assert field.metadata['meaning']
    assert field.metadata['choices'] is None or field.default in field.metadata['choices']


def test_stages_and_heads_are_all_parts_of_the_network():
  model = make(head='fully_connected', image_size=32, auxiliary='adaptive_pool')
  parts = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  assert {*STAGES, *googlenet.HEADS} == set(parts)
  assert STAGES[3:] == tuple(googlenet.TABLE)
  assert googlenet.stages_up_to('inception_3b') == STAGES[:5]
  assert googlenet.stages_up_to('') == ()


def test_options_need_no_jax():
  code = 'import sys; from googlenet_jax.model import options; sys.exit("jax" in sys.modules)'
  subprocess.run([sys.executable, '-c', code], check=True)
