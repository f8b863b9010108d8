"""Prepares data sets of TensorFlow Datasets (TFDS) without TensorFlow.

Fashion-MNIST, MNIST and KMNIST are prepared from their original files. Any other set is taken if it is prepared as
array_record already. Otherwise TFDS prepares it, if it can do so without TensorFlow.
"""

import functools
import gzip
import hashlib
import io
import math
import os
import pathlib
import re
import struct
import urllib.parse
import zlib
from typing import Any

import numpy as np

from googlenet_jax.data import downloading
from googlenet_jax.host import console, progress
from googlenet_jax.host.errors import UserError, expanded, one_line, reason

SOURCE_VARIABLE = 'FASHION_MNIST_DIR'
MOST_BYTES = 1 << 30  # in an idx file, unpacked; those of the sets below have up to 47 MB

# Image and label files of the sets that are read from their original files.
IDX_FILES = {
  'train': ('train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz'),
  'test': ('t10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'),
}
IDX_SETS = {'fashion_mnist': 'FashionMNIST', 'mnist': 'MNIST', 'kmnist': 'KMNIST'}


def normalised(name: str) -> str:
  """Returns the name of a data set as TFDS writes it: `FashionMNIST` is `fashion_mnist`."""
  first, rest = re.match(r'(\w*)(.*)', name, re.DOTALL).groups()
  first = re.sub(r'(.)([A-Z][a-z0-9]+)', r'\1_\2', first)
  return re.sub(r'([a-z0-9])([A-Z])', r'\1_\2', first).lower() + rest


def is_idx_set(name: str) -> bool:
  """Whether a set, named as TFDS names it and perhaps with a version, is read from four original files."""
  return re.split('[:/]', name)[0] in IDX_SETS


def prepare(name: str, source_dir: str, data_dir: str):
  """Returns a prepared TFDS builder; see `datasets.load` for arguments and errors."""
  builder = _builder(name, data_dir)
  if source_dir:
    source_dir = expanded(source_dir, 'config.data.source_dir')
    _check_source(builder, source_dir)
  if not builder.is_prepared():
    failure = None
    try:
      _download_and_prepare(builder, source_dir)
    except (UserError, OSError) as error:
      failure = error
    builder = _builder(name, data_dir)  # it looks again
    if not builder.is_prepared():
      way_out = _way_out(builder.data_path, _data_dir(data_dir))
      raise failure or UserError(f'{builder.data_path} has no dataset_info.json: {way_out}')
    if failure:
      console.say(f'{builder.data_path} has been prepared by another program in the meantime: it is read from there')
  if builder.info.file_format.value != 'array_record':
    raise UserError(
      f'{builder.data_path} holds {builder.info.file_format.value} files, which only TensorFlow reads: give another '
      'data.data_dir, and for Fashion-MNIST the folder of the original files as data.source_dir'
    )
  return builder


def _builder(name: str, data_dir: str):
  """Returns the TFDS builder of a set; it has looked whether the set is prepared."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import naming

  folder = _data_dir(data_dir)
  try:
    found, options = naming.parse_builder_name_kwargs(name)
  except Exception as error:  # TFDS raises many types
    raise UserError(
      f'config.data.name={one_line(name)} is no name of a data set: write NAME, NAME/CONFIG or NAME:VERSION'
    ) from error
  try:
    if is_idx_set(name):
      return _idx_builder(str(found))(data_dir=str(folder), **options)
    return tfds.builder(name, data_dir=str(folder))
  except Exception as error:  # so does its JSON reader
    why = next(iter(str(error).strip().splitlines()), type(error).__name__)
    place = folder / found.name
    if place.is_dir() and not isinstance(error, ImportError | tfds.core.DatasetNotFoundError):
      raise UserError(f'{place} cannot be read ({why}): if it is damaged, {_way_out(place, folder)}') from error
    raise UserError(
      f'data.name={one_line(name)} is not a data set that TFDS can open ({why}): check the name'
    ) from error


def _way_out(place: str | os.PathLike, folder: pathlib.Path) -> str:
  """Says what to do about a damaged set. Only a folder that really lies in that of the prepared sets may be deleted."""
  if folder.resolve() in pathlib.Path(place).resolve().parents:
    return 'delete that folder and run again'
  return 'give another data.data_dir'


def _data_dir(data_dir: str) -> pathlib.Path:
  """Returns the folder of prepared sets."""
  from tensorflow_datasets.core import constants

  if data_dir:
    return expanded(data_dir, 'config.data.data_dir')
  try:
    return expanded(constants.DATA_DIR)
  except UserError as error:
    raise UserError(f'{error}, as --config.data.data_dir=DIR: a folder for prepared data sets') from error


def _download_and_prepare(builder, source_dir):
  import tensorflow_datasets as tfds
  from requests.exceptions import RequestException
  from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
  from tensorflow_datasets.core.download.util import DownloadError
  from urllib3.exceptions import HTTPError

  tfds.disable_progress_bar()  # the lines of `waiting` say more
  builder._log_download_bytes = builder._log_download_done = lambda: None  # TFDS prints
  download = tfds.download.DownloadConfig(manual_dir=source_dir or None, try_download_gcs=False)
  what = f'preparing {builder.name} in {builder.data_path} from {source_dir or "the network"}'
  try:
    with downloading.limits() as received, progress.waiting(what, '', None if source_dir else lambda: str(received)):
      builder.download_and_prepare(download_config=download, file_format='array_record')
  except ImportError as error:
    raise UserError(
      f'TFDS needs {error.name} to prepare {builder.name}: prepare it on a machine with {error.name}, with '
      "file_format='array_record', and pass that folder as data.data_dir"
    ) from error
  except (DownloadError, NonMatchingChecksumError, RequestException, HTTPError) as error:
    raise UserError(f'{builder.name} could not be downloaded ({_why(error)}). {_ways_out(builder.name)}') from error
  except OSError as error:
    raise UserError(f'{builder.name} could not be prepared in {builder.data_path}: {reason(error)}') from error


def _why(error: Exception) -> str:
  """Returns what an error of requests or TFDS says, without what is for programmers."""
  last = getattr(error.args[0], 'reason', None) if error.args else None  # after several attempts
  return re.sub(r'^\w+\(.*?\): ', '', ' '.join(str(last or error).split()))


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
      if math.prod(shape) > MOST_BYTES:
        raise ValueError(f'its header claims {math.prod(shape)} bytes')
      content = file.read(math.prod(shape) + 1)
      return np.frombuffer(content, np.uint8).reshape(shape)
  except (struct.error, EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
    raise UserError(f'{path} is a damaged idx file ({error}): delete it and download it again') from error


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
