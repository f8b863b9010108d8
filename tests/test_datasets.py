import dataclasses
import functools
import gzip
import http.server
import io
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
import urllib3
from PIL import Image
from tensorflow_datasets.core import naming
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.image_classification import mnist

from googlenet_jax.data import datasets, preparing, splits
from googlenet_jax.host.errors import UserError

REAL = os.environ.get('FASHION_MNIST_DIR')
COUNTS = {'train': 60, 'test': 20}


def write_idx(path, array):
  with gzip.open(path, 'wb') as file:
    file.write(struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def originals(tmp_path, monkeypatch):
  """Four small files in the original format, and a checksum table with their checksums."""
  monkeypatch.delenv('FASHION_MNIST_DIR', raising=False)
  folder = tmp_path / 'originals'
  folder.mkdir()
  rng = np.random.default_rng(0)
  table, arrays = dict(checksums.get_all_url_infos()), {}  # the original is memoized
  for split, (images, labels) in preparing.IDX_FILES.items():
    arrays[split] = rng.integers(0, 256, (COUNTS[split], 28, 28), np.uint8), np.arange(COUNTS[split]) % 10
    for name, array in zip((images, labels), arrays[split], strict=True):
      write_idx(folder / name, array.astype(np.uint8))
      url = preparing._idx_builder('fashion_mnist').URL + name
      table[url] = checksums.compute_url_info(folder / name)
  monkeypatch.setattr(checksums, 'get_all_url_infos', lambda: dict(table))
  return folder, arrays


def test_original_files_are_prepared_and_read_back(originals, tmp_path):
  folder, arrays = originals
  data = datasets.load('fashion_mnist', str(folder), str(tmp_path / 'tfds'))
  assert data.image_shape == (28, 28, 1)
  assert data.class_names[0] == 'T-shirt/top'
  assert data.validation is None
  for split in ('train', 'test'):
    images, labels = arrays[split]
    found = getattr(data, split)
    assert len(found) == COUNTS[split]
    # TFDS shuffles: compare as sets of (image, label).
    expected = {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
    assert {(image.tobytes(), int(label)) for image, label in zip(found.images, found.labels, strict=True)} == expected
  # TFDS's own reader accepts the prepared set, and `load` needs the files no longer.
  assert len(tfds.data_source('fashion_mnist', split='test', data_dir=tmp_path / 'tfds', download=False)) == 20
  again = datasets.load('fashion_mnist', '', str(tmp_path / 'tfds'))
  np.testing.assert_array_equal(again.train.images, data.train.images)


def test_sets_too_large_for_memory_are_read_record_by_record(originals, tmp_path, monkeypatch):
  folder, _ = originals
  where = str(folder), str(tmp_path / 'tfds')
  in_memory = datasets.load('fashion_mnist', *where, validation_examples=7)
  monkeypatch.setattr(datasets, 'MAX_BYTES_IN_MEMORY', 1)
  streamed = datasets.load('fashion_mnist', *where, validation_examples=7)
  assert isinstance(streamed.validation.images, datasets.RecordImages)
  indices = np.array([5, 0, 3])
  for split in ('train', 'validation', 'test'):
    one, other = getattr(in_memory, split), getattr(streamed, split)
    np.testing.assert_array_equal(one.images[indices], other.images[indices])
    np.testing.assert_array_equal(one.labels, other.labels)


@pytest.mark.parametrize('harm', ['truncate', 'flip', 'swap'])
def test_a_damaged_file_is_named_and_nothing_is_prepared(originals, tmp_path, harm):
  folder, _ = originals
  path = folder / 'train-images-idx3-ubyte.gz'
  content = bytearray(path.read_bytes())
  if harm == 'truncate':
    path.write_bytes(content[:-100])
  elif harm == 'flip':
    content[200] ^= 1
    path.write_bytes(content)
  else:
    shutil.copy(folder / 't10k-images-idx3-ubyte.gz', path)
  with pytest.raises(UserError, match=r'train-images-idx3-ubyte.gz is not the original .* expected \d+ bytes'):
    datasets.load('fashion_mnist', str(folder), str(tmp_path / 'tfds'))
  assert not list((tmp_path / 'tfds').glob('**/*'))


def test_missing_file_and_missing_folder(originals, tmp_path):
  folder, _ = originals
  (folder / 't10k-labels-idx1-ubyte.gz').unlink()
  with pytest.raises(UserError, match='t10k-labels-idx1-ubyte.gz is missing'):
    datasets.load('fashion_mnist', str(folder), str(tmp_path / 'tfds'))
  with pytest.raises(UserError, match='is not a folder'):
    datasets.load('fashion_mnist', str(tmp_path / 'nowhere'), str(tmp_path / 'tfds'))


def test_the_environment_variable_replaces_source_dir(originals, tmp_path, monkeypatch):
  monkeypatch.setenv('FASHION_MNIST_DIR', str(originals[0]))
  assert len(datasets.load('fashion_mnist', '', str(tmp_path / 'tfds')).train) == 60


def test_damaged_prepared_files_are_reported(originals, tmp_path):
  folder, _ = originals
  datasets.load('fashion_mnist', str(folder), str(tmp_path / 'tfds'))
  (shard,) = (tmp_path / 'tfds').glob('**/*train*array_record*')
  info = shard.with_name('dataset_info.json')
  for path in shard, info:
    good = path.read_bytes()
    flipped = good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 255]) + good[len(good) // 2 + 1 :]
    for content in (None, b'', good[: len(good) // 2], flipped, b'{"a": 1}'):
      path.unlink() if content is None else path.write_bytes(content)
      with pytest.raises(UserError, match=r'fashion_mnist.*(damaged|has no dataset_info.json).* delete that folder'):
        datasets.load('fashion_mnist', str(folder), str(tmp_path / 'tfds'))
    path.write_bytes(good)
  assert len(datasets.load('fashion_mnist', str(folder), str(tmp_path / 'tfds')).train) == 60


@pytest.mark.parametrize('name', ['/etc', '../x', '..', 'mnist/', 'mnist:9.x'])
def test_a_name_that_is_none_says_nothing_of_folders(name, tmp_path):
  with pytest.raises(UserError) as caught:
    datasets.load(name, '', str(tmp_path))
  assert str(caught.value) == (
    f'config.data.name={name} is no name of a data set: write NAME, NAME/CONFIG or NAME:VERSION'
  )


def test_a_folder_elsewhere_is_never_to_be_deleted(tmp_path):
  (tmp_path / 'precious/3.0.1').mkdir(parents=True)
  (tmp_path / 'precious/3.0.1/dataset_info.json').write_text('{')
  (tmp_path / 'tfds').mkdir()
  (tmp_path / 'tfds/fashion_mnist').symlink_to(tmp_path / 'precious')
  with pytest.raises(UserError, match=r'cannot be read .*: if it is damaged, give another data.data_dir$'):
    datasets.load('fashion_mnist', '', str(tmp_path / 'tfds'))


def test_damage_that_is_met_while_training_is_reported(tmp_path):
  class Source:
    def __getitems__(self, indices):
      raise RuntimeError('hash mismatch\nblock 3')

  images = splits.RecordImages(Source(), np.arange(9), tmp_path)
  with pytest.raises(UserError, match=rf'^{tmp_path} is damaged .hash mismatch.: delete that folder and run again$'):
    images.take(np.arange(3))[np.arange(2)]


def test_a_header_that_claims_more_than_there_is_takes_no_memory(tmp_path):
  path = tmp_path / 'train-images-idx3-ubyte.gz'
  for shape, text in (((2**31, 28, 28), 'claims'), ((9, 28, 28), 'reshape')):
    with gzip.open(path, 'wb') as file:
      file.write(struct.pack('>HBB3I', 0, 8, 3, *shape))
    with pytest.raises(UserError, match=f'is a damaged idx file .*{text}.*: delete it and download it again'):
      preparing.read_idx(path)


@pytest.mark.parametrize(
  ('name', 'first'),
  [
    ('FashionMNIST', r'give the folder .* as --config.data.source_dir=DIR .* FASHION_MNIST_DIR=DIR.; '),
    ('Cifar10', ''),
  ],
)
def test_without_a_network_the_ways_out_are_named_at_once(name, first, tmp_path, monkeypatch):
  monkeypatch.delenv('FASHION_MNIST_DIR', raising=False)

  def unknown(*_, **__):
    raise socket.gaierror(-3, 'Temporary failure in name resolution')

  monkeypatch.setattr(urllib3.util.connection, 'create_connection', unknown)
  begin = time.monotonic()
  others = 'give a folder where TFDS has prepared it as --config.data.data_dir=DIR; or run `make demo`, .*'
  with pytest.raises(UserError, match=rf'could not be downloaded .Failed to resolve .*\. Ways out: {first}{others}'):
    datasets.load(name, '', str(tmp_path))
  assert time.monotonic() - begin < 3


def test_original_files_come_from_their_server(originals, tmp_path, monkeypatch, capsys):
  folder, arrays = originals
  handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
  monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, 'log_message', lambda *_: None)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/'
    monkeypatch.setattr(
      checksums, 'get_all_url_infos', lambda: {url + p.name: checksums.compute_url_info(p) for p in folder.iterdir()}
    )
    monkeypatch.setattr(mnist.FashionMNIST, 'URL', url)
    data = datasets.load('fashion_mnist:3.0.1', '', str(tmp_path / 'tfds'))
    server.shutdown()
  assert sorted(image.tobytes() for image in data.test.images) == sorted(image.tobytes() for image in arrays['test'][0])
  assert f'preparing fashion_mnist in {tmp_path}/tfds/fashion_mnist/3.0.1 from the network' in capsys.readouterr().out


def test_of_two_programs_that_prepare_a_set_the_second_reads_what_the_first_has_made(
  originals, tmp_path, monkeypatch, capsys
):
  where = str(originals[0]), str(tmp_path / 'tfds')
  builder = type(preparing.prepare('fashion_mnist', where[0], str(tmp_path / 'other')))
  generate, first = builder._generate_examples, []

  def while_the_other_ends(self, *files):
    if not first:
      first.append(True)
      datasets.load('fashion_mnist', *where)
    yield from generate(self, *files)

  monkeypatch.setattr(builder, '_generate_examples', while_the_other_ends)
  assert len(datasets.load('fashion_mnist', *where).train) == 60
  assert 'has been prepared by another program in the meantime' in capsys.readouterr().out
  assert len(list((tmp_path / 'tfds/fashion_mnist').iterdir())) == 1  # nothing half-made stays


@pytest.mark.parametrize(
  ('given', 'name', 'idx'),
  [('FashionMNIST', 'fashion_mnist', True), ('KMNIST:3.*.*', 'kmnist:3.*.*', True), ('Folder', 'folder', False),
   ('DIGITS', 'digits', False), ('Cifar10', 'cifar10', False), ('', '', False), ('石/X', '石/X', False)],
)  # fmt: skip
def test_names_are_normalised_as_in_tfds(given, name, idx):
  assert preparing.normalised(given) == name
  assert preparing.is_idx_set(name) is idx
  if idx:
    assert str(naming.parse_builder_name_kwargs(given)[0]) == name.partition(':')[0]


def test_held_out_images_are_always_the_same_and_not_in_the_training_set():
  data, again = (datasets.load('digits', validation_examples=200) for _ in range(2))
  assert (len(data.train), len(data.validation), len(data.test)) == (1237, 200, 360)
  np.testing.assert_array_equal(data.validation.images, again.validation.images)
  whole = datasets.load('digits').train
  both = np.concatenate([data.train.images, data.validation.images])
  assert sorted(i.tobytes() for i in both) == sorted(i.tobytes() for i in whole.images)


def test_digits():
  data = datasets.load('digits')
  assert data.train.images.shape == (1437, 8, 8, 1)
  assert data.train.images.dtype == np.uint8
  assert data.train.images.max() == 255
  assert np.bincount(data.test.labels).min() >= 34
  assert data.class_names == tuple('0123456789')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('no_such_set',), 'no_such_set'),
    (('cifar10', '/tmp'), 'data.source_dir is read for folder, fashion_mnist'),
    (('digits', '/tmp'), 'leave data.source_dir'),
    (('digits', '', '', 1437), 'leaves nothing to train on'),
  ],
)
def test_mistakes_are_reported(arguments, message):
  with pytest.raises(UserError, match=message):
    datasets.load(*arguments)


