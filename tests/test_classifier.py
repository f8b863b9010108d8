import logging
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import least_table, random_state, small_config, write_run
from PIL import Image

import googlenet_jax
from googlenet_jax import runs
from googlenet_jax.data import augment, datasets
from googlenet_jax.host import sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet
from googlenet_jax.model.options import Options

# A recipe that uses everything that belongs to the preparation of images.
CHANGES = {'model.norm': 'batch', 'augment.padding': 1, 'augment.resize': 1.2, 'data.canvas': 64}
CLASSES = tuple('abcdefghij')


@pytest.fixture(autouse=True, scope='module')
def small_network():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(googlenet, 'TABLE', least_table())
    yield


@pytest.fixture(scope='module')
def workdir(state, tmp_path_factory):
  return write_run(tmp_path_factory.mktemp('runs') / 'single', small_config(**CHANGES), (7, state, None, True))


@pytest.fixture(scope='module')
def classifier(workdir):
  return googlenet_jax.load(workdir, mesh=sharding.make_mesh(jax.devices()[:1]))


@pytest.fixture(scope='module')
def digits():
  return datasets.load('digits').test.images


@pytest.fixture(scope='module')
def end_points():
  """What the network computes, without Classifier: `end_points(params, batch_stats, prepared images)`."""
  network = googlenet.with_shapes(lambda rngs: googlenet.GoogLeNet(10, 1, Options(norm='batch'), rngs=rngs))
  graphdef, _ = nnx.split(network)

  @jax.jit
  def compute(params, batch_stats, image):
    out = nnx.merge(graphdef, params, batch_stats).end_points(image)
    return {**out, 'probabilities': jax.nn.softmax(out['logits'])}

  return compute


@jax.jit
def prepared(image):
  return augment.prepare(image, 17, padding=1, resize=1.2)


@pytest.fixture(scope='module')
def state(digits, end_points):
  """The last layer is spread and centred, or every image would get the same answer."""
  state = random_state(small_config(**CHANGES))
  head = end_points(state.params, state.batch_stats, prepared(digits[:70]))['head']
  kernel = state.params['logits']['kernel'] * (4 / (head @ state.params['logits']['kernel']).std(0))
  return state.replace(params={**state.params, 'logits': {'kernel': kernel, 'bias': -head.mean(0) @ kernel}})


@pytest.fixture(scope='module')
def expected(state, digits, end_points):
  """End points and probabilities of the first 70 test images."""
  return jax.device_get(end_points(state.params, state.batch_stats, prepared(digits[:70])))


# Arrays --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('count', [0, 1, 3, 8, 9, 70])
def test_probabilities_are_those_of_the_network(count, classifier, digits, expected):
  found = classifier.probabilities(digits[:count])
  assert (found.shape, found.dtype) == ((count, 10), np.float32)
  np.testing.assert_allclose(found, expected['probabilities'][:count], rtol=1e-4, atol=1e-6)


def test_the_answers_to_compare_with_differ(expected):
  assert expected['probabilities'].max(-1).mean() > 0.5
  assert len(set(expected['probabilities'].argmax(-1).tolist())) > 5


