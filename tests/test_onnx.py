import collections
import copy
import functools
import json

import helpers
import jax
import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import numpy_helper

from googlenet_jax import __version__
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import augment, datasets, splits
from googlenet_jax.exporting import artefact, export, onnx_files, onnx_network, onnx_precision, onnx_preparing, sample
from googlenet_jax.exporting.onnx_graph import FLOAT, UINT8, Graph, Value
from googlenet_jax.host import sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet, layers
from googlenet_jax.model.options import Options

TORCHVISION = {'model.pool': 'torchvision', 'model.ch5x5_kernel': 3, 'model.norm': 'batch'}
COLOURS = {'model.input_mean': '0.485,0.456,0.406', 'model.input_std': '0.229,0.224,0.225'}

pytestmark = pytest.mark.usefixtures('small_network')


@functools.cache  # with what they have compiled
def small_digits():
  return helpers.small_digits()


@functools.cache
def made_once(table, channels, members, classes, changes):
  config = helpers.small_config(**dict(changes))
  states = [helpers.random_state(config, seed, channels) for seed in range(members)]
  mesh = sharding.make_mesh(jax.devices()[:1])
  return Classifier(config, classes, channels, [(s.params, s.batch_stats) for s in states], mesh)


def random_classifier(channels=1, members=1, classes=tuple('abcdefghij'), **changes):
  """A classifier with random weights and batch statistics, the same in every call."""
  return made_once(tuple(googlenet.TABLE.items()), channels, members, classes, tuple(changes.items()))


def random_images(count, height, width, channels=1):
  return np.random.default_rng(height).integers(0, 256, (count, height, width, channels), np.uint8)


def written(classifier, folder, half=False):
  """The function that runs the file of a classifier."""
  onnx_files.save(onnx_files.make_model(classifier, half), folder / 'x.onnx')
  return onnx_files.runner(folder / 'x.onnx')


def reduced(classifier, folder, precision, pictures):
  """The file of a classifier in a lower precision."""
  return onnx_precision.reduced(onnx_files.write(classifier, folder), folder, precision, classifier, pictures)


@pytest.fixture
def digits(monkeypatch):
  """`Pictures` of a part of the digits."""
  found = small_digits()
  monkeypatch.setattr(datasets, 'load', lambda **_: found)
  images = [*found.test.images[:16]]
  return artefact.Pictures(images, [str(i) for i in range(16)], '', found.test, found.train)


# The network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('channels', 'changes'),
  [
    (1, {}),
    (3, {**TORCHVISION, **COLOURS, 'image_size': 33}),
    (1, {**TORCHVISION, 'model.stem': 'small', 'image_size': 5, 'model.inception': 'naive', 'model.input_mean': '0.3'}),
    (1, {'model.norm': 'lrn', 'model.inception': 'naive', 'model.head': 'fully_connected', 'image_size': 37}),
    (3, {'model.stem': 'small', 'model.norm': 'lrn', 'model.pool': 'torchvision', 'model.head': 'fully_connected'}),
    (1, {'model.auxiliary': 'adaptive_pool', 'model.dropout': 0.4, 'dtype': 'bfloat16', 'augment.padding': 2}),
  ],
)
def test_every_option_gives_our_probabilities(channels, changes, tmp_path, monkeypatch):
  if 'model.auxiliary' not in changes:  # its blocks have no pool after stage 4, which a flattened map must know
    monkeypatch.setattr(googlenet, 'TABLE', dict.fromkeys(googlenet.POOL_AFTER, googlenet.Widths(8, 8, 8, 4, 8, 4)))
  classifier = random_classifier(channels, **changes)
  run, images = written(classifier, tmp_path), random_images(5, 20, 23, channels)
  ours = sample.ours(classifier, images)
  assert ours.max() > ours.min() + 0.1  # not all alike, or equal answers would show nothing
  np.testing.assert_allclose(run(images), ours, atol=1e-5)


@pytest.mark.parametrize('window', [2, 3])
def test_torchvisions_pools_round_up_as_ours(window, tmp_path):
  """The last window may reach over the edge."""
  graph = Graph()
  graph.add('MaxPool', 'y', 'images', kernel_shape=[window, window], strides=[2, 2], ceil_mode=1)
  x, y = Value('images', FLOAT, ('N', 'C', 'H', 'W')), Value('y', FLOAT, ('N', 'C', 'h', 'w'))
  onnx_files.save(graph.model('pool', '', [x], [y]), tmp_path / 'x.onnx')
  run = onnx_files.runner(tmp_path / 'x.onnx')
  for height, width in ((2, 3), (4, 5), (6, 7), (8, 9)):
    images = np.random.default_rng(height).normal(size=(1, height, width, 2)).astype(np.float32)
    ours = layers.xla_max_pool(images, 2, window, ceil_mode=True)
    np.testing.assert_array_equal(run(images.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1), ours)


