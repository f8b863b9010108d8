"""Beginning with the weights of another run or of a file, frozen stages, and what is said about it."""

import contextlib
import io
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
  call_main,
  draw_nothing,
  least_table,
  make_whole_runs_cheap,
  random_state,
  small_config,
  small_table,
  write_run,
)

from googlenet_jax import runs
from googlenet_jax.host import sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet, torch_weights, weight_files
from googlenet_jax.model.googlenet import make_network, split
from googlenet_jax.model.layers import conv
from googlenet_jax.model.options import Options
from googlenet_jax.training import finetune, optimizers, step
from googlenet_jax.training.state import TrainState, create_state, partition

LETTERS = tuple('abcdefghij')
BATCH = {'model.norm': 'batch'}


def source_run(workdir, averaged=False, **changes):
  """A run with random weights; returns its state."""
  config = small_config(**BATCH, average_decay=0.9 if averaged else 0.0, **changes)
  state = random_state(config)
  write_run(workdir, config, (7, state, None, True))
  return state


def scratch(config, classes, channels):
  """A state whose every value is 0.5, which no source has."""
  shape = googlenet.with_shapes(lambda rngs: make_network(config, len(classes), channels, rngs))
  params, batch_stats = (jax.tree.map(lambda a: jnp.full(a.shape, 0.5), tree) for tree in split(shape)[1:])
  averaged = {'params': params, 'batch_stats': batch_stats} if config.average_decay else {}
  return TrainState(jnp.int32(0), params, batch_stats, {}, averaged, jnp.int32(0))


def begin(config, workdir, classes=LETTERS, channels=1):
  """Returns the first state of a run with these classes, the recipe it has, and what was printed."""
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    config = finetune.with_network_of_source(config, workdir)
    classifier = types.SimpleNamespace(classes=classes, mesh=sharding.make_mesh(jax.devices()[:1]))
    state = finetune.initialise(scratch(config, classes, channels), config, classifier)
  return state, config, printed.getvalue().splitlines()


def assert_same(ours, theirs, but=()):
  for name, part in theirs.items():
    if name not in but:
      jax.tree.map(np.testing.assert_array_equal, ours[name], part)


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch):
  table = small_table()
  del table['inception_3b']
  monkeypatch.setattr(googlenet, 'TABLE', table)


@pytest.fixture
def networks(tmp_path):
  """Folders of a source and of a run."""
  return tmp_path / 'source', tmp_path / 'run'


# From a run ----------------------------------------------------------------------------------------------------------


def test_a_run_with_the_same_classes_gives_every_weight_and_its_network(networks):
  source, run = networks
  theirs = source_run(source, **{'model.input_mean': '0.3'})
  config = small_config(init_from=str(source), average_decay=0.9, **{'model.dropout': 0.5, 'model.norm': 'lrn'})
  ours, config, lines = begin(config, run)
  assert (config.model.norm, config.model.input_mean, config.model.dropout) == ('batch', '0.3', 0.5)
  for part in ('params', 'batch_stats'):
    assert_same(getattr(ours, part), getattr(theirs, part))
    assert_same(ours.averaged[part], getattr(theirs, part))
  assert lines == [
    f'the network is that of {source}, whatever the recipe says: model.norm=batch, model.input_mean=0.3',
    f'first weights from {source}, step 7: 77 tensors (conv1 to inception_4d, logits)',
  ]


def test_averaged_weights_come_first(networks):
  source, run = networks
  theirs = source_run(source, averaged=True)
  ours, _, lines = begin(small_config(init_from=str(source)), run)
  assert_same(ours.params, theirs.averaged['params'])
  assert not ours.averaged
  assert lines[-1].startswith(f'first weights from {source}, step 7, averaged weights: ')


@pytest.mark.parametrize(
  ('classes', 'why'),
  [
    (tuple('xyz'), '3 classes, and the source has 10 classes'),
    (tuple('abcdefghix'), 'the source has classes of other names'),
  ],
)
def test_a_head_for_other_classes_is_new(classes, why, networks):
  source, run = networks
  theirs = source_run(source, **{'model.auxiliary': 'adaptive_pool'})
  config = small_config(init_from=str(source), **BATCH)
  ours, config, lines = begin(config, run, classes)
  assert config.model.auxiliary == 'none'  # the recipe's own
  assert_same(ours.params, theirs.params, but=('logits', 'aux_4a', 'aux_4d'))
  assert all((leaf == 0.5).all() for leaf in jax.tree.leaves(ours.params['logits']))
  assert lines[-2:] == [
    f'new: 2 tensors (logits): {why}',
    'left out: 20 tensors (aux_4a.conv, aux_4a.fc1, aux_4a.fc2, aux_4d.conv, aux_4d.fc1, aux_4d.fc2, logits)',
  ]