def test_one_image_gives_one_answer(classifier, digits, expected):
  found = classifier.probabilities(digits[5])
  assert found.shape == (10,)
  np.testing.assert_allclose(found, expected['probabilities'][5], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_floating_point_images_are_those_of_bytes_divided_by_255(dtype, classifier, digits):
  images = digits[:3]
  found = classifier.probabilities(images.astype(dtype) / dtype(255))
  np.testing.assert_allclose(found, classifier.probabilities(images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
def test_images_of_low_precision_are_read(dtype, classifier, digits):
  images = (digits[:3] / 255).astype(dtype)
  found = classifier.probabilities(images)
  np.testing.assert_array_equal(found, classifier.probabilities(images.astype(np.float32)))
  np.testing.assert_array_equal(found, classifier.probabilities(jnp.asarray(images)))


def test_images_of_any_size_are_prepared_as_the_recipe_says(classifier, state, end_points):
  images = np.random.default_rng(0).integers(0, 256, (3, 30, 21, 1), np.uint8)
  out = end_points(state.params, state.batch_stats, prepared(images))
  np.testing.assert_allclose(classifier.probabilities(images), out['probabilities'], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  ('images', 'message'),
  [
    (np.zeros((8, 8), np.uint8), r'images of shape \(8, 8\) do not fit: give \[B, H, W, 1\], \[H, W, 1\], a path or'),
    (np.zeros((2, 8, 8), np.uint8), r'images of shape \(2, 8, 8\) do not fit'),
    (np.zeros((2, 8, 8, 3), np.uint8), r'images of shape \(2, 8, 8, 3\) do not fit'),
    (np.zeros((1, 2, 8, 8, 1), np.uint8), 'do not fit'),
    (np.zeros((2, 0, 8, 1), np.uint8), 'do not fit'),
    (5, r'images of shape \(\) do not fit'),
    ([], r'images of shape \(0,\) do not fit'),
    ([np.zeros((8, 8, 1)), np.zeros((9, 8, 1))], 'images of different sizes do not fit'),
    (['a.png', np.zeros((8, 8, 1))], 'images of different sizes do not fit'),
    (np.zeros((2, 8, 8, 1), np.int32), 'images of type int32 do not fit: give uint8, or floating point in'),
    (np.zeros((2, 8, 8, 1), bool), 'images of type bool do not fit'),
    (np.zeros((2, 8, 8, 1), np.complex64), 'images of type complex64 do not fit'),
    (np.full((2, 8, 8, 1), 255.0), r'must lie in \[0, 1\], these range from 255 to 255: divide by 255, or give uint8'),
    (np.full((2, 8, 8, 1), -0.1), r'these range from -0.1 to -0.1'),
    (np.full((2, 8, 8, 1), np.nan), r'these range from nan to nan'),
  ],
)
@pytest.mark.parametrize('method', ['probabilities', 'features', 'predict'])
def test_arrays_that_do_not_fit_are_refused(images, message, method, classifier):
  with pytest.raises(ValueError, match=message):
    getattr(classifier, method)(images)


def test_predictions_have_name_probability_and_label(classifier, digits, expected):
  found = classifier.predict(digits[:9])
  for one, row in zip(found, expected['probabilities'], strict=False):
    assert one.label == row.argmax()
    assert one.name == CLASSES[row.argmax()]
    assert one.probability == pytest.approx(row.max(), rel=1e-4)
    assert [type(value) for value in one] == [str, float, int]
  assert len(found) == 9
  assert classifier.predict(digits[4]) == classifier.predict(digits[4:5])[0]
  assert classifier.predict(digits[:0]) == []


# Pictures ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
  """Pictures of several sizes; the last is larger than the canvas."""
  folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(1)
  for number, shape in enumerate([(30, 20), (8, 8), (41, 64), (100, 80)]):
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f'{number}.png')
  return sorted(folder.iterdir())


def test_pictures_of_several_sizes_are_prepared_each_by_itself(paths, classifier, state, end_points):
  images = [Image.open(path) for path in paths]
  images[-1] = images[-1].resize((51, 64), Image.Resampling.BILINEAR)
  ready = jnp.concatenate([prepared(np.asarray(image)[None, :, :, None]) for image in images])
  rows = np.asarray(end_points(state.params, state.batch_stats, ready)['probabilities'])
  np.testing.assert_allclose(classifier.probabilities(paths), rows, rtol=1e-3, atol=1e-5)
  for path, row in zip(paths, rows, strict=True):
    np.testing.assert_allclose(classifier.probabilities(str(path)), row, rtol=1e-3, atol=1e-5)
  assert [one.label for one in classifier.predict(list(map(str, paths)))] == rows.argmax(-1).tolist()
  assert classifier.predict(paths[0]).label == rows[0].argmax()


def test_prepared_images_are_what_the_network_takes(paths, classifier, digits):
  found = classifier.prepared(digits[:3])
  np.testing.assert_allclose(found, prepared(digits[:3]), atol=1e-6)
  np.testing.assert_array_equal(classifier.prepared(digits[1]), found[1])
  of_paths = classifier.prepared(paths)
  assert of_paths.shape == (len(paths), 17, 17, 1)
  assert of_paths.dtype == np.float32
  assert 0 <= of_paths.min() < of_paths.max() <= 1


def test_a_picture_and_its_array_have_one_answer(classifier, digits, tmp_path):
  Image.fromarray(digits[0, ..., 0]).save(tmp_path / 'a.png')
  np.testing.assert_allclose(
    classifier.probabilities(tmp_path / 'a.png'), classifier.probabilities(digits[0]), rtol=1e-4, atol=1e-6
  )


def test_a_picture_that_cannot_be_read_is_named(classifier, paths, tmp_path):
  with pytest.raises(UserError, match=f'^{tmp_path}/none.png does not exist'):
    classifier.predict([paths[0], tmp_path / 'none.png'])


# Stages, crops, devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['conv1', 'inception_4a', 'head', 'logits'])
def test_features_are_the_end_points(name, classifier, digits, expected):
  found = classifier.features(digits[:8], name)
  assert found.shape == (8, *expected[name].shape[1:])
  np.testing.assert_allclose(found, expected[name][:8], rtol=1e-3, atol=1e-4)


def test_features_of_one_image_and_of_none(classifier, digits, expected):
  np.testing.assert_allclose(classifier.features(digits[2], 'conv1'), expected['conv1'][2], rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(classifier.features(digits[:8]), classifier.features(digits[:8], 'head'))
  assert classifier.features(digits[:0], 'conv1').shape == (0, *expected['conv1'].shape[1:])


def test_an_unknown_stage_is_answered_with_all(classifier, digits):
  with pytest.raises(
    ValueError, match="'inception_9z' is no stage of the network: choose from conv1, .*, inception_4a, "
  ):
    classifier.features(digits[:1], 'inception_9z')


def test_the_network_below(classifier, state, digits):
  assert isinstance(classifier.network, googlenet_jax.GoogLeNet)
  params, batch_stats = nnx.state(classifier.network, nnx.Param, nnx.BatchStat)
  for found, expected in ((params, state.params), (batch_stats, state.batch_stats)):
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(found), expected)
  logits = jax.eval_shape(classifier.network, prepared(digits[:8]))
  assert (logits.shape, logits.dtype) == ((8, 10), np.float32)


def test_crops_are_averaged(classifier, digits):
  """By the program that evaluates, see test_crops.py."""
  log_p = classifier.predict_step(10)(
    classifier.networks[0], sharding.shard_batch({'image': digits[:8]}, classifier.mesh)
  )
  found = classifier.probabilities(digits[:7], crop_count=10)
  np.testing.assert_allclose(found, np.exp(log_p)[:7], rtol=1e-4, atol=1e-6)
  assert np.abs(found - classifier.probabilities(digits[:7])).max() > 0.01


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda net, image: net.probabilities(image, crop_count=7), 'crop_count=7: choose from 1, 6, 10, 144'),
    (lambda net, image: net.probabilities(image, crop_count=0), 'crop_count=0: choose from'),
    (lambda net, image: net.explain(image, top=0), 'top=0: give a number of classes, 1 or more'),
  ],
)
def test_numbers_that_mean_nothing_are_refused(call, message, classifier, digits):
  with pytest.raises(ValueError, match=message):
    call(classifier, digits[0])


