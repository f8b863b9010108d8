"""What a workdir knows about its run: `run.json` holds the recipe, the classes, the image shape and the versions."""

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from googlenet_jax import __version__, recipe, recipe_checks
from googlenet_jax.data import dividing
from googlenet_jax.host import cpu_cores, files
from googlenet_jax.host.errors import UserError
from googlenet_jax.model.options import Options

FILE = 'run.json'
METRICS = 'metrics.jsonl'
# What a line of `metrics.jsonl` holds.
RECORD = {
  'step': int,
  'epoch': float,
  'split': str,
  'loss': float,
  'accuracy': float,
  'learning_rate': float,
  'examples_per_second': float,
}
# Options of the network that `init_from` brings with its weights. Dropout and auxiliary classifiers are for training.
OF_SOURCE = tuple(field.name for field in dataclasses.fields(Options) if field.name not in ('dropout', 'auxiliary'))
PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint')


@dataclasses.dataclass(frozen=True)
class Run:
  """What `run.json` holds."""

  config: ConfigDict  # the recipe
  classes: tuple[str, ...]  # names, by label
  image_shape: tuple[int, int, int]  # H, W, C as stored; H and W of the canvas for images of many sizes
  machine: dict[str, Any] = dataclasses.field(default_factory=dict)  # see `machine`; empty for old runs


def write(workdir: pathlib.Path, run: Run) -> None:
  """Writes `run.json`, in the first process only."""
  versions = {'googlenet_jax': __version__, 'python': platform.python_version()}
  versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
  content = {
    'recipe': recipe.to_json(run.config),
    'classes': list(run.classes),
    'image_shape': list(run.image_shape),
    'preparation': preparation(run.config, run.image_shape[-1]),
    'versions': versions,
    'machine': run.machine,
  }
  files.write_json(workdir / FILE, content)


def machine(mesh: Mesh) -> dict[str, Any]:
  """Returns what of a machine decides the order of floating-point sums: with another, results differ slightly."""
  return {'cpu_cores': cpu_cores.cores(), 'devices': mesh.size, 'device': mesh.devices.flat[0].device_kind}


def other_machine(before: dict[str, Any], now: dict[str, Any]) -> str:
  """Says that a run continues on another machine; empty if it is alike, or the run does not say where it began."""
  parts = [f'{name} {before[name]} before, {now[name]} now' for name in now if before.get(name, now[name]) != now[name]]
  if not parts:
    return ''
  return f'note: {"; ".join(parts)}: the run continues, but not bit for bit as without the interruption'


def preparation(config: ConfigDict, channels: int) -> str:
  """Says in words how an image becomes the network's input; `data.augment.prepare` does it."""
  size, padding = config.image_size, config.augment.padding
  side = size - 2 * padding
  short = round(config.augment.resize * side)
  border = f', {padding} pixels of zeros on each side' if padding else ''
  mean, std = config.model.input_mean, config.model.input_std
  normalised = '; the network normalises by ' + ' and '.join(
    f'{word} {value}' for word, value in (('mean', mean), ('standard deviation', std)) if value
  )
  colours = {1: 'grey', 3: 'RGB'}.get(channels, f'{channels} channels')
  return (
    f'{colours}, scaled to [0, 1]; the short side resized to {short} pixels (bilinear, antialiased when shrinking); '
    f'the middle {side}x{side} cut out{border}{normalised * bool(mean or std)}'
  )


def read(workdir: pathlib.Path) -> Run:
  """Reads `run.json`.

  Raises:
    UserError: there is no run, or the file is damaged or from another version.
  """
  path, config = workdir / FILE, recipe.default()
  try:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
      raise ValueError('it holds no object')
    for key, kind in {'recipe': dict, 'classes': list, 'image_shape': list}.items():
      if key not in content:
        raise ValueError(f'the key {key} is missing')
      if not isinstance(content[key], kind):
        raise ValueError(f'{key} is no {"list" if kind is list else "object"}')
    flat = recipe.flatten(content['recipe'])
    if unknown := sorted(set(flat) - set(recipe.KEYS)):
      made_by = content.get('versions', {}).get('googlenet_jax', 'unknown')
      raise UserError(f'has the key {unknown[0]}, which version {__version__} lacks: version {made_by} wrote it')
    for name, value in flat.items():
      if not recipe.is_of_kind(name, value):
        raise ValueError(f'recipe.{name} must be {recipe.KINDS[type(recipe.KEYS[name].default)]}')
    config.update_from_flattened_dict(flat)
    classes, shape = tuple(content['classes']), tuple(content['image_shape'])
    if not all(isinstance(name, str) for name in classes):
      raise ValueError('classes are no list of names')
    if len(shape) != 3 or not all(type(side) is int and side > 0 for side in shape):
      raise ValueError(f'image_shape is {list(shape)}')
    alone = config.copy_and_resolve_references()
    alone.ensemble.members = 1  # a member of an ensemble is a run as well
    _check_values(alone)
    found = content.get('machine', {})
    if not isinstance(found, dict):
      raise ValueError('machine is no object')
    return Run(config, classes, shape, found)
  except (FileNotFoundError, NotADirectoryError) as error:
    raise UserError(_no_run(workdir)) from error
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from error
  except UserError as error:
    raise UserError(f'{path} {error}') from error
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f'{path} is damaged ({error}): bring it back from a copy, or give another --workdir') from error