def test_tensorflow_and_pytorch_are_never_imported():
  code = (
    'import sys, pkgutil, importlib, googlenet_jax, tensorflow_datasets\n'
    'own = [m.name for m in pkgutil.walk_packages(googlenet_jax.__path__, "googlenet_jax.")]\n'
    'late = {"googlenet_jax.exporting.torch_network", "googlenet_jax.page.layout"}  # imported where they are used\n'
    'assert late < set(own)\n'
    'for name in own: name in late or importlib.import_module(name)\n'
    'from googlenet_jax.data import datasets; datasets.load("digits")\n'
    'assert "googlenet_jax.model.torch_weights" in sys.modules\n'
    'assert not {"tensorflow", "torch", "safetensors", "onnx", "gradio"} & set(sys.modules)'
  )
  root = pathlib.Path(__file__).parent.parent
  subprocess.run([sys.executable, '-c', code], check=True, cwd=root, timeout=100)


@pytest.mark.skipif(not REAL, reason='FASHION_MNIST_DIR does not name the four original files')
def test_the_real_files(tmp_path, monkeypatch):
  images, labels = (preparing.read_idx(pathlib.Path(REAL, name)) for name in preparing.IDX_FILES['train'])
  assert images.shape == (60_000, 28, 28)
  np.testing.assert_array_equal(np.bincount(labels), [6000] * 10)
  preparing._check_source(preparing._idx_builder('fashion_mnist')(data_dir=str(tmp_path)), pathlib.Path(REAL))
  # The test images serve as training images too: preparing 70,000 takes three times as long.
  monkeypatch.setattr(preparing, 'IDX_FILES', dict.fromkeys(('train', 'test'), preparing.IDX_FILES['test']))
  data = datasets.load('fashion_mnist', REAL, str(tmp_path), validation_examples=3000)
  assert (len(data.train), len(data.validation), len(data.test)) == (7000, 3000, 10_000)
  np.testing.assert_array_equal(np.bincount(data.test.labels), [1000] * 10)
  assert data.test.images.mean() / 255 == pytest.approx(0.2868, abs=5e-5)