def test_layers_of_a_head_that_do_not_fit_are_named_with_both_shapes(networks):
  """A fully connected head depends on the image size, and auxiliary classifiers may be missing."""
  source, run = networks
  theirs = source_run(source, **{'model.head': 'fully_connected'})
  config = small_config(init_from=str(source), image_size=33, **BATCH, **{'model.auxiliary': 'adaptive_pool'})
  ours, _, lines = begin(config, run)
  assert_same(ours.params, theirs.params, but=('hidden', 'logits'))
  sides = 'hidden.kernel has shape (28, 1024) there, and (112, 1024) here'
  assert f'new: 4 tensors (hidden, logits): {sides}' in lines
  assert 'left out: 4 tensors (hidden, logits)' in lines
  missing = 'aux_4a.conv, aux_4a.fc1, aux_4a.fc2, aux_4d.conv, aux_4d.fc1, aux_4d.fc2'
  assert f'new: 18 tensors ({missing}): not in the source' in lines


def test_the_first_member_of_an_ensemble_is_the_source(networks):
  source, run = networks
  theirs = source_run(source / 'member_0')
  ours, _, _ = begin(small_config(init_from=str(source)), run)
  assert_same(ours.params, theirs.params)


# Grey and colour -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('before', [3, 1])
@pytest.mark.parametrize(
  'prepared', [{}, {'input_mean': '0.5', 'input_std': '0.5'}, {'input_mean': '0.4', 'input_std': '0.2,0.3,0.25'}]
)
def test_grey_pictures_look_the_same_in_one_channel_and_in_three(before, prepared):
  options, rng = Options(**prepared), np.random.default_rng(0)
  kernel = rng.normal(size=(7, 7, before, 4)).astype(np.float32)
  adapted, exact = finetune.adapt_channels(kernel, 4 - before, options)
  assert exact
  assert adapted.shape == (7, 7, 4 - before, 4)
  kernels = {before: kernel, 4 - before: adapted.astype(np.float32)}
  grey, maps = rng.random((1, 9, 9, 1), np.float32), []
  for channels, own in kernels.items():
    network = googlenet.with_shapes(lambda rngs, n=channels: googlenet.GoogLeNet(10, n, options, rngs=rngs))
    image = network._normalised(jnp.asarray(np.repeat(grey, channels, axis=-1)))
    maps.append(conv(image, jnp.asarray(own), 2))
  np.testing.assert_allclose(*maps, rtol=1e-5, atol=1e-4)


def test_different_means_become_their_mean_and_it_says_so(networks):
  kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 4))
  imagenet = Options(input_mean='0.485,0.456,0.406')
  adapted, exact = finetune.adapt_channels(kernel, 1, imagenet)
  assert not exact
  np.testing.assert_allclose(adapted[:, :, 0], kernel.sum(2))
  assert finetune.adapt_channels(kernel[:, :, :1], 3, imagenet)[1]
  source, run = networks
  theirs = source_run(source, **{'model.input_mean': imagenet.input_mean})
  ours, _, lines = begin(small_config(init_from=str(source)), run, channels=3)
  third = np.repeat(theirs.params['conv1']['kernel'] / 3, 3, axis=2)
  np.testing.assert_allclose(ours.params['conv1']['kernel'], third, rtol=1e-6)
  assert 'conv1 adapted from 1 to 3 channels' in lines
  with pytest.raises(UserError, match='the first layer has 3 input channels, but the images have 4'):
    finetune.adapt_channels(kernel, 4, Options())


def test_a_key_that_contradicts_the_source_is_refused(networks):
  source, run = networks
  source_run(source)
  command = ['--mode=inspect', '--config=configs/digits.py', f'--workdir={run}', f'--config.init_from={source}']
  ended = call_main(*command, '--config.model.norm=batch', '--config.model.stem=small')
  assert (ended.status, ended.err) == (
    2,
    f"error: --config.model.stem=small: the network of config.init_from={source} has 'article', and its weights fit no "
    'other: leave this key out\n',
  )


