import jax
import numpy as np
import pytest
from helpers import call_main, random_state, small_config, small_table, write_run
from PIL import Image

import googlenet_jax
from googlenet_jax.classifier import Classifier, Explanation
from googlenet_jax.data import augment
from googlenet_jax.evaluation import explain, heat_maps
from googlenet_jax.evaluation.sources import Found
from googlenet_jax.host import sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet

SIZE = 17  # pixels: the last map has 2x2 cells


@pytest.fixture(autouse=True, scope='module')
def small_network():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(googlenet, 'TABLE', small_table())
    devices = jax.devices()[:1]
    patch.setattr(jax, 'devices', lambda: devices)
    patch.setattr(jax, 'local_devices', lambda: devices)
    yield


@pytest.fixture(scope='module')
def members():
  return [random_state(small_config(image_size=SIZE), seed) for seed in range(2)]


@pytest.fixture(scope='module')
def workdir(members, tmp_path_factory):
  config = small_config(image_size=SIZE, **{'augment.resize': 1.2, 'data.canvas': 64})
  return write_run(tmp_path_factory.mktemp('runs') / 'run', config, (7, members[0], None, True))


@pytest.fixture(scope='module')
def classifier(workdir):
  return googlenet_jax.load(workdir)


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).integers(0, 256, (5, 40, 50, 1), np.uint8)


# The maps ------------------------------------------------------------------------------------------------------------


def test_the_mean_of_a_map_plus_the_bias_is_the_logit_of_its_class(classifier, members, images):
  explanations = classifier.explain(images, top=10)
  logits, probabilities = classifier.features(images, 'logits'), classifier.probabilities(images)
  bias = members[0].params['logits']['bias']
  for found, own_logits, own in zip(explanations, logits, probabilities, strict=True):
    assert (found.maps.shape, found.maps.dtype) == ((10, 2, 2), np.float32)
    np.testing.assert_allclose(found.maps.mean((1, 2)) + bias[found.labels], own_logits[found.labels], rtol=1e-4)
    np.testing.assert_allclose(found.probabilities, np.sort(own)[::-1], rtol=1e-4)
    np.testing.assert_array_equal(found.labels, np.argsort(-own))
    assert found.names == tuple('abcdefghij'[label] for label in found.labels)
  maps = np.stack([found.maps for found in explanations])
  assert maps.std((2, 3)).min() > 0.01  # the cells differ


