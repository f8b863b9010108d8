"""Prepares data sets of TensorFlow Datasets (TFDS) without TensorFlow.

Fashion-MNIST, MNIST and KMNIST are prepared from their original files. Any other set is taken if it is prepared as
array_record already. Otherwise TFDS prepares it, if it can do so without TensorFlow.
"""

import contextlib
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
from typing import Any

import numpy as np

from googlenet_jax.host import console
from googlenet_jax.host.errors import UserError, expanded

SOURCE_VARIABLE = 'FASHION_MNIST_DIR'
CONNECT_SECONDS = 4.0  # to find out that there is no network

# Image and label files of the sets that are read from their original files.
IDX_FILES = {
  'train': ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz'),
  'test': ('t10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'),
}
IDX_SETS = {'fashion_mnist': 'FashionMNIST', 'mnist': 'MNIST', 'kmnist': 'KMNIST'}


def prepare(name: str, source_dir: str, data_dir: str):
  """Returns a prepared TFDS builder; see `datasets.load` for arguments and errors."""
  import tensorflow_datasets as tfds

  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  where = {'data_dir': str(expanded(data_dir))} if data_dir else {}
  try:
    if name in IDX_SETS:
      builder = _idx_builder(name)(**where)
    else:
      builder = tfds.builder(name, **where)
  except (ImportError, ValueError) as error:  # TFDS's DatasetNotFoundError is a ValueError
    reason = str(error).strip().splitlines()[0]
    raise UserError(f'data.name={name} is not a data set that TFDS can open ({reason}): check the name') from error
  if source_dir:
    source_dir = expanded(source_dir)
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