def test_an_independent_evaluator_of_onnx_agrees():
  # Not with LRN: onnx 1.23 takes the number of images for the number of channels there.
  classifier = random_classifier(**{'model.norm': 'batch'})
  evaluator, images = onnx.reference.ReferenceEvaluator(onnx_files.make_model(classifier)), random_images(2, 6, 9)
  np.testing.assert_allclose(evaluator.run(None, {'images': images})[0], classifier.probabilities(images), atol=1e-5)


def test_one_file_takes_any_number_and_size(tmp_path):
  classifier = random_classifier()
  run = written(classifier, tmp_path)
  for count, height, width in ((1, 17, 17), (7, 5, 9), (2, 301, 40)):
    images = random_images(count, height, width)
    np.testing.assert_allclose(run(images), classifier.probabilities(images), atol=1e-5)
  assert run(random_images(0, 8, 8)).shape == (0, 10)


def test_an_ensemble_is_one_graph_that_prepares_once(tmp_path):
  classifier = random_classifier(members=3)
  run, images = written(classifier, tmp_path), random_images(4, 11, 9)
  np.testing.assert_allclose(run(images), classifier.probabilities(images), atol=1e-5)
  nodes = [node.name for node in onnx.load(tmp_path / 'x.onnx').graph.node]
  assert [f'member_{i}/logits' in nodes for i in range(4)] == [True, True, True, False]
  assert nodes.count('prepare/resize_rows') == 1


def test_batch_normalisation_is_inside_the_convolution():
  layer = random_classifier(**{'model.norm': 'batch'}).network.conv2
  kernel, bias = onnx_network.folded(layer)
  norm = layer.norm
  factor = norm.scale[...] / np.sqrt(norm.var[...] + 1e-3)
  np.testing.assert_allclose(kernel[5, :, 1, 2], layer.kernel[1, 2, :, 5] * factor[5], rtol=1e-5)
  np.testing.assert_allclose(bias, norm.bias[...] - norm.mean[...] * factor, rtol=1e-4, atol=1e-5)


# The preparation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('image_size', 'padding', 'resize'), [(17, 0, 1.0), (32, 2, 1.0), (28, 0, 256 / 224), (21, 3, 1.5)]
)
def test_images_are_prepared_as_ours(image_size, padding, resize, tmp_path):
  graph = Graph()
  name = onnx_preparing.add_preparation(graph, 'images', image_size, padding, resize, Options(), 3)
  inputs, outputs = Value('images', UINT8, ('N', 'H', 'W', 3)), Value(name, FLOAT, ('N', 3, image_size, image_size))
  onnx_files.save(graph.model('prepare', '', [inputs], [outputs]), tmp_path / 'x.onnx')
  run = onnx_files.runner(tmp_path / 'x.onnx')
  sizes = ((1, 1), (5, 9), (17, 17), (28, 28), (32, 32), (64, 48), (199, 301), (1, 40), (500, 3))
  images = [random_images(1, *size, 3)[0] for size in sizes]
  ours = jax.jit(augment.prepare, static_argnums=(1, 2, 4))(
    *(splits.on_canvas(images, 512)[0], image_size, padding), np.array(sizes), resize
  )
  for image, expected in zip(images, ours, strict=True):
    found = run(image[None])[0].transpose(1, 2, 0)
    np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=str(image.shape))


def test_mean_and_deviation_of_each_channel_are_part_of_it():
  graph = Graph()
  onnx_preparing.add_preparation(graph, 'images', 17, 0, 1.0, Options(input_mean='0.1,0.2,0.3', input_std='0.5'), 3)
  mean, std = (graph.weights[f'prepare/{name}/values'] for name in ('input_mean', 'input_std'))
  assert (mean.shape, std.shape) == ((3, 1, 1), (1, 1, 1))
  np.testing.assert_allclose(mean.ravel(), (0.1, 0.2, 0.3))
  assert [name for _, name, *_ in graph.nodes[-2:]] == ['prepare/input_mean', 'prepare/input_std']


# The file ------------------------------------------------------------------------------------------------------------


def test_the_file_says_what_it_is():
  classes = tuple('abcdefgh') + ('Tür', '猫')
  model = onnx_files.make_model(random_classifier(classes=classes))
  properties = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
  assert properties['classes'] == list(classes)
  assert 'resized to 17 pixels' in properties['preparation']
  assert properties['preparation'] in model.graph.doc_string
  assert [(entry.domain, entry.version) for entry in model.opset_import] == [('', 13)]
  assert model.ir_version == 7


