"""Checks of a recipe: ranges, and what may change between two runs in the same workdir."""

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from googlenet_jax.host.errors import UserError
from googlenet_jax.model import auxiliary_classifiers, googlenet
from googlenet_jax.training.optimizers import SCHEDULES

CHOICES = {
  'dtype': ('float32', 'bfloat16'),
  'schedule': SCHEDULES,
  'ensemble.initial_weights': ('same', 'different'),
  **{f'model.{option}': known for option, known in googlenet.CHOICES.items()},
}
# key: (least, most); None for no bound
RANGES = {
  'seed': (0, 2**31 - 1),
  'epochs': (1, None),
  'max_steps': (0, None),
  'batch_size': (1, None),
  'image_size': (1, 4096),
  'learning_rate': (0, None),
  'decay_factor': (0, 1),
  'decay_epochs': (1, None),
  'momentum': (0, 1),
  'weight_decay': (0, None),
  'clip_norm': (0, None),
  'label_smoothing': (0, 1),
  'micro_batches': (1, None),
  'model.dropout': (0, 1),
  'data.validation_examples': (0, None),
  'data.canvas': (1, 4096),
  'augment.padding': (0, None),
  'augment.shift': (0, None),
  'augment.resize': (1, 2),
  'augment.min_area': (0, 1),
  'augment.max_aspect': (1, None),
  'augment.photometric': (0, 1),
  'augment.erasing': (0, 1),
  'average_decay': (0, 1),
  'ensemble.members': (1, 1000),
  'ensemble.member': (0, 999),
  'log_every_steps': (1, None),
  'checkpoint_every_steps': (0, None),
}
OTHER_KEYS = (
  'nesterov',
  'augment.flip',
  'augment.random_interpolation',
  'ensemble.side_by_side',
  'data.name',
  'data.source_dir',
  'data.data_dir',
)
# A run goes on with other values of these: how long, what is written down, where the same data lie.
MAY_CHANGE = (
  'epochs',
  'max_steps',
  'log_every_steps',
  'checkpoint_every_steps',
  'data.source_dir',
  'data.data_dir',
  'ensemble.members',
  'ensemble.side_by_side',
)
LENGTH = ('epochs', 'max_steps')  # of a run: the same for all members of an ensemble that has ended
# What makes the weights fit, and the inputs the same.
FOR_EVALUATION = (
  'image_size',
  'augment.padding',
  'augment.resize',
  'average_decay',
  'data.name',
  'data.validation_examples',
  'data.canvas',
  'model.inception',
  'model.head',
  'model.stem',
  'model.norm',
  'model.auxiliary',
)


def flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested keys as `a.b`."""
  flat = {}
  for key, value in tree.items():
    flat.update(flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value})
  return flat


def validate(config: Any) -> None:
  """Raises UserError, naming the key, at the first that is missing, unknown or out of range."""
  values = flatten(config.to_dict())
  expected = {*CHOICES, *RANGES, *OTHER_KEYS}
  for problem, keys in (('lacks', expected - set(values)), ('has an unknown', set(values) - expected)):
    if keys:
      raise UserError(f'the recipe {problem} key config.{min(keys)}: configs/default.py lists them all')
  for key, known in CHOICES.items():
    if values[key] not in known:
      raise UserError(f'config.{key}={values[key]!r} is unknown: choose from {", ".join(known)}')
  for key, (least, most) in RANGES.items():
    value = values[key]
    if not isinstance(value, int | float):
      raise UserError(f'config.{key}={value!r} must be a number')
    # Written so that NaN is refused as well.
    if not (value >= least and (most is None or value <= most)) or value == float('inf'):
      bound = f'at least {least}' if most is None else f'from {least} to {most}'
      raise UserError(f'config.{key}={value} is out of range: it must be {bound}')
  for key in ('momentum', 'model.dropout', 'label_smoothing', 'average_decay'):
    if values[key] >= 1:
      raise UserError(f'config.{key}={values[key]} is out of range: it must be below 1')
  if config.augment.min_area == 0:
    raise UserError('config.augment.min_area=0 is out of range: it must be above 0, and 1 is for no random crops')
  if config.augment.random_interpolation and config.augment.min_area == 1:
    raise UserError('config.augment.random_interpolation is of random crops: config.augment.min_area must be below 1')
  if config.ensemble.member and config.ensemble.members > 1:
    raise UserError(
      f'config.ensemble.members={config.ensemble.members} trains every member; for one of them alone give '
      f'--config.ensemble.members=1 --config.ensemble.member={config.ensemble.member} '
      f'--workdir=.../member_{config.ensemble.member}'
    )
  if config.nesterov and not config.momentum:
    raise UserError('config.nesterov needs a config.momentum above 0')
  least = googlenet.MIN_IMAGE_SIZE[config.model.stem]
  if config.image_size < least:
    raise UserError(
      f'config.image_size={config.image_size} is too small for the network: with model.stem={config.model.stem} '
      f'it needs at least {least} pixels'
    )
  side = googlenet.map_sides(config.image_size, config.model.stem)[0]
  if config.model.auxiliary == 'average_pool' and side < auxiliary_classifiers.POOL:
    raise UserError(
      f'config.image_size={config.image_size} leaves maps of {side} pixels to the auxiliary classifiers, whose pool is '
      f'of {auxiliary_classifiers.POOL}: config.model.auxiliary=adaptive_pool takes maps of any size'
    )
  if 2 * config.augment.padding >= config.image_size:
    raise UserError(
      f'config.augment.padding={config.augment.padding} on both sides leaves no image in '
      f'config.image_size={config.image_size}'
    )
  if config.augment.shift >= config.image_size:
    raise UserError(f'config.augment.shift={config.augment.shift} moves whole images out of sight')


def sampling_seed(config: Any) -> int:
  """The seed of the order of images, of augmentation and of dropout: the recipe's, but another for each member."""
  member = config.ensemble.member
  if member == 0:
    return config.seed
  return int(np.random.SeedSequence([config.seed, member]).generate_state(1)[0] >> 1)


