"""Loads data sets: folders of pictures, TensorFlow Datasets (TFDS) without TensorFlow, scikit-learn's digits."""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from googlenet_jax.data import dividing, folder, preparing
from googlenet_jax.data.splits import SPLITS, Dataset, RecordImages, Split, damage_as_user_error, on_canvas
from googlenet_jax.host import cache, console
from googlenet_jax.host.errors import UserError, expanded

MAX_BYTES_IN_MEMORY = 8 << 30  # larger splits are read record by record
MAX_BYTES_KEPT = 1 << 30  # splits up to this size are cached decoded
VALIDATION_SEED = 0  # chooses the held-out images: the same for every run, to compare runs
DIGITS_TEST_EXAMPLES = 360


def load(
  name: str,
  source_dir: str = '',
  data_dir: str = '',
  validation_examples: int = 0,
  canvas: int = 512,
  split_file: pathlib.Path | None = None,
  class_names: Sequence[str] = (),
  image_shape: tuple[int, int, int] | None = None,
  used: Sequence[str] = SPLITS,
  **of_folder: int | float,
) -> Dataset:
  """Loads a data set, and prepares it first if necessary.

  `split_file`, `class_names` and `image_shape` are those of a run that is continued or evaluated, see `runs.data_of`.

  Args:
    name: 'folder', 'digits', or the name of a TFDS image classification set such as 'fashion_mnist'.
    source_dir: folder of pictures (folder), or with the four original .gz files (fashion_mnist, mnist, kmnist). If it
      is empty, fashion_mnist uses the environment variable FASHION_MNIST_DIR.
    data_dir: folder where TFDS keeps prepared sets; empty for TFDS's default.
    validation_examples: number of training images to hold out; a fixed seed chooses them.
    canvas: side of the canvas in pixels, for sets with images of many sizes.
    split_file: for a folder, see `folder.load`; it is read if it exists.
    class_names: the classes that the set must have.
    image_shape: H, W, C; the set must have as many channels. A folder takes the canvas too.
    used: the splits that are needed; of the others a folder decodes nothing.
    **of_folder: other arguments of `folder.load`; not for other sets.

  Returns:
    The data set; labels count from 0.

  Raises:
    UserError: the set is unknown, cannot be prepared, is damaged, has no labelled images, or is not that of the run.
  """
  name = preparing.normalised(name)
  if name == 'folder':
    if split_file and not split_file.exists():
      console.say(f'note: {split_file} is missing: the splits are the same only if the folder has not changed')
      split_file = None
    of_folder |= {'split_file': split_file, 'image_shape': image_shape, 'used': used}
    dataset = folder.load(source_dir, canvas, **of_folder)
  elif name == 'digits':
    if source_dir or data_dir:
      raise UserError('data.name=digits comes with scikit-learn: leave data.source_dir and data.data_dir empty')
    dataset = _hold_out(_digits(), validation_examples)
  else:
    dataset = _hold_out(_prepared(name, source_dir, data_dir, canvas), validation_examples)
  if image_shape:
    _check_same(dataset, tuple(class_names), image_shape[-1])
  return dataset


def _check_same(dataset: Dataset, class_names: tuple[str, ...], channels: int) -> None:
  """Refuses a data set that is not the one of the run."""
  now = dataset.image_shape[-1]
  if dataset.class_names != class_names:
    new, gone = (sorted(set(a) - set(b)) for a, b in itertools.permutations((dataset.class_names, class_names)))
    what = f'classes now (new: {folder.some(new) or "none"}; gone: {folder.some(gone) or "none"})'
  elif now != channels:
    what = f'colours now ({now} channels, and {channels} before)'
  else:
    return
  raise UserError(
    f'{dataset.name} has other {what} than when the run was trained: give the data of the run and, if they are a '
    f'folder, its {dividing.FILE}; or train anew in another --workdir'
  )


def _prepared(name: str, source_dir: str, data_dir: str, canvas: int) -> Dataset:
  """Loads a set of TFDS."""
  if name.partition(':')[0] == 'fashion_mnist':
    if not source_dir and (given := os.environ.get(preparing.SOURCE_VARIABLE)):
      source_dir = str(expanded(given, preparing.SOURCE_VARIABLE))
  elif source_dir and not preparing.is_idx_set(name):
    sets = ', '.join(('folder', *preparing.IDX_SETS))
    raise UserError(f'data.source_dir is read for {sets} only, not for data.name={name}: leave it empty')
  return _read(preparing.prepare(name, source_dir, data_dir), canvas)


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


# TFDS -----------------------------------------------------------------------------------------------------------------


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
  with damage_as_user_error(builder.data_path):
    first = builder.as_data_source(split=name, decoders={'image': tfds.decode.SkipDecoding()})[0]
    if first['label'] < 0:
      return None
  count = builder.info.splits[name].num_examples
  files = [pathlib.Path(builder.data_path, file) for file in sorted(builder.info.splits[name].filenames)]
  size = count * int(np.prod(shape))
  if size > MAX_BYTES_IN_MEMORY:
    read = functools.partial(_decoded, builder, name, None, many_sizes)
    labels = cache.arrays(f'{builder.info.name}_{name}_labels', files, read)['labels']
    canvas = shape[0] if many_sizes else None
    images = RecordImages(builder.as_data_source(split=name), np.arange(count), builder.data_path, canvas)
    return Split(images, labels)
  read = functools.partial(_decoded, builder, name, shape, many_sizes)
  if size > MAX_BYTES_KEPT:
    return Split(**read())
  canvas = f'_{shape[0]}' if many_sizes else ''
  return Split(**cache.arrays(f'{builder.info.name}_{name}{canvas}', files, read))


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
  with damage_as_user_error(builder.data_path):
    source = builder.as_data_source(split=name, decoders={'image': tfds.decode.SkipDecoding()})
  decode = builder.info.features['image'].decode_example_np
  count = len(source)
  arrays = {'labels': np.empty(count, np.int32)}
  if shape is not None:
    arrays['images'] = np.empty((count, *shape), np.uint8)
    if many_sizes:
      arrays['sizes'] = np.empty((count, 2), np.int32)
  with damage_as_user_error(builder.data_path):
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