def test_the_writer_checks_the_graph_and_names_itself(tmp_path):
  model = onnx_files.make_model(random_classifier())
  onnx_files.save(model, tmp_path / 'x.onnx')
  again = onnx.load(tmp_path / 'x.onnx')
  assert (again.producer_name, again.producer_version) == ('googlenet_jax', __version__)
  model.graph.node[-1].input[0] = 'elsewhere'
  with pytest.raises(onnx.checker.ValidationError):
    onnx_files.save(model, tmp_path / 'y.onnx')
  assert not (tmp_path / 'y.onnx').exists()


def test_the_network_in_the_graph_reads_as_in_the_paper():
  graph = Graph()
  onnx_network.add_network(graph, random_classifier().network, 'x')
  operators = collections.Counter(operator for operator, *_ in graph.nodes)
  convolutions = 3 + 6 * len(googlenet.TABLE)
  assert operators == {
    'Conv': convolutions, 'Relu': convolutions, 'Concat': len(googlenet.TABLE), 'MaxPool': 3 + len(googlenet.TABLE),
    'GlobalAveragePool': 1, 'Flatten': 1, 'Gemm': 1, 'Softmax': 1,
  }  # fmt: skip
  names = [name for _, name, *_ in graph.nodes]
  assert len(names) == len(set(names))
  stages = [name for name in names if '/' not in name and 'pool' not in name]
  assert stages == ['conv1', 'conv2_reduce', 'conv2', *googlenet.TABLE, 'head', 'logits', 'probabilities']
  assert [name for _, name, *_ in graph.nodes if name.startswith('inception_4a')] == [
    'inception_4a/ch1x1/conv', 'inception_4a/ch1x1', 'inception_4a/ch3x3_reduce/conv', 'inception_4a/ch3x3_reduce',
    'inception_4a/ch3x3/conv', 'inception_4a/ch3x3', 'inception_4a/ch5x5_reduce/conv', 'inception_4a/ch5x5_reduce',
    'inception_4a/ch5x5/conv', 'inception_4a/ch5x5', 'inception_4a/pool', 'inception_4a/pool_proj/conv',
    'inception_4a/pool_proj', 'inception_4a',
  ]  # fmt: skip


def test_a_file_that_would_be_too_large_is_refused(monkeypatch):
  monkeypatch.setattr(artefact, 'LARGEST', 100_000)
  with pytest.raises(UserError, match='the onnx file would have .* GiB, and the format ends at 2'):
    onnx_files.make_model(random_classifier())


# Whole exports -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(digits, tmp_path):
  config = helpers.small_config()
  return helpers.write_run(tmp_path / 'run', config, (1, helpers.random_state(config), 0.5, True))


def test_the_card_has_the_accuracy_of_the_file_itself(run):
  export.export_run(run, 'onnx', precision='int8')
  out = run / 'export' / 'onnx_int8'
  card = json.loads((out / 'card.json').read_text())
  first, *others = card['accuracy']
  assert first == {
    'of': 'this file, in int8', 'split': 'test', 'images': 104, 'crops': 1,
    'accuracy': card['artefact']['accuracy']['int8'],
  }  # fmt: skip
  assert [one['of'] for one in others] == ['the network in float32']
  assert card['check']['accepted'] is None
  assert card['artefact']['same_class']['share'] >= 0.8
  rows = [line for line in (out / 'README.md').read_text().splitlines() if '| 1 |' in line]
  assert rows[0] == f'| this file, in int8 | 104 of test | 1 | {100 * first["accuracy"]:.2f} % |'


@pytest.mark.parametrize('precision', ['float32', 'int8'])
def test_a_wrong_graph_is_refused_and_nothing_is_kept(run, precision, monkeypatch):
  folded = onnx_network.folded

  def wrong(layer):
    kernel, bias = folded(layer)
    return kernel, bias + (0.05 if kernel.shape[1] == 1 else 0)  # conv1 alone reads one channel

  monkeypatch.setattr(onnx_network, 'folded', wrong)
  with pytest.raises(UserError, match='the answers of onnx .*differ from ours by up to'):
    export.export_run(run, 'onnx', precision=precision)
  assert not (run / 'export').exists()


# Precisions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('precision', 'share', 'most'), [('float16', 0.6, 0.01), ('int8', 0.5, 0.3)])
def test_a_lower_precision_is_smaller_and_its_accuracy_measured(digits, precision, share, most, tmp_path, capfd):
  classifier = random_classifier(**{'model.norm': 'batch'})
  whole = written(classifier, tmp_path)
  made = reduced(classifier, tmp_path, precision, digits)
  images, path = digits.test.images, tmp_path / onnx_files.FILE
  assert abs(made.run(images) - whole(images)).max() < most
  assert (made.run(images).argmax(-1) == whole(images).argmax(-1)).mean() > 0.9
  said = [run(images).argmax(-1) for run in (whole, made.run)]
  before, after = ((labels == digits.test.labels).mean() for labels in said)
  same = (said[0] == said[1]).mean()
  assert made.facts['same_class'] == {'share': round(same, 6), 'accepted': 0.8}
  assert made.facts['accuracy'] == {
    'split': 'test', 'images': 104, 'float32': round(before, 6), precision: round(after, 6),
  }  # fmt: skip
  assert path.stat().st_size < share * made.facts['bytes_in_float32'] == share * (tmp_path / 'x.onnx').stat().st_size
  out, err = capfd.readouterr()
  assert f'accuracy {before:.4f} in float32, {after:.4f} in {precision}; the same class for ' in out
  assert f'{100 * same:.1f} % of the images (104 test images)' in out
  assert 'googlenet.onnx: 0.' in out
  assert ('WARNING' in err, 'onnxruntime' in out + err) == (False, False)
  json.dumps(made.facts)


