"""Checks of a recipe: every key by itself, and keys against each other."""

import math
import operator
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from googlenet_jax import recipe
from googlenet_jax.data import preparing
from googlenet_jax.host import processes
from googlenet_jax.host.errors import UserError
from googlenet_jax.model.options import STAGES, Options

LARGEST = 2**31 - 1  # number that a key may have if it does not say so itself: devices count in 32 bits


def check_alike(config: ConfigDict) -> None:
  """Refuses processes that have other recipes than the first one. All of them must call it.

  Raises:
    UserError: names a key that differs.
  """
  own = ('data.data_dir', 'data.source_dir')  # a host may have its data elsewhere
  processes.agree('recipes', {key: value for key, value in recipe.flatten(config).items() if key not in own})


def validate(config: ConfigDict, trains: bool = True) -> None:
  """Checks a recipe.

  Args:
    config: the recipe.
    trains: whether it has to say where the weights that it fine-tunes come from.

  Raises:
    UserError: names the first key that is missing, unknown, of another type or out of range.
  """
  values = recipe.flatten(config)
  for name in values:
    if name not in recipe.KEYS:
      raise UserError(f'the recipe has an unknown key config.{name}. {recipe.suggest(name)}')
  for name, key in recipe.KEYS.items():
    if name not in values:
      raise UserError(f'the recipe lacks key config.{name}: start from default.get_config() of configs/default.py')
    if not recipe.is_of_kind(name, values[name]):
      raise UserError(f'config.{name}={values[name]!r} must be {recipe.KINDS[type(key.default)]}')
    for problem in _problems(key, values[name]):
      raise UserError(f'config.{name}={values[name]!r} {problem}')
  try:
    Options(**config.model).check(config.image_size)
  except ValueError as error:
    text = str(error)
    raise UserError(f'config.{text}' if text.startswith('image_size') else f'config.model.{text}') from error
  _check_together(config, trains)


def _problems(key: recipe.Key, value: Any) -> Iterator[str]:
  kind = type(key.default)
  if isinstance(value, float) and not math.isfinite(value):
    yield 'must be finite'
  if key.choices and value not in key.choices:
    yield f'is unknown: choose from {", ".join(str(choice) for choice in key.choices if choice != "")}'
  most = key.most if key.most is not None or key.below is not None or kind in (bool, str) else LARGEST
  bounds = {'at least': key.least, 'above': key.above, 'at most': most, 'below': key.below}
  bounds = {word: bound for word, bound in bounds.items() if bound is not None}
  inside = {'at least': operator.ge, 'above': operator.gt, 'at most': operator.le, 'below': operator.lt}
  if not all(inside[word](value, bound) for word, bound in bounds.items()):
    yield f'is out of range: it must be {" and ".join(f"{word} {bound}" for word, bound in bounds.items())}'


def _check_together(config: ConfigDict, trains: bool) -> None:
  """Checks keys against each other."""
  _check_schedule(config)
  _check_augmentation(config)
  _check_frozen(config, trains)
  check_data(config)
  ensemble = config.ensemble
  if ensemble.member and ensemble.members > 1:
    raise UserError(
      f'config.ensemble.members={ensemble.members} trains every member. To train one alone, give '
      f'--config.ensemble.members=1 --config.ensemble.member={ensemble.member} --workdir=.../member_{ensemble.member}'
    )


def _check_frozen(config: ConfigDict, trains: bool) -> None:
  freeze = config.freeze
  for name, unset in (('freeze', ''), ('body_learning_rate', 1)):
    if trains and config[name] != unset and not config.init_from:
      raise UserError(
        f'config.{name}={config[name]} is for weights that know something already: give config.init_from, the workdir '
        'of a run or a file of weights'
      )
  if freeze and config.model.auxiliary != 'none' and STAGES.index(freeze) >= STAGES.index('inception_4a'):
    raise UserError(
      f'config.freeze={freeze} freezes what the auxiliary classifier after inception_4a would teach: set '
      'config.model.auxiliary to none, or freeze less'
    )


def _check_schedule(config: ConfigDict) -> None:
  if config.nesterov and not config.momentum:
    raise UserError('config.nesterov needs a config.momentum above 0')
  if config.warmup_epochs and config.schedule == 'one_cycle':
    raise UserError(
      'config.schedule=one_cycle warms up by itself: set config.warmup_epochs to 0, or choose another schedule'
    )
  if config.warmup_epochs >= config.epochs:
    raise UserError(f'config.warmup_epochs={config.warmup_epochs:g} must be smaller than config.epochs={config.epochs}')


def check_data(config: ConfigDict) -> None:
  """Checks the keys of the data against each other.

  Raises:
    UserError: they do not fit together.
  """
  data = config.data
  kind = preparing.normalised(data.name)
  # A folder may have a folder for validation: the training looks there.
  if config.early_stopping and kind != 'folder' and not data.validation_examples:
    raise UserError(
      f'config.early_stopping={config.early_stopping} needs validation images: set config.data.validation_examples'
    )
  if kind != 'folder':
    for name in ('channels', 'validation_share', 'test_share', 'split_seed', 'max_unreadable', 'memory_mb'):
      if data[name] != recipe.KEYS[f'data.{name}'].default:
        raise UserError(f'config.data.{name}={data[name]} is for config.data.name=folder: leave it out')
    return
  if data.data_dir:
    raise UserError(f'config.data.data_dir={data.data_dir} is for sets of TFDS: leave it out')
  if data.validation_examples:
    raise UserError(
      f'config.data.validation_examples={data.validation_examples} is for other sets: a folder has '
      'config.data.validation_share'
    )
  if data.channels == 2:
    raise UserError('config.data.channels=2: give 1 for grey, 3 for colour, or 0 to follow the pictures')
  if data.validation_share + data.test_share >= 1:
    raise UserError(
      f'config.data.validation_share={data.validation_share:g} and config.data.test_share={data.test_share:g} leave '
      'nothing to train on: make them smaller'
    )


def _check_augmentation(config: ConfigDict) -> None:
  augment = config.augment
  if augment.random_interpolation and augment.min_area == 1:
    raise UserError('config.augment.random_interpolation acts on random crops: set config.augment.min_area below 1')
  if 2 * augment.padding >= config.image_size:
    raise UserError(
      f'config.augment.padding={augment.padding} on both sides leaves no image in config.image_size={config.image_size}'
    )
  if augment.shift >= config.image_size:
    raise UserError(f'config.augment.shift={augment.shift} moves whole images out of sight')
  if augment.flip and augment.alternating_flip:
    raise UserError(
      'config.augment.flip and config.augment.alternating_flip exclude each other: set one of them to False'
    )
  if augment.cutmix and augment.mixup:
    raise UserError('config.augment.cutmix and config.augment.mixup exclude each other: set one of them to 0')
  if (augment.cutmix or augment.mixup) and config.batch_size // config.micro_batches < 2:
    raise UserError(
      f'config.augment.cutmix and config.augment.mixup need two images to mix: config.batch_size={config.batch_size} '
      f'in config.micro_batches={config.micro_batches} parts has one'
    )