# From a file ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(networks):
  """`written(suffix, naming)`: the weights of a small network as a file; returns its path and the state."""

  def write(suffix, naming='own', **model):
    config = small_config(**BATCH, **model)
    state = random_state(config)
    path = networks[0].with_suffix(suffix)
    weight_files.write(path, torch_weights.to_torch(state.params, state.batch_stats, 5, naming))
    return path, state

  return write


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_file_with_our_names(suffix, written, networks):
  path, theirs = written(suffix)
  config = small_config(init_from=str(path), **{'model.pool': 'torchvision', 'model.input_mean': '0.2'})
  ours, config, lines = begin(config, networks[1])
  assert_same(ours.params, theirs.params)
  assert_same(ours.batch_stats, theirs.batch_stats)
  assert (config.model.pool, config.model.input_mean) == ('torchvision', '0.2')  # no weight tells them
  network = 'model.norm=batch, model.pool=torchvision, model.input_mean=0.2'
  assert lines[0] == f'the network is that of {path}, whatever the recipe says: {network}'
  assert lines[2] == 'note: the source does not name its 10 classes, so its head is kept as it is'


def test_a_file_with_torchvisions_names_has_the_preparation_of_its_published_weights(written, networks):
  model = {'model.ch5x5_kernel': 3, 'model.auxiliary': 'adaptive_pool'}
  path, theirs = written('.pth', 'torchvision', **model)
  ours, config, lines = begin(small_config(init_from=str(path)), networks[1], tuple('xy'))
  assert_same(ours.params, theirs.params, but=('logits', 'aux_4a', 'aux_4d'))
  found = {name: config.model[name] for name in runs.OF_SOURCE}
  assert found == {name: getattr(torch_weights.PUBLISHED, name) for name in runs.OF_SOURCE}
  prepared = 'images are prepared as for the published weights of torchvision'
  assert lines[1].startswith(prepared)
  config = small_config(init_from=str(path), **{'model.input_mean': '0', 'model.input_std': '1'})
  _, config, lines = begin(config, networks[1])
  assert (config.model.input_mean, config.model.input_std, config.model.pool) == ('0', '1', 'torchvision')
  assert not any(line.startswith(prepared) for line in lines)


# Mistakes ------------------------------------------------------------------------------------------------------------


def test_a_source_that_cannot_be_read_is_one_line(networks, tmp_path):
  source, run = networks
  source.mkdir()
  (tmp_path / 'begun').mkdir()
  runs.write(tmp_path / 'begun', runs.Run(small_config(), LETTERS, (8, 8, 1)))
  weight_files.write(tmp_path / 'other.pth', {'fc.weight': np.zeros((3, 3), np.float32)})
  (tmp_path / 'text.pth').write_text('no weights')
  for name, message in {
    str(tmp_path / 'none'): 'there is no such folder: give the workdir of a run, or a file that ends with .pth, .pt',
    'https://download.pytorch.org/models/googlenet-1378be20.pth': 'is a URL, and files must be on this machine',
    'gs://b/x': '^config.init_from=gs://b/x is a URL, and files must be on this machine',
    f'file://{tmp_path}/none.pth': 'No such file',
    str(source): 'holds no run',
    str(tmp_path / 'begun'): 'the run holds no checkpoint yet',
    str(tmp_path / 'none.pth'): 'No such file',
    str(tmp_path / 'other.pth'): 'no weights of a GoogLeNet: conv1.weight is missing',
    str(tmp_path / 'text.pth'): 'is damaged',
  }.items():
    with pytest.raises(UserError, match=message) as error:
      finetune.with_network_of_source(small_config(init_from=name), run)
    assert name in str(error.value)
    assert '\n' not in str(error.value)


def test_a_tensor_that_does_not_fit_is_named_with_both_shapes(written, networks):
  path, theirs = written('.safetensors')
  tensors = torch_weights.to_torch(theirs.params, theirs.batch_stats)
  wrong = {
    'conv2.weight has shape (192, 64, 1, 1), but the network expects (192, 64, 3, 3)': {
      'conv2.weight': np.zeros((192, 64, 1, 1), np.float32)
    },
    'conv2.weight is missing; the network expects it with shape (192, 64, 3, 3)': {'conv2.weight': None},
    'conv9.weight of shape (3,) has no place in the network': {'conv9.weight': np.zeros(3, np.float32)},
    'conv2.norm.bias has shape (2, 5), but the network expects (192,)': {
      'conv2.norm.bias': np.zeros((2, 5), np.float32)
    },
    'conv2.weight holds values that are not finite numbers': {
      'conv2.weight': np.full((192, 64, 3, 3), np.nan, np.float32)
    },
  }
  for message, changes in wrong.items():
    changed = {name: array for name, array in (tensors | changes).items() if array is not None}
    weight_files.write(path, changed)
    with pytest.raises(UserError, match=re.escape(message)):
      begin(small_config(init_from=str(path)), networks[1])