SIZES = [(20, 30), (30, 20), (96, 40), (25, 25)]  # the third is larger than the canvas


@pytest.fixture
def many_sizes(tmp_path):
  """A prepared set in the form of TFDS's ImageNet: images of many sizes, and test images without labels."""

  class ManySizes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = {
        'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
        'label': tfds.features.ClassLabel(num_classes=5),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(split) for split in ('train', 'validation', 'test')}

    def _generate_examples(self, split):
      for i, (height, width) in enumerate(SIZES):
        png = io.BytesIO()
        Image.fromarray(np.full((height, width, 3), 10 * (i + 1), np.uint8)).save(png, 'png')
        yield i, {'image': png.getvalue(), 'label': -1 if split == 'test' else i}

  ManySizes.name = 'many_sizes'
  ManySizes(data_dir=str(tmp_path)).download_and_prepare(file_format='array_record')
  return 'many_sizes', '', str(tmp_path)


@pytest.mark.filterwarnings('ignore:.*no dataset_info.json')
def test_images_of_many_sizes_are_the_same_in_memory_and_on_disk(many_sizes, monkeypatch):
  loaded = datasets.load(*many_sizes, validation_examples=1, canvas=48)
  monkeypatch.setattr(datasets, 'MAX_BYTES_IN_MEMORY', 1)
  streamed = datasets.load(*many_sizes, validation_examples=1, canvas=48)
  assert loaded.image_shape == (48, 48, 3)
  assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [3, 1, 4]
  for name in ('train', 'validation', 'test'):
    split, other = getattr(loaded, name), getattr(streamed, name)
    batch, same = (s.batch(np.arange(len(s))) for s in (split, other))
    for key in ('image', 'label', 'size'):
      np.testing.assert_array_equal(batch[key], same[key])
    for place, label in enumerate(split.labels):
      height, width = (48, 20) if label == 2 else SIZES[label]
      assert tuple(batch['size'][place]) == (height, width)
      np.testing.assert_array_equal(split.picture(place), np.full((height, width, 3), 10 * (label + 1)))
      assert batch['image'][place].sum() == height * width * 3 * 10 * (label + 1)  # zeros outside the image


