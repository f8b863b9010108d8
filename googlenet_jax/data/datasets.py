"""Loads data sets: folders of pictures, TensorFlow Datasets (TFDS) without TensorFlow, scikit-learn's digits.

Fashion-MNIST, MNIST and KMNIST are prepared here from their original files. Any other TFDS image classification set is
read if it is prepared as array_record already. Otherwise TFDS prepares it, if it can do so without TensorFlow.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import os
import pathlib
import socket
import struct
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np

from googlenet_jax.data import folder
from googlenet_jax.data.listing import SPLITS
from googlenet_jax.data.splits import Dataset, RecordImages, Split, on_canvas
from googlenet_jax.host import cache, console
from googlenet_jax.host.errors import UserError

MAX_BYTES_IN_MEMORY = 8 << 30  # larger splits are read record by record
MAX_BYTES_KEPT = 1 << 30  # splits up to this size are cached decoded
VALIDATION_SEED = 0  # chooses the held-out images: the same for every run, to compare runs
SOURCE_VARIABLE = 'FASHION_MNIST_DIR'
DIGITS_TEST_EXAMPLES = 360
CONNECT_SECONDS = 4.0  # to find out that there is no network

# Image and label files of the sets that are read from their original files.
IDX_FILES = {
  'train': ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz'),
  'test': ('t10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'),
}
IDX_SETS = {'fashion_mnist': 'FashionMNIST', 'mnist': 'MNIST', 'kmnist': 'KMNIST'}


def load(
  name: str,
  source_dir: str = '',
  data_dir: str = '',
  validation_examples: int = 0,
  canvas: int = 512,
  split_file: pathlib.Path | None = None,
  used: Sequence[str] = SPLITS,
  **of_folder: int | float,
) -> Dataset:
  """Loads a data set, and prepares it first if necessary.

  Args:
    name: 'folder', 'digits', or the name of a TFDS image classification set such as 'fashion_mnist'.
    source_dir: folder of pictures (folder), or with the four original .gz files (fashion_mnist, mnist, kmnist). If it
      is empty, fashion_mnist uses the environment variable FASHION_MNIST_DIR.
    data_dir: folder where TFDS keeps prepared sets; empty for TFDS's default.
    validation_examples: number of training images to hold out; a fixed seed chooses them.
    canvas: side of the canvas in pixels, for sets with images of many sizes.
    split_file: for a folder, see `folder.load`; it is read if it exists.
    used: the splits that are needed; of the others a folder decodes nothing.
    **of_folder: other arguments of `folder.load`; not for other sets.

  Returns:
    The data set; labels count from 0.

  Raises:
    UserError: the set is unknown, cannot be prepared, is damaged, or has no labelled images.
  """
  if name == 'folder':
    if split_file and not split_file.exists():
      console.say(f'note: {split_file} is missing: the splits are the same only if the folder has not changed')
      split_file = None
    return folder.load(source_dir, canvas, split_file=split_file, used=used, **of_folder)
  if name == 'digits':
    if source_dir or data_dir:
      raise UserError('data.name=digits comes with scikit-learn: leave data.source_dir and data.data_dir empty')
    return _hold_out(_digits(), validation_examples)
  if name == 'fashion_mnist':
    source_dir = source_dir or os.environ.get(SOURCE_VARIABLE, '')
  elif source_dir and name not in IDX_SETS:
    raise UserError(
      f'data.source_dir is read for folder, {", ".join(IDX_SETS)} only, not for data.name={name}: leave it empty'
    )
  return _hold_out(_read(_prepare(name, source_dir, data_dir), canvas), validation_examples)


def _hold_out(dataset: Dataset, count: int) -> Dataset:
  total = len(dataset.train)
  if not count:
    return dataset
  if count >= total:
    raise UserError(
      f'data.validation_examples={count} leaves nothing to train on: {dataset.name} has {total} training images; '
      'hold out fewer'
    )
  order = np.random.default_rng(VALIDATION_SEED).permutation(total)
  held, kept = np.sort(order[:count]), np.sort(order[count:])
  return dataclasses.replace(dataset, train=dataset.train.take(kept), validation=dataset.train.take(held))


def _digits() -> Dataset:
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  bunch = load_digits()
  images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # the source has values from 0 to 16
  labels = bunch.target.astype(np.int32)
  train, test = train_test_split(
    np.arange(len(labels)), test_size=DIGITS_TEST_EXAMPLES, stratify=labels, random_state=VALIDATION_SEED
  )
  train, test = (Split(images[i], labels[i]) for i in (np.sort(train), np.sort(test)))
  return Dataset('digits', train, None, test, tuple(str(n) for n in range(10)), (8, 8, 1))


# TFDS: preparing -----------------------------------------------------------------------------------------------------


def _prepare(name: str, source_dir: str, data_dir: str):
  """Returns a prepared TFDS builder."""
  import tensorflow_datasets as tfds

  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  where = {'data_dir': str(pathlib.Path(data_dir).expanduser())} if data_dir else {}
  try:
    if name in IDX_SETS:
      builder = _idx_builder(name)(**where)
    else:
      builder = tfds.builder(name, **where)
  except (ImportError, ValueError) as error:  # TFDS's DatasetNotFoundError is a ValueError
    reason = str(error).strip().splitlines()[0]
    raise UserError(f'data.name={name} is not a data set that TFDS can open ({reason}): check the name') from error
  if source_dir:
    source_dir = pathlib.Path(source_dir).expanduser()
    _check_source(builder, source_dir)
  if not builder.is_prepared():
    if not source_dir:
      _check_network(builder)
    _download_and_prepare(builder, source_dir)
  if builder.info.file_format.value != 'array_record':
    raise UserError(
      f'{builder.data_path} holds {builder.info.file_format.value} files, which only TensorFlow reads: give another '
      'data.data_dir, and for Fashion-MNIST the folder of the original files as data.source_dir'
    )
  return builder


def _download_and_prepare(builder, source_dir):
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
  from tensorflow_datasets.core.download.util import DownloadError

  download = tfds.download.DownloadConfig(manual_dir=source_dir or None)
  console.say(f'preparing {builder.name} in {builder.data_path} from {source_dir or "the network"} ...')
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints about downloads of unknown size
      builder.download_and_prepare(download_config=download, file_format='array_record')
  except ImportError as error:
    raise UserError(
      f'TFDS needs {error.name} to prepare {builder.name}: prepare it on a machine with {error.name}, with '
      "file_format='array_record', and pass that folder as data.data_dir"
    ) from error
  except (DownloadError, NonMatchingChecksumError) as error:
    raise UserError(f'{builder.name} could not be downloaded ({error}). {_ways_out(builder.name)}') from error
  except OSError as error:
    raise UserError(f'{builder.name} could not be prepared in {builder.data_path}: {error}') from error


def _ways_out(name: str) -> str:
  variable = f' (or {SOURCE_VARIABLE}=DIR)' if name == 'fashion_mnist' else ''
  files = (
    f'give the folder of its original .gz files as --config.data.source_dir=DIR{variable}; ' if name in IDX_SETS else ''
  )
  return (
    f'Ways out: {files}give a folder where TFDS has prepared it as --config.data.data_dir=DIR; or run `make demo`, '
    'which needs no download'
  )


@functools.cache
def _idx_builder(name: str):
  """Makes a subclass of TFDS's builder that needs no TensorFlow.

  Name, version, features, checksums and order of examples are those of TFDS.
  """
  from PIL import Image
  from tensorflow_datasets.image_classification import mnist as originals

  original = getattr(originals, IDX_SETS[name])

  class IdxBuilder(original, skip_registration=True):
    url_infos = None  # use TFDS's table of all checksums, which lists these files

    def _split_generators(self, dl_manager):
      urls = {split: [urllib.parse.urljoin(self.URL, f) for f in files] for split, files in IDX_FILES.items()}
      paths = dl_manager.download(urls)
      return {split: self._generate_examples(*paths[split]) for split in IDX_FILES}

    def _generate_examples(self, images, labels):
      for i, (image, label) in enumerate(zip(read_idx(images), read_idx(labels), strict=True)):
        png = io.BytesIO()
        Image.fromarray(image).save(png, 'png')
        yield i, {'image': png.getvalue(), 'label': int(label)}

  IdxBuilder.name = name
  return IdxBuilder


def read_idx(path: str | os.PathLike) -> np.ndarray:
  """Reads a gzipped idx file of unsigned bytes, the format of MNIST and similar sets.

  Args:
    path: the .gz file.

  Returns:
    uint8 array of the shape in the file's header.

  Raises:
    UserError: the file is of another kind, or its length does not fit its header.
  """
  try:
    with gzip.open(path, 'rb') as file:
      zero, kind, rank = struct.unpack('>HBB', file.read(4))
      if (zero, kind) != (0, 8):
        raise UserError(f'{path} is not an idx file of unsigned bytes: download the original file again')
      shape = struct.unpack(f'>{rank}I', file.read(4 * rank))
      return np.frombuffer(file.read(), np.uint8).reshape(shape)
  except (struct.error, EOFError, gzip.BadGzipFile, ValueError) as error:
    raise UserError(f'{path} is a damaged idx file ({error}): download it again') from error


def _expected_files(builder) -> dict[str, Any]:
  """Returns TFDS's entries for the idx files of a set: file name to (url, size, sha256)."""
  from tensorflow_datasets.core.download import checksums

  table = checksums.get_all_url_infos()
  names = [name for files in IDX_FILES.values() for name in files]
  return {name: table[urllib.parse.urljoin(builder.URL, name)] for name in names}