def test_any_number_of_devices_answers_the_same(workdir, digits, expected):
  classifier = googlenet_jax.load(workdir)
  assert classifier.mesh.size == 8
  for count in (1, 8):
    found = classifier.probabilities(digits[:count])
    np.testing.assert_allclose(found, expected['probabilities'][:count], rtol=1e-4, atol=1e-6)


@pytest.fixture
def compiled(caplog):
  """The names of the programs that JAX compiles."""
  caplog.set_level(logging.WARNING)
  with jax.log_compiles():
    yield lambda: [r.getMessage().split()[1] for r in caplog.records if r.getMessage().startswith('Compiling ')]


def test_a_second_call_compiles_nothing(workdir, digits, paths, compiled):
  classifier = googlenet_jax.load(workdir, mesh=sharding.make_mesh(jax.devices()[:1]))
  calls = [
    lambda: classifier.probabilities(digits[:3]),
    lambda: classifier.predict(str(paths[0])),
    lambda: classifier.features(digits[0], 'conv1'),
  ]
  first = []
  for call in calls:
    call()
    first += compiled()
  assert any('stage' in name for name in first)
  assert any('prepared' in name for name in first)
  before = len(compiled())
  for call in calls:
    call()
  assert compiled()[before:] == []
  classifier.predict(digits[:7])  # as many as 3 count as 8
  assert compiled()[before:] == []
  classifier.predict(digits[:7, :5])  # another size: only the small program is compiled
  assert all('prepared' in name for name in compiled()[before:])
  assert len(compiled()) > before


# Loading -------------------------------------------------------------------------------------------------------------


def test_a_classifier_knows_its_run(workdir, classifier):
  assert classifier.classes == CLASSES
  assert classifier.recipe == runs.read(workdir).config == small_config(**CHANGES)
  assert (classifier.channels, classifier.steps) == (1, [7])
  assert googlenet_jax.load(str(workdir)).steps == [7]


def test_a_run_may_be_copied_to_another_folder(workdir, tmp_path, monkeypatch, classifier, digits):
  shutil.copytree(workdir, tmp_path / 'copy')
  monkeypatch.setenv('HOME', str(tmp_path))
  copy = googlenet_jax.load('~/copy', mesh=classifier.mesh)
  for array, other in zip(jax.tree.leaves(copy.networks), jax.tree.leaves(classifier.networks), strict=True):
    np.testing.assert_array_equal(array, other)