def _check_values(config: ConfigDict) -> None:
  try:
    recipe_checks.validate(config, trains=False)
  except UserError as error:
    raise UserError(f'cannot be used: {error}') from error


def _no_run(workdir: pathlib.Path) -> str:
  if not workdir.is_dir():
    return f'{workdir} is no folder: train first, or give the --workdir of a run'
  if (workdir / 'checkpoints').is_dir():
    return (
      f'{workdir} has checkpoints but no {FILE}: bring it back from a copy; if an old version made them, train anew in '
      'another --workdir'
    )
  inside = sorted(path.parent.name for path in workdir.glob(f'*/{FILE}'))
  if inside:
    others = f' (or {", ".join(inside[1:6])}{", ..." if len(inside) > 6 else ""})' if inside[1:] else ''
    return f'{workdir} holds no run, but its folders do: give --workdir={workdir / inside[0]}{others}'
  names = sorted(path.name + '/' * path.is_dir() for path in workdir.iterdir())
  more = f' and {len(names) - 6} more' if len(names) > 6 else ''
  there = f'it holds {", ".join(names[:6])}{more}' if names else 'it is empty'
  return f'{workdir} holds no run ({there}): train first, or give the --workdir of a run'


def has_checkpoints(workdir: pathlib.Path) -> bool:
  """Returns whether a run has saved a checkpoint. What a killed save left does not count.

  A checkpoint that is being written anew is in `replaced/`, see `Checkpoints.replace`.
  """
  steps = (step for folder in ('checkpoints', 'replaced') for step in (workdir / folder).glob('*'))
  return any(step.name.isdigit() for step in steps)


def has_begun(workdir: pathlib.Path) -> bool:
  """Returns whether a run, or a member of an ensemble, has saved a checkpoint."""
  return any(map(has_checkpoints, [workdir, *_found(workdir).values()]))