def test_only_the_network_is_reduced(digits, tmp_path):
  classifier = random_classifier(**{'model.norm': 'lrn'})
  prepares = lambda model: {n.name: n for n in model.graph.node if 'prepare/' in n.name and 'Linear' not in n.name}
  softmax = lambda model: next(n for n in model.graph.node if n.op_type == 'Softmax')
  before = onnx_files.make_model(classifier)
  for precision in ('float16', 'int8'):
    reduced(classifier, tmp_path, precision, digits)
    model = onnx.load(tmp_path / onnx_files.FILE)
    assert prepares(model) == prepares(before)
    assert (model.producer_name, model.metadata_props) == ('googlenet_jax', before.metadata_props)
    assert softmax(model).name == 'probabilities'
    weights = {weight.name: numpy_helper.to_array(weight) for weight in model.graph.initializer}
    assert weights['prepare/index'].dtype == np.float32
    if precision == 'int8':
      quantised = [name for name, values in weights.items() if values.dtype == np.int8 and values.ndim == 4]
      assert len(quantised) == 3 + 6 * len(googlenet.TABLE)
      assert weights['conv2/kernel_scale'].shape == (192,)  # one for each channel
      assert max(abs(weights[name]).max() for name in quantised) <= 64  # seven bits
    else:
      assert weights['conv2/kernel'].dtype == np.float16


def test_float16_that_overflows_is_refused(tmp_path):
  """The maps of conv1 are beyond 65504, and conv2_reduce makes them small again."""
  classifier = copy.copy(random_classifier())
  params, statistics = copy.deepcopy(classifier.networks[0])
  classifier.networks = [(params, statistics)]
  params['conv1']['kernel'] *= 1e5
  params['conv2_reduce']['kernel'] *= 1e-5
  images = random_images(3, 17, 17)
  with np.errstate(all='ignore'):
    assert not np.isfinite(written(classifier, tmp_path, half=True)(images)).all()
  assert np.isfinite(written(classifier, tmp_path)(images)).all()


def test_images_of_many_sizes_are_run_in_batches_of_one_size():
  images = np.zeros((5, 9, 9, 1), np.uint8)
  sizes = np.array([[9, 9], [4, 5], [9, 9], [9, 9], [4, 5]], np.int32)
  split = splits.Split(images, np.arange(5, dtype=np.int32), sizes)
  found = [(part.shape, [*indices]) for part, indices in onnx_precision.batches(split, np.arange(5))]
  assert found == [((3, 9, 9, 1), [0, 2, 3]), ((2, 4, 5, 1), [1, 4])]


@pytest.mark.parametrize(('wrong', 'match'), [(2, ''), (6, '0.9400 in int8'), (21, 'the same class for 79.0 %')])
def test_a_lower_precision_that_costs_too_much_is_refused(wrong, match, capsys):
  labels, said = np.zeros(100, int), np.zeros(100, int)
  said[:wrong] = 1
  if not match:
    assert onnx_precision._compared(labels, said, labels, 'int8')['accuracy']['int8'] == 0.98
    assert 'warning: int8 costs 2.0 points of accuracy' in capsys.readouterr().err
    return
  truth = labels if wrong == 6 else labels + 2  # a network that is always wrong cannot lose accuracy
  with pytest.raises(UserError, match=f'nothing is kept: int8 costs too much .*{match}'):
    onnx_precision._compared(labels, said, truth, 'int8')


def test_the_answers_of_both_files_are_compared(digits, tmp_path, monkeypatch):
  said = iter([np.zeros(104, int), np.ones(104, int)])
  monkeypatch.setattr(onnx_precision, 'answers', lambda *_: next(said))
  with pytest.raises(UserError, match='nothing is kept: float16 costs too much .*the same class for 0.0 %'):
    reduced(random_classifier(), tmp_path, 'float16', digits)


def test_a_lower_precision_needs_the_test_images(digits, tmp_path):
  with pytest.raises(UserError, match='--precision=int8 is measured on the test images of a run'):
    reduced(random_classifier(), tmp_path, 'int8', digits._replace(test=None))