def test_statistics_are_those_of_the_weights(state, workdir, classifier):
  (params, batch_stats) = classifier.networks[0]
  np.testing.assert_array_equal(params['logits']['kernel'], state.params['logits']['kernel'])
  for name in ('mean', 'var'):
    np.testing.assert_array_equal(batch_stats['conv1']['norm'][name], state.batch_stats['conv1']['norm'][name])


# Ensembles -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def ensemble(tmp_path_factory):
  folder, states = tmp_path_factory.mktemp('ensemble'), []
  for member in range(3):
    config = small_config(**CHANGES, **{'ensemble.members': 3, 'ensemble.member': member})
    states.append(random_state(config, seed=10 + member))
    write_run(folder / f'member_{member}', config, (7 + member, states[-1], 0.5, True))
  return folder, states


def test_an_ensemble_averages_the_probabilities_of_its_members(ensemble, digits, end_points):
  folder, states = ensemble
  found = googlenet_jax.load(folder, mesh=sharding.make_mesh(jax.devices()[:1]))
  assert found.steps == [7, 8, 9]
  out = [jax.device_get(end_points(s.params, s.batch_stats, prepared(digits[:8]))) for s in states]
  mean = np.mean([one['probabilities'] for one in out], axis=0)
  np.testing.assert_allclose(found.probabilities(digits[:8]), mean, rtol=1e-4, atol=1e-6)
  assert [one.label for one in found.predict(digits[:8])] == mean.argmax(-1).tolist()
  np.testing.assert_allclose(found.features(digits[:8]), out[0]['head'], rtol=1e-3, atol=1e-4)


def test_the_step_of_an_ensemble(ensemble):
  folder, _ = ensemble
  assert googlenet_jax.load(folder, 'best').steps == [7, 8, 9]
  with pytest.raises(UserError, match=f'^{folder} is an ensemble: --step=N is for a single run; take the newest, or'):
    googlenet_jax.load(folder, 7)
  assert googlenet_jax.load(folder / 'member_1', 8).steps == [8]


def test_members_of_different_recipes_are_refused(tmp_path, state):
  for member, changes in enumerate(({}, {'learning_rate': 0.5})):
    config = small_config(**CHANGES, **changes, **{'ensemble.member': member})
    write_run(tmp_path / f'member_{member}', config, (1, state, None, True))
  with pytest.raises(UserError, match='learning_rate: 0.01 there, 0.5 here'):
    googlenet_jax.load(tmp_path)


# The package ---------------------------------------------------------------------------------------------------------


def test_the_public_names():
  assert dir(googlenet_jax) == sorted(
    ['Classifier', 'GoogLeNet', 'Options', 'UserError', '__version__', 'load', 'train']
  )
  for name in dir(googlenet_jax):
    assert getattr(googlenet_jax, name) is not None
  with pytest.raises(AttributeError, match="module 'googlenet_jax' has no attribute 'lod'"):
    _ = googlenet_jax.lod


def test_predicting_is_quiet_and_imports_no_training_and_no_data_sets(workdir, paths, classifier):
  widths = {name: tuple(widths) for name, widths in least_table().items()}
  code = f"""
import sys
from googlenet_jax.model import googlenet
googlenet.TABLE = {{name: googlenet.Widths(*widths) for name, widths in {widths}.items()}}
import googlenet_jax
from googlenet_jax.evaluation import explain, predict
print(googlenet_jax.load({str(workdir)!r}).predict({str(paths[0])!r}))
unwanted = 'googlenet_jax.training', 'googlenet_jax.data.datasets', 'tensorflow', 'torch', 'grain', 'sklearn'
print([name for name in sys.modules if name.startswith(unwanted)])
"""
  environment = os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parent.parent)}
  done = subprocess.run(
    [sys.executable, '-W', 'default', '-c', code], env=environment, capture_output=True, text=True, check=False
  )
  assert done.stderr == ''
  answer, modules = done.stdout.splitlines()
  assert answer.startswith(f'Prediction(name={classifier.predict(paths[0]).name!r}, probability=0.')
  assert modules == '[]'


def test_the_devices_of_this_process_predict_the_same(classifier, digits, monkeypatch):
  assert classifier.of_this_process() is classifier
  monkeypatch.setattr(jax, 'process_index', lambda: 0)
  mesh = sharding.make_mesh(jax.local_devices()[:2])
  other = googlenet_jax.Classifier(classifier.recipe, classifier.classes, 1, classifier.networks, mesh)

  class Device:  # of another process
    process_index = 1

  other.mesh = type('Mesh', (), {'devices': np.array([*mesh.devices, Device()]), 'size': 3})
  own = other.of_this_process()
  assert list(own.mesh.devices) == list(mesh.devices)
  np.testing.assert_allclose(own.probabilities(digits[:3]), classifier.probabilities(digits[:3]), rtol=1e-4)