# Frozen stages -------------------------------------------------------------------------------------------------------


def flops(freeze):
  """Floating point operations of a training step, as XLA counts them, and of the network alone."""
  config = small_config(**BATCH, freeze=freeze, init_from='x')
  mesh = sharding.make_mesh(jax.devices()[:1])
  tx = optimizers.make_optimizer(config, lambda _: 0.1)
  graphdef, params, batch_stats = split(googlenet.with_shapes(lambda rngs: make_network(config, 10, 1, rngs)))
  state = jax.eval_shape(lambda: create_state(config, 10, 1, tx, mesh)[1])
  number = jax.ShapeDtypeStruct((16,), jnp.int32)
  batch = {'image': jax.ShapeDtypeStruct((16, 17, 17, 1), jnp.uint8), 'label': number, 'index': number}
  lowered = step.make_train_step(graphdef, tx, config, mesh, 10).lower(state, batch)
  image = jax.ShapeDtypeStruct((16, 17, 17, 1), jnp.float32)
  forward = jax.jit(lambda *variables: nnx.merge(graphdef, *variables[:2])(variables[2]))
  return lowered.cost_analysis()['flops'], forward.lower(params, batch_stats, image).cost_analysis()['flops']


def test_frozen_stages_cost_no_gradient(monkeypatch):
  monkeypatch.setattr(googlenet, 'TABLE', least_table())
  whole, forward = flops('')
  head, _ = flops('inception_4a')
  assert whole > 2.5 * forward
  assert head < 1.2 * forward


def test_frozen_stages_have_no_momentum():
  config = small_config(**BATCH)
  shape = googlenet.with_shapes(lambda rngs: make_network(config, 10, 1, rngs))
  _, params, _ = split(shape)
  trained, frozen = partition(params, 'inception_4a')
  assert sorted(trained) == ['inception_4d', 'logits']
  assert sorted(frozen) == ['conv1', 'conv2', 'conv2_reduce', 'inception_4a']
  assert partition(params, '') == (params, {})


# A whole run ---------------------------------------------------------------------------------------------------------


def test_a_fine_tuned_run_continues_without_its_source(tmp_path, monkeypatch):
  """Frozen stages keep weights and statistics bit for bit. The same command, or --workdir alone, continues."""
  make_whole_runs_cheap(monkeypatch)
  draw_nothing(monkeypatch)
  source, run = tmp_path / 'source', tmp_path / 'run'
  theirs = source_run(source, **{'data.name': 'digits'})
  file = tmp_path / 'mine.py'
  file.write_text('from configs import default\n\n\ndef get_config():\n  return default.get_config()\n')
  values = {'data.name': 'digits', 'image_size': 17, 'batch_size': 32, 'init_from': source, 'freeze': 'inception_4a'}
  command = [f'--config={file}', f'--workdir={run}', *(f'--config.{name}={value}' for name, value in values.items())]
  command.append('--config.body_learning_rate=0.5')

  ended = call_main(*command, '--config.max_steps=2')
  assert ended.status == 0, ended.err
  assert 'model.norm=batch' in ended.out
  shutil.rmtree(source)
  for number, arguments in ((3, [*command, '--config.max_steps=3']), (4, [f'--workdir={run}', '--config.max_steps=4'])):
    ended = call_main(*arguments)
    assert ended.status == 0, ended.err
    assert f'continuing after step {number - 1} of {number}' in ended.out
  assert runs.read(run).config.model.norm == 'batch'

  from googlenet_jax.loading import load

  (params, batch_stats), frozen = load(run).networks[0], ('conv1', 'conv2_reduce', 'conv2', 'inception_4a')
  for ours, before in ((params, theirs.params), (batch_stats, theirs.batch_stats)):
    for name, part in ours.items():
      same = jax.tree.map(np.array_equal, part, before[name])
      assert all(jax.tree.leaves(same)) == (name in frozen), name

  ended = call_main(*command[:2], '--config.init_from=elsewhere')
  assert ended.status == 2
  assert 'init_from' in ended.err
