import csv

import numpy as np
import pytest
from helpers import call_main, random_state, small_config, small_table, write_run
from PIL import Image

from googlenet_jax.evaluation import galleries, inspection
from googlenet_jax.model import googlenet, layer_table
from googlenet_jax.model.googlenet import GoogLeNet, count_multiply_adds, count_parameters, with_shapes
from googlenet_jax.model.options import D2L, Options
from googlenet_jax.model.torch_weights import TORCHVISION

PAPER = Options(norm='lrn', dropout=0.4, auxiliary='average_pool')


def rows_of(options, classes=10, channels=1, size=224):
  network = with_shapes(lambda rngs: GoogLeNet(classes, channels, options, image_size=size, rngs=rngs))
  return network, layer_table.layer_table(network, size)


def test_the_papers_network_is_the_papers_table():
  """Table 1: patch and stride, output, widths; DESIGN.md section 8: parameters and multiply-adds."""
  _, rows = rows_of(PAPER, 1000, 3)
  expected = [
    ('conv1', '7x7/2', (112, 112, 64)),
    ('max pool', '3x3/2', (56, 56, 64)),
    ('conv2', '3x3/1', (56, 56, 192)),
  ]
  expected += [('max pool', '3x3/2', (28, 28, 192)), ('inception 3a', '', (28, 28, 256))]
  expected += [('inception 3b', '', (28, 28, 480)), ('max pool', '3x3/2', (14, 14, 480))]
  expected += [(f'inception 4{x}', '', (14, 14, n)) for x, n in zip('abcde', (512, 512, 512, 528, 832), strict=True)]
  expected += [
    ('max pool', '3x3/2', (7, 7, 832)),
    ('inception 5a', '', (7, 7, 832)),
    ('inception 5b', '', (7, 7, 1024)),
  ]
  expected += [('aux_4a (after 4a)', '', (1000,)), ('aux_4d (after 4d)', '', (1000,))]
  expected += [('average pool', '7x7', (1024,)), ('dropout (40 %)', '', (1024,)), ('logits', '', (1000,))]
  assert [row[:3] for row in rows] == expected
  widths = {row.name: tuple(row.widths.values()) for row in rows if row.name.startswith('inception')}
  assert widths == {name.replace('_', ' '): tuple(own) for name, own in googlenet.TABLE.items()}
  parameters, convolutions, linear = layer_table.totals(rows)
  assert parameters == 6_998_552 + 6_379_728
  assert round(convolutions / 1e9, 3) == 1.582
  assert linear == 1024 * 1000
  by_name = {row.name: row for row in rows}
  assert by_name['inception 3a'].parameters == 163_696
  assert round(by_name['inception 3a'].convolutions / 1e6) == 128  # as in the paper's table


@pytest.mark.parametrize(
  ('options', 'channels', 'size'),
  [
    (D2L, 1, 33),
    (TORCHVISION, 3, 100),
    (Options(inception='naive', stem='small', norm='batch'), 3, 32),
    (Options(head='fully_connected', auxiliary='adaptive_pool'), 1, 64),
  ],
)
def test_the_table_adds_up_for_any_network(options, channels, size, monkeypatch):
  blocks = ('inception_3b', 'inception_4a', 'inception_4d', 'inception_4e', 'inception_5a')  # all places of pools
  monkeypatch.setattr(googlenet, 'TABLE', {name: googlenet.TABLE[name] for name in blocks})
  network, rows = rows_of(options, 7, channels, size)
  parameters, convolutions, linear = layer_table.totals(rows)
  assert parameters == count_parameters(network)
  assert convolutions == count_multiply_adds(network, size)
  kernels = [network.logits.kernel, *([network.hidden.kernel] if network.hidden else [])]
  assert linear == sum(kernel.size for kernel in kernels)
  pools = sum(row.name == 'max pool' for row in rows)
  assert pools == (3 if options.stem == 'small' else 4)
  # Each pool halves the map of the row before it, and the rows after it have its size.
  places = [i for i, row in enumerate(rows) if row.name == 'max pool']
  for i in places:
    (before, after), (height, _, features) = (rows[i - 1].output, rows[i + 1].output), rows[i].output
    assert (height, features) == (after[0], before[2])
    assert before[0] // 2 <= height <= before[0] // 2 + 1
  windows = [rows[i].kernel for i in places]
  assert windows[-1] == ('2x2/2' if options.pool == 'torchvision' else '3x3/2')


def test_auxiliary_classifiers_count_what_they_compute():
  _, rows = rows_of(Options(auxiliary='average_pool'), 10, 1)
  aux = next(row for row in rows if row.auxiliary)
  assert (aux.convolutions, aux.linear) == (16 * 512 * 128, 2048 * 1024 + 1024 * 10)
  assert sum(row.parameters for row in rows if row.auxiliary) == 4_350_228