def _check_source(builder, source_dir: pathlib.Path) -> None:
  if not source_dir.is_dir():
    raise UserError(f'{source_dir} is not a folder: correct data.source_dir, or {SOURCE_VARIABLE} in the environment')
  for name, expected in _expected_files(builder).items():
    path = source_dir / name
    if not path.is_file():
      raise UserError(f'{path} is missing: {builder.name} needs {", ".join(_expected_files(builder))}')
    with path.open('rb') as file:
      found = hashlib.file_digest(file, 'sha256').hexdigest()
    if found != expected.checksum:
      raise UserError(
        f'{path} is not the original file of {builder.name}: expected {int(expected.size)} bytes with sha256 '
        f'{expected.checksum}, found {path.stat().st_size} bytes with {found}; download it again'
      )


def _check_network(builder) -> None:
  """Raises UserError within seconds if there is no network; TFDS would retry for minutes."""
  urls = [builder.URL] if builder.name in IDX_SETS else list(builder.url_infos or ())
  for scheme, host in sorted({urllib.parse.urlsplit(url)[:2] for url in urls}):
    # With a proxy only the proxy must be reachable.
    target = urllib.parse.urlsplit(urllib.request.getproxies().get(scheme, f'{scheme}://{host}'))
    error = _connect(target.hostname, target.port or (443 if target.scheme == 'https' else 80), CONNECT_SECONDS)
    if error is not None:
      raise UserError(
        f'{builder.name} is not prepared in {builder.data_path} and {target.hostname} cannot be reached ({error}). '
        + _ways_out(builder.name)
      )