def initial_seed(config: Any) -> int:
  """The seed of the initial weights: by default the same for every member of an ensemble, as in the paper."""
  return config.seed if config.ensemble.initial_weights == 'same' else sampling_seed(config)


def check_same(config: Any, workdir: pathlib.Path, only: tuple[str, ...] = ()) -> None:
  """Refuses a workdir that another recipe made.

  Args:
    config: of this run.
    workdir: with the checkpoints and the `config.json` of the run before, if there was one.
    only: keys to compare; all but MAY_CHANGE if empty.

  Raises:
    UserError: names the keys that differ, with both values; or what the recipe was cannot be read.
  """
  path = workdir / 'config.json'
  if not any(step.name.isdigit() for step in (workdir / 'checkpoints').glob('*')):  # others were never complete
    return  # nothing there to lose or to go on from
  if not path.exists():
    raise UserError(f'{path} is missing, so that the recipe of the checkpoints is not known: give another --workdir')
  try:
    before = flatten(json.loads(path.read_text()))
  except (ValueError, AttributeError) as error:  # neither text, nor JSON, nor keys and values
    raise UserError(f'{path} is damaged ({error}): give another --workdir') from error
  now = flatten(json.loads(config.to_json()))
  keys = only or [key for key in {**before, **now} if key not in MAY_CHANGE]
  if differing := _differing(before, now, keys):
    raise UserError(
      f'{workdir} holds a run of another recipe ({differing}): give another --workdir, or the same values'
    )


def _differing(there: dict[str, Any], other: dict[str, Any], keys: Iterable[str], where: str = 'now') -> str:
  return '; '.join(
    f'{key}: {there.get(key)!r} there, {other.get(key)!r} {where}' for key in keys if there.get(key) != other.get(key)
  )


def check_length(config: Any, folder: pathlib.Path) -> None:
  """Refuses a member of an ensemble that has ended as a run of another length; the folder is one of `check_same`."""
  before = flatten(json.loads((folder / 'config.json').read_text()))
  if differing := _differing(before, flatten(config.to_dict()), LENGTH):
    raise UserError(
      f'{folder} has ended as a run of another length ({differing}), and members are trained alike: give the same '
      'values, or another --workdir'
    )


def check_alike(folders: Sequence[pathlib.Path]) -> None:
  """Refuses to call runs an ensemble that were trained by different recipes; the folders are those of `check_same`."""
  first, *others = (flatten(json.loads((folder / 'config.json').read_text())) for folder in folders)
  for folder, other in zip(folders[1:], others, strict=True):
    keys = sorted({*first, *other} - set(MAY_CHANGE) - {'ensemble.member'} | set(LENGTH))
    if differing := _differing(first, other, keys, 'here'):
      raise UserError(
        f'{folders[0]} and {folder} were trained by different recipes ({differing}): no members of one ensemble'
      )