def with_network_of_run(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
  """Returns the recipe with the network that a run with `init_from` began with; otherwise the recipe as it is."""
  if not config.init_from or not has_begun(workdir):
    return config
  before = recipe_of(workdir)
  config = config.copy_and_resolve_references()
  config.model.update({name: before.model[name] for name in OF_SOURCE})
  return config


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Reads `metrics.jsonl`, without lines that are damaged; an empty list if there is no such file."""
  try:
    lines = (workdir / METRICS).read_text(encoding='utf-8', errors='replace').splitlines()
  except FileNotFoundError:
    return []
  return [record for record in map(_parse, lines) if record is not None]


def _parse(line: str) -> dict[str, Any] | None:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):  # the last line of a run that was killed while it wrote
    return None
  whole = isinstance(record, dict) and all(type(record.get(key)) is kind for key, kind in RECORD.items())
  return record if whole else None


def validation_accuracies(workdir: pathlib.Path) -> dict[int, float]:
  """Returns the accuracy on the validation images by step, from `metrics.jsonl`; averaged weights if there are any."""
  found = (record for record in records(workdir) if record['split'] == 'validation')
  return {record['step']: record['accuracy'] for record in found if 0 <= record['accuracy'] <= 1}


def check_resumable(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Refuses to train in a workdir whose checkpoints were made with another recipe.

  Raises:
    UserError: names the keys that differ, with both values; or `run.json` cannot be read.
  """
  if not has_checkpoints(workdir):
    return  # nothing to lose and nothing to continue
  before = recipe.flatten(read(workdir).config)
  if differing := recipe.differences(before, recipe.flatten(config), (recipe.NETWORK, recipe.TRAINING)):
    raise UserError(
      f'{workdir} holds a run of another recipe ({differing}): give another --workdir, or the same values'
    )


def check_agrees(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Refuses to evaluate a run with another recipe. Keys that change no result may differ.

  Raises:
    UserError: names the keys that differ, with both values.
  """
  before = recipe.flatten(read(members(workdir)[0]).config)
  if differing := recipe.differences(before, recipe.flatten(config), (recipe.NETWORK,), ('in the run', 'given')):
    raise UserError(f'{workdir} holds a run of another recipe ({differing}): leave --config and these keys out')


def data_of(folders: Sequence[pathlib.Path]) -> dict[str, Any]:
  """Returns what `datasets.load` must keep to continue or evaluate a run; nothing for a run that saved nothing yet.

  Args:
    folders: the folder of each member; all have the same data.

  Returns:
    The arguments `split_file`, `class_names` and `image_shape`.
  """
  begun = next(filter(has_checkpoints, folders), None)
  if begun is None:
    return {}
  run = read(begun)
  return {'split_file': begun / dividing.FILE, 'class_names': run.classes, 'image_shape': run.image_shape}


# Ensembles -----------------------------------------------------------------------------------------------------------


def is_run(workdir: pathlib.Path) -> bool:
  """Returns whether a folder holds a run or an ensemble. Its `run.json` is enough."""
  return (workdir / FILE).exists() or bool(_found(workdir))


def recipe_of(workdir: pathlib.Path) -> ConfigDict:
  """Returns the recipe of the run or ensemble in a folder; the folder of one member is a run of its own.

  Raises:
    UserError: as `read`.
  """
  found = _found(workdir)
  config = read(first_member(workdir)).config
  if found:
    config.ensemble.member = 0
  else:
    config.ensemble.members = 1
  return config


def _found(workdir: pathlib.Path) -> dict[int, pathlib.Path]:
  """The folders of the members that have begun, by ascending number; empty for a single run."""
  folders = [path.parent for path in workdir.glob(f'member_*/{FILE}')]
  found = {int(folder.name[7:]): folder for folder in folders if folder.name[7:].isdigit()}
  return {number: found[number] for number in sorted(found)}


def first_member(workdir: pathlib.Path) -> pathlib.Path:
  """Returns the folder of the first member of an ensemble; of a single run the folder itself."""
  return next(iter(_found(workdir).values()), workdir)


def members(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Finds the members of an ensemble, `member_0`, `member_1`, ...; a single run is its only member.

  Raises:
    UserError: a member of the ensemble is missing.
  """
  found = _found(workdir)
  if not found:
    return [workdir]
  folders = [*found.values()]
  count = max(read(folder).config.ensemble.members for folder in folders)
  missing = sorted(set(range(count)) - set(found)) if count > 1 else []
  if missing:
    raise UserError(
      f'{workdir} is an ensemble of {count}, and member_{missing[0]} has not begun: train on with the same command, '
      f'or give the --workdir of one member'
    )
  return folders


def check_alike(folders: list[pathlib.Path]) -> None:
  """Refuses to call runs an ensemble if different recipes trained them.

  Raises:
    UserError: names two members and the keys that differ.
  """
  first, *others = (_trained_by(read(folder).config) for folder in folders)
  for folder, other in zip(folders[1:], others, strict=True):
    if differing := recipe.differences(first, other, (recipe.NETWORK, recipe.TRAINING, recipe.FREE), ('there', 'here')):
      raise UserError(
        f'{folders[0]} and {folder} were trained by different recipes ({differing}): they are not members of one '
        'ensemble'
      )


def _trained_by(config: ConfigDict) -> dict[str, Any]:
  """Returns the keys that are equal in all members of an ensemble, with their values."""
  return {
    name: value
    for name, value in recipe.flatten(config).items()
    if name != 'ensemble.member' and (recipe.KEYS[name].scope != recipe.FREE or name in recipe.LENGTH)
  }


def ended(config: ConfigDict, folder: pathlib.Path) -> bool:
  """Returns whether the run in a folder is as long as the recipe says and still has its last checkpoint."""
  try:
    summary = json.loads((folder / 'summary.json').read_text())
    steps = summary['steps']
    long = summary['epochs'] >= config.epochs or 0 < config.max_steps <= steps
    early = 0 < config.early_stopping <= summary.get('epochs_without_better', 0)
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return False
  return (long or early) and (folder / 'checkpoints' / f'{steps}').is_dir()