def _connect(host: str, port: int, seconds: float) -> OSError | str | None:
  """Tries to connect; returns the error, or None if there was none."""
  outcome: list[OSError | None] = []

  def attempt():
    try:
      socket.create_connection((host, port), seconds).close()
      outcome.append(None)
    except OSError as error:
      outcome.append(error)

  thread = threading.Thread(target=attempt, daemon=True)  # looking up a name has no time limit
  thread.start()
  thread.join(seconds)
  return outcome[0] if outcome else f'no answer in {seconds:g} s'


# TFDS: reading -------------------------------------------------------------------------------------------------------


def _read(builder, canvas: int) -> Dataset:
  info = builder.info
  features = info.features
  if not {'image', 'label'} <= set(features) or not hasattr(features['label'], 'names'):
    raise UserError(
      f'{info.name} is not an image classification set: its features are {", ".join(features)}; choose another '
      'data.name'
    )
  shape = features['image'].shape
  many_sizes = None in shape[:2]
  if many_sizes:
    shape = (canvas, canvas, shape[2])
  if shape[2] is None:
    raise UserError(
      f'{info.name} does not state the channels of its images and cannot be read: choose another data.name'
    )
  train = _read_split(builder, 'train', shape, many_sizes)
  # ImageNet's test images have no labels in TFDS, only -1. The validation split then serves as test split.
  test = _read_split(builder, 'test', shape, many_sizes) or _read_split(builder, 'validation', shape, many_sizes)
  if train is None or test is None:
    raise UserError(
      f'{info.name} lacks a labelled train or test split: it has {", ".join(info.splits)}; choose another data.name'
    )
  return Dataset(info.name, train, None, test, tuple(features['label'].names), tuple(shape))