def test_validation_images_serve_as_test_images_without_labels(many_sizes):
  np.testing.assert_array_equal(np.sort(datasets.load(*many_sizes, canvas=48).test.labels), np.arange(4))


def test_large_grey_images_are_shrunk_to_the_canvas_as_in_pil():
  image = np.random.default_rng(0).integers(0, 256, (60, 90, 1), np.uint8)
  canvas, sizes = splits.on_canvas([image], 45)
  assert tuple(sizes[0]) == (30, 45)
  expected = Image.fromarray(image[..., 0]).resize((45, 30), Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(canvas[0, :30, :, 0], np.asarray(expected))


def test_the_fingerprint_tells_data_sets_apart():
  digits = datasets.load('digits', validation_examples=100)
  found = digits.fingerprint()
  assert found == datasets.load('digits', validation_examples=100).fingerprint()
  assert (found['classes'], found['shape of images'], found['validation images']) == (10, [8, 8, 1], 100)
  train = digits.train
  named = dataclasses.replace(train, files=np.array([f'{number}.png' for number in range(len(train))], object))
  others = {
    'train checksum of labels': dataclasses.replace(train, labels=train.labels[::-1]),
    'train checksum of images': dataclasses.replace(train, images=255 - train.images),
    'train checksum of file names': named,
    'train images': train.take(np.arange(10)),
  }
  for name, other in others.items():
    assert dataclasses.replace(digits, train=other).fingerprint().get(name) != found.get(name)
  other = dataclasses.replace(digits, class_names=tuple('abcdefghij'), validation=None).fingerprint()
  assert {name for name in found if found[name] != other.get(name)} == {
    'checksum of class names', 'validation images', 'validation checksum of labels', 'validation checksum of images'
  }  # fmt: skip