def test_the_text_is_aligned():
  lines = layer_table.cells(rows_of(D2L)[1])
  printed = layer_table.aligned(lines).splitlines()
  ends = {len(line) for line in printed if line.rstrip()[-1].isdigit()}
  assert max(ends) == len(printed[0])
  assert printed[-1].split() == ['total', '5,977,530', f'{1_502_982_144:,}']
  assert layer_table.markdown(lines).splitlines()[-1].startswith('| total |')


# --mode=inspect ------------------------------------------------------------------------------------------------------


def test_a_recipe_is_inspected_without_its_data(tmp_path):
  ended = call_main('--mode=inspect', '--config=configs/digits.py', f'--output={tmp_path}')
  assert (ended.status, ended.err) == (0, '')
  assert '10 classes, 1 channel: those of digits' in ended.out
  assert '  5,984,810  ' in ended.out
  rows = [*csv.reader((tmp_path / 'layers.csv').read_text().splitlines())]
  assert rows[0] == list(layer_table.HEAD)
  assert rows[-1][-2] == '5984810'
  assert {path.name for path in tmp_path.iterdir()} == {'layers.md', 'layers.csv'}


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('fashion_mnist', (10, 1, 'of fashion_mnist')),
    ('imagenet2012', (1000, 3, 'of imagenet2012')),
    ('folder', (1000, 3, 'of ImageNet, because config.data.source_dir names no folder')),
    ('flowers', (1000, 3, 'of ImageNet, because those of data.name=flowers are not known before it is read')),
  ],
)
def test_classes_and_channels_of_data_that_are_not_read(name, expected):
  assert inspection.data_of(small_config(**{'data.name': name})) == expected


def test_recipes_for_pictures_of_your_own_are_inspected_without_pictures_or_weights(monkeypatch):
  monkeypatch.setattr(googlenet, 'TABLE', small_table())
  for name in ('folder', 'finetune'):
    ended = call_main('--mode=inspect', f'--config=configs/{name}.py')
    assert (ended.status, ended.err) == (0, '')
    words = '1000 classes, 3 channels: those of ImageNet, because config.data.source_dir names no folder'
    assert words in ended.out


def test_a_folder_of_pictures_tells_the_classes(tmp_path, monkeypatch):
  monkeypatch.setattr(googlenet, 'TABLE', small_table())
  for name in 'abc':
    (tmp_path / name).mkdir()
    (tmp_path / name / '1.png').touch()
  arguments = [
    '--config.data.name=folder',
    f'--config.data.source_dir={tmp_path}',
    '--config.data.validation_examples=0',
  ]
  ended = call_main('--mode=inspect', '--config=configs/digits.py', *arguments)
  assert (ended.status, ended.err) == (0, '')
  assert f'3 classes, 3 channels: those of the folder {tmp_path} (3 channels unless all pictures are grey)' in ended.out


def test_a_run_shows_its_filters(tmp_path, monkeypatch):
  monkeypatch.setattr(googlenet, 'TABLE', small_table())
  workdir = write_run(tmp_path / 'run', small_config(), (7, random_state(small_config()), None, True))
  ended = call_main('--mode=inspect', f'--workdir={workdir}')
  assert (ended.status, ended.err) == (0, '')
  assert f'10 classes, 1 channel: those of the run in {workdir}' in ended.out
  with Image.open(workdir / 'filters.png') as picture:
    assert len(np.unique(np.asarray(picture))) > 30
  ended = call_main('--mode=inspect', f'--workdir={workdir}', '--step=3')
  assert (ended.status, len(ended.err.splitlines())) == (2, 1)
  assert 'there is no checkpoint of step 3' in ended.err
  ended = call_main('--mode=inspect', f'--workdir={workdir}', '--config.image_size=32')
  assert 'holds a run of another recipe (image_size: 17 in the run, 32 given)' in ended.err


@pytest.mark.parametrize('channels', [1, 3])
def test_filters_have_one_symmetric_scale(channels):
  kernel = np.random.default_rng(0).normal(0, 0.1, (7, 7, channels, 64)).astype(np.float32)
  kernel[0, 0, 0, 5] = -2.5
  figure = galleries._filters_figure(kernel, 'runs/mine')
  shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
  assert len(shown) == 64
  np.testing.assert_allclose(shown[5].reshape(7, 7, channels)[0, 0, 0], 0, atol=1e-6)
  np.testing.assert_allclose(shown[7].reshape(7, 7, channels), 0.5 + kernel[..., 7] / 5, atol=1e-6)
  assert '2.5' in figure.get_suptitle()