def _read_split(builder, name: str, shape: tuple[int, ...], many_sizes: bool) -> Split | None:
  """Reads a split; returns None if it does not exist or has no labels."""
  import tensorflow_datasets as tfds

  if name not in builder.info.splits or not builder.info.splits[name].num_examples:
    return None
  with _damage_as_user_error(builder):
    first = builder.as_data_source(split=name, decoders={'image': tfds.decode.SkipDecoding()})[0]
  if first['label'] < 0:
    return None
  count = builder.info.splits[name].num_examples
  files = [pathlib.Path(builder.data_path, file) for file in sorted(builder.info.splits[name].filenames)]
  size = count * int(np.prod(shape))
  if size > MAX_BYTES_IN_MEMORY:
    read = functools.partial(_decoded, builder, name, None, many_sizes)
    labels = cache.arrays(f'{builder.info.name}_{name}_labels', files, read)['labels']
    images = RecordImages(builder.as_data_source(split=name), np.arange(count), shape[0] if many_sizes else None)
    return Split(images, labels)
  read = functools.partial(_decoded, builder, name, shape, many_sizes)
  if size > MAX_BYTES_KEPT:
    return Split(**read())
  canvas = f'_{shape[0]}' if many_sizes else ''
  return Split(**cache.arrays(f'{builder.info.name}_{name}{canvas}', files, read))


@contextlib.contextmanager
def _damage_as_user_error(builder):
  """Turns the errors of array_record, which checks checksums, into a UserError with the folder."""
  try:
    yield
  except RuntimeError as error:
    raise UserError(
      f'{builder.data_path} is damaged ({str(error).splitlines()[0]}): delete that folder and run again'
    ) from error


def _decoded(builder, name: str, shape: tuple[int, ...] | None, many_sizes: bool) -> dict[str, np.ndarray]:
  """Decodes a whole split.

  Args:
    builder: TFDS builder of a prepared set.
    name: name of the split.
    shape: shape of an image or of the canvas; None to read labels only.
    many_sizes: whether images have many sizes.

  Returns:
    `labels` int32 `[N]`; with a shape `images` uint8 `[N, *shape]`; for many sizes also `sizes` int32 `[N, 2]`.
  """
  import tensorflow_datasets as tfds

  # Calling TFDS's decoder directly is faster than its data source, and labels need no decoded images.
  source = builder.as_data_source(split=name, decoders={'image': tfds.decode.SkipDecoding()})
  decode = builder.info.features['image'].decode_example_np
  count = len(source)
  arrays = {'labels': np.empty(count, np.int32)}
  if shape is not None:
    arrays['images'] = np.empty((count, *shape), np.uint8)
    if many_sizes:
      arrays['sizes'] = np.empty((count, 2), np.int32)
  with _damage_as_user_error(builder):
    for start in range(0, count, 1000):
      block = range(start, min(start + 1000, count))
      for i, record in zip(block, source.__getitems__(block), strict=True):
        arrays['labels'][i] = record['label']
        if shape is None:
          continue
        if many_sizes:
          (arrays['images'][i],), (arrays['sizes'][i],) = on_canvas([decode(record['image'])], shape[0])
        else:
          arrays['images'][i] = decode(record['image'])
  return arrays