def test_one_image_and_fewer_classes(classifier, images):
  found = classifier.explain(images[1], top=2)
  whole = classifier.explain(images, top=3)[1]
  assert len(found.names) == len(found.maps) == 2
  np.testing.assert_allclose(found.maps, whole.maps[:2], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(found.picture, images[1])


def test_the_maps_of_an_ensemble_are_the_mean_of_its_members(classifier, members, images):
  both = [(state.params, state.batch_stats) for state in members]
  maps, probabilities = classifier.with_networks(both).class_maps({'image': images})
  alone = [classifier.with_networks([one]) for one in both]
  np.testing.assert_allclose(maps, np.mean([one.class_maps({'image': images})[0] for one in alone], axis=0), rtol=1e-5)
  np.testing.assert_allclose(probabilities, np.mean([one.probabilities(images) for one in alone], axis=0), rtol=1e-4)


def test_a_fully_connected_head_has_no_maps(images):
  config = small_config(**{'model.head': 'fully_connected'})
  classifier = Classifier(config, 'ab', 1, [], sharding.make_mesh())
  assert not classifier.tells_places
  with pytest.raises(UserError, match='model.head=fully_connected: class activation maps need global average pooling'):
    classifier.explain(images)


def test_one_cell_tells_no_places(classifier, monkeypatch):
  assert classifier.tells_places
  widths = next(iter(small_table().values()))
  monkeypatch.setattr(googlenet, 'TABLE', {**small_table(), 'inception_4e': widths, 'inception_5a': widths})
  assert not Classifier(small_config(), 'ab', 1, [], sharding.make_mesh()).tells_places


prepare = jax.jit(augment.prepare, static_argnums=(1, 2, 4))


@pytest.mark.parametrize('size', [(40, 100), (90, 17), (33, 33)])
@pytest.mark.parametrize(('padding', 'resize'), [(0, 256 / 224), (2, 1.0), (3, 1.3)])
def test_the_box_is_what_the_network_sees(size, padding, resize):
  """An image that is white in the box gives a white input; one that is white outside of it gives a black one."""
  (top, left), (height, width) = augment.seen(np.array(size), 32, padding, resize)
  border = padding / (32 - 2 * padding) * np.array([height, width]) * (32 - 2 * padding) / 32
  rows, columns = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
  for room, inside, value in ((1.5, 1.0, 1), (-1.5, 0.0, 0)):
    room = room * np.array([height, width]) / 32  # the filter reaches beyond the box by a pixel of the input
    within = ((rows > top + border[0] - room[0]) & (rows < top + height - border[0] + room[0]))[:, None] & (
      (columns > left + border[1] - room[1]) & (columns < left + width - border[1] + room[1])
    )
    image = np.where(within, inside, 1 - inside)[None, ..., None].astype(np.float32)
    seen = np.asarray(prepare(image, 32, padding, None, resize))[0, ..., 0]
    own = seen[padding : 32 - padding, padding : 32 - padding]
    if value:
      np.testing.assert_allclose(own, 1, atol=1e-5)
    else:
      np.testing.assert_allclose(own[3:-3, 3:-3], 0, atol=1e-5)
      assert own.max() > 0.1  # the box is not larger than what is seen


# The pictures --------------------------------------------------------------------------------------------------------


def test_a_map_lies_on_its_part_of_the_picture_and_the_rest_is_pale():
  picture = np.full((200, 400, 1), 100, np.uint8)
  drawn = heat_maps.overlay(picture, np.array([[2.0, 0], [0, -2]]), (0, 100, 200, 200), 2.0)
  assert drawn.shape == (200, 400, 3)
  grey = 100 / 255
  np.testing.assert_allclose(drawn[:, :100], heat_maps.UNSEEN + (1 - heat_maps.UNSEEN) * grey)
  np.testing.assert_allclose(drawn[:, 300:], heat_maps.UNSEEN + (1 - heat_maps.UNSEEN) * grey)
  share = heat_maps.STRONGEST
  for place, colour in (((0, 100), heat_maps.COLOURS(1.0)), ((199, 299), heat_maps.COLOURS(0.0))):
    np.testing.assert_allclose(drawn[place], (1 - share) * grey + share * np.array(colour[:3]), atol=0.01)
  np.testing.assert_allclose(drawn[100, 200], grey, atol=0.02)  # 0 leaves the picture as it is


@pytest.mark.parametrize(
  ('shape', 'box'),
  [
    ((8, 8, 1), (-1.0, -1.0, 10.0, 10.0)),  # with padding
    ((300, 4000, 3), (0.0, 1850.0, 300.0, 300.0)),
    ((1, 1, 3), (0.0, 0.0, 1.0, 1.0)),
    ((4000, 3, 1), (1998.5, 0.0, 3.0, 3.0)),
  ],
)
def test_pictures_of_any_size_are_drawn(shape, box):
  for picture in (np.zeros(shape, np.uint8), np.ones(shape, np.float32)):
    drawn = heat_maps.overlay(picture, np.ones((3, 3)), box, 1.0)
    assert np.isfinite(drawn).all()
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert max(drawn.shape) <= max(heat_maps.MOST, 2 * heat_maps.LEAST)


@pytest.mark.parametrize(('shape', 'count', 'places'), [((30, 40, 3), 3, 4), ((10, 90, 1), 2, 3), ((50, 20, 3), 6, 8)])
def test_the_figure_has_a_panel_for_each_class_and_says_what_colours_mean(shape, count, places, tmp_path):
  names = ('żółty', 'a $ sign', '日本', 'd', 'e', 'f')[:count]
  maps = np.random.default_rng(0).normal(size=(count, 2, 2)).astype(np.float32)
  explanation = Explanation(names, np.full(count, 0.25), np.arange(count), maps, np.zeros(shape), (0, 0, 10, 10))
  figure = explain.explanation_figure(explanation, Found('x\ny.png', 'a'), 'maps of runs/mine')
  above, below = figure.subfigs
  assert len(above.axes) == places
  titles = [axes.get_title().replace('\u00a0', ' ') for axes in above.axes]
  assert titles[: count + 1] == ['the picture', *(f'{name} (25 %)' for name in names)]
  assert 'x\\ny.png (true class: a)' in figure.get_suptitle()
  (bar,) = below.axes
  assert bar.get_xlim() == pytest.approx((-np.abs(maps).max(), np.abs(maps).max()), rel=1e-5)
  assert 'orange' in bar.get_title()
  assert '2x2 cells' in bar.get_xlabel()


def test_names_of_files_do_not_collide():
  names = explain.FileNames(['a/1.jpg', 'b/1.jpg', 'b/1.png', 'pictures/', 'pictures/in', '/'])
  for name, expected in (
    ('a/1.jpg', '1'),
    ('b/1.jpg', '1_2'),
    ('b/1.png', '1_3'),
    ('1_4.png', '1_4'),
    ('c/1.gif', '1_5'),
    ('pictures/rose/x y.jpg', 'rose_x_y'),
    ('pictures/ROSE/x\ny.jpg', 'ROSE_x_ny'),
    ('pictures/in/rose/a.jpg', 'rose_a'),
    ('/tmp/a.jpg', 'tmp_a'),
    ('l' * 250 + '.jpg', 'l' * 200),
  ):
    assert names.new(Found(name)) == f'{expected}_explained.png'


def test_explain_writes_a_picture_for_each_and_a_line(workdir, classifier, tmp_path):
  (tmp_path / 'b').mkdir()
  paths = [tmp_path / 'a.png', tmp_path / 'b' / 'a.png']
  for seed, path in enumerate(paths):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 90), np.uint8)).save(path)
  ended = call_main('--mode=explain', f'--workdir={workdir}', *paths, tmp_path / 'none.png', '--top=2')
  assert ended.status == 1
  assert ended.err.splitlines()[-1] == '1 of 3 pictures could not be read'
  for line, path, name in zip(ended.out.splitlines(), paths, ('a', 'a_2'), strict=True):
    found = classifier.explain(path, top=2)
    answers = '  '.join(f'{n} {p:.2f}' for n, p in zip(found.names, found.probabilities, strict=True))
    assert line == f'{path}  {answers}  -> {workdir}/explain/{name}_explained.png'
  with Image.open(workdir / 'explain' / 'a_explained.png') as picture:
    assert picture.size[0] == 1200
    assert len(np.unique(np.asarray(picture))) > 10
  assert found.picture.shape == (21, 64, 1)  # shrunk to the canvas
  assert found.box == pytest.approx((1.75, 23.25, 17.5, 17.5), abs=1)
