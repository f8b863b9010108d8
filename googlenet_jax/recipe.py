"""Recipes: every key once, with its default, meaning, range, and who may change it.

A recipe is a Python file with a function `get_config` (see configs/). It starts from `default()` and changes some
keys. `--config.KEY=VALUE` changes single keys. A new key needs one line in KEYS, the code that reads it, and a line in
docs/recipes.md.
"""

import dataclasses
import difflib
import json
import pathlib
import re
import runpy
import traceback
from typing import Any, NamedTuple

import ml_collections

from googlenet_jax.data import preparing
from googlenet_jax.host.errors import UserError, expanded, one_line
from googlenet_jax.model.options import STAGES, Options

# Who may change a key after training began.
NETWORK = 'network'  # nobody: the weights, or what the network sees, depend on it
TRAINING = 'training'  # only an evaluation, which does not read it; not a resumed run
FREE = 'free'  # everybody: how long a run is, what it writes, where the same data lie


class Key(NamedTuple):
  """One key of a recipe. Its type is the type of the default."""

  default: bool | int | float | str
  meaning: str
  scope: str = TRAINING
  least: float | None = None  # smallest value
  above: float | None = None  # the value must be larger
  most: float | None = None  # largest value
  below: float | None = None  # the value must be smaller
  choices: tuple[str, ...] | tuple[int, ...] | None = None


def _model_keys() -> dict[str, Key]:
  keys = {}
  for field in dataclasses.fields(Options):
    scope = TRAINING if field.name == 'dropout' else NETWORK
    keys[f'model.{field.name}'] = Key(field.default, scope=scope, **field.metadata)
  return keys


KEYS = {
  'name': Key('', 'name in titles of pictures; empty: the name of the recipe file', FREE),
  'seed': Key(0, 'seed of initial weights, order of images, augmentation and dropout', least=0, most=2**31 - 1),
  'epochs': Key(10, 'passes over the training images', FREE, least=1),
  'max_steps': Key(0, 'stop after this many steps in all; 0: no limit', FREE, least=0),
  'batch_size': Key(256, 'images in a step, over all devices', least=1),
  'image_size': Key(224, 'side of the input in pixels, padding included', NETWORK, least=1, most=4096),
  'dtype': Key('float32', 'type of the computation; parameters are float32', NETWORK, choices=('float32', 'bfloat16')),
  'learning_rate': Key(0.01, 'base learning rate', least=0),
  'schedule': Key('step', 'shape of the learning rate', choices=('step', 'constant', 'cosine', 'linear', 'one_cycle')),
  'warmup_epochs': Key(0.0, 'epochs in which the learning rate rises from 0 to its base; 0: none', least=0),
  'decay_factor': Key(0.96, 'factor of each decay of the step schedule', least=0, most=1),
  'decay_epochs': Key(8, 'epochs between two decays', least=1),
  'momentum': Key(0.9, 'momentum of SGD', least=0, below=1),
  'nesterov': Key(False, 'Nesterov momentum'),
  'weight_decay': Key(0.0, 'weight decay, applied to kernels only', least=0),
  'clip_norm': Key(0.0, 'largest norm of the whole gradient; 0: no clipping', least=0),
  'label_smoothing': Key(0.0, 'share of the target spread over all classes', least=0, below=1),
  'class_weights': Key(
    'none',
    'weights of the classes in the training loss; balanced: rare classes count as much as common ones',
    choices=('none', 'balanced'),
  ),
  'average_decay': Key(0.0, 'decay of the averaged weights, which predict; 0: none', NETWORK, least=0, below=1),
  'init_from': Key('', 'workdir of a run, or a .pth, .pt or .safetensors file, whose weights are the first ones'),
  'freeze': Key(
    '', 'last stage that is frozen, with all stages before it and their batch statistics', choices=('', *STAGES)
  ),
  'body_learning_rate': Key(
    1.0, 'learning rate of all stages before the heads, as a ratio of that of the heads', least=0, most=10
  ),
  'micro_batches': Key(1, 'parts of a batch that a device takes in turn, to need less memory', least=1),
  'steps_per_call': Key(
    0, 'most steps in a call of the devices; 0: up to ten by their work, one on a CPU', FREE, least=0, most=1000
  ),
  **_model_keys(),
  'data.name': Key('fashion_mnist', 'folder, digits, or an image classification set of TFDS', NETWORK),
  'data.source_dir': Key(
    '', 'folder of pictures, or of the four original .gz files; empty for those: FASHION_MNIST_DIR', FREE
  ),
  'data.data_dir': Key('', 'folder of prepared TFDS sets; empty: ~/tensorflow_datasets', FREE),
  'data.validation_examples': Key(0, 'training images held out for validation; not for a folder', NETWORK, least=0),
  'data.canvas': Key(
    512, 'side in pixels; larger images are shrunk to it (sets with many sizes)', NETWORK, least=1, most=4096
  ),
  'data.channels': Key(
    0, 'folder: 1 for grey, 3 for colour; 0: grey if every picture is grey', NETWORK, least=0, most=3
  ),
  'data.validation_share': Key(
    0.1, 'folder: share of the pictures for validation, if there is no validation folder', NETWORK, least=0, below=1
  ),
  'data.test_share': Key(
    0.1, 'folder: share of the pictures for the test, if there is no test folder', NETWORK, above=0, below=1
  ),
  'data.split_seed': Key(0, 'folder: seed of the split', NETWORK, least=0, most=2**31 - 1),
  'data.max_unreadable': Key(0.01, 'folder: largest share of pictures that cannot be read', FREE, least=0, most=1),
  'data.memory_mb': Key(
    2000, 'folder: pictures that take more megabytes than this are decoded in each epoch', FREE, least=0
  ),
  'augment.padding': Key(0, 'pixels of zeros on each side', NETWORK, least=0),
  'augment.shift': Key(0, 'largest random shift in pixels', least=0),
  'augment.flip': Key(False, 'mirror left to right at random'),
  'augment.alternating_flip': Key(False, 'mirror each image in every second epoch; which epoch is first is random'),
  'augment.resize': Key(1.0, 'short side after resizing, divided by image_size', NETWORK, least=1, most=2),
  'augment.min_area': Key(1.0, 'least share of an image in a random crop; 1: no crops; paper: 0.08', above=0, most=1),
  'augment.max_aspect': Key(4 / 3, 'largest aspect ratio of a random crop', least=1),
  'augment.random_interpolation': Key(False, 'resize random crops by a random method'),
  'augment.photometric': Key(0.0, 'strength of random brightness, contrast, colour and light', least=0, most=1),
  'augment.erasing': Key(0.0, 'probability of a rectangle of noise', least=0, most=1),
  'augment.cutmix': Key(0.0, 'probability that an image gets a rectangle of another image (CutMix)', least=0, most=1),
  'augment.mixup': Key(0.0, 'blend with another image (mixup), weight from Beta(mixup, mixup); 0: none', least=0),
  'ensemble.members': Key(1, 'number of networks to train', FREE, least=1, most=1000),
  'ensemble.member': Key(0, 'number of this network, if members are trained apart', least=0, most=999),
  'ensemble.side_by_side': Key(False, 'train members at the same time, each on its share of the devices', FREE),
  'ensemble.initial_weights': Key('same', 'initial weights of members; paper: same', choices=('same', 'different')),
  'evaluate_every_epochs': Key(1, 'epochs between two evaluations, each with a checkpoint', FREE, least=1),
  'early_stopping': Key(0, 'end after this many epochs without a better validation accuracy; 0: never', FREE, least=0),
  'skip_nonfinite': Key(False, 'leave out updates whose loss or gradient is not finite, and count them', FREE),
  'log_every_steps': Key(50, 'steps between two log points', FREE, least=1),
  'checkpoint_every_steps': Key(0, 'steps between other checkpoints; 0: none', FREE, least=0),
}
LENGTH = ('epochs', 'max_steps')  # how long a run is
KINDS = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}


def is_of_kind(name: str, value: Any) -> bool:
  """Returns whether a value has the type of a key. A whole number is a number, too."""
  kind = type(KEYS[name].default)
  return type(value) is kind or (kind, type(value)) == (float, int)


def default() -> ml_collections.ConfigDict:
  """Returns a recipe with every key at its default: d2l's network on Fashion-MNIST, SGD with momentum."""
  return from_flat({name: key.default for name, key in KEYS.items()})


def from_flat(values: dict[str, Any]) -> ml_collections.ConfigDict:
  """Makes a recipe from values by dotted key, such as `model.norm`."""
  config = ml_collections.ConfigDict()
  for name, value in values.items():
    part, _, last = name.rpartition('.')
    if part and part not in config:
      config[part] = ml_collections.ConfigDict()
    (config[part] if part else config)[last] = value
  return config


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
  """Returns the values of a recipe, or of nested dicts, by dotted key."""
  flat = {}
  for key, value in (tree.to_dict() if isinstance(tree, ml_collections.ConfigDict) else tree).items():
    flat.update(flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value})
  return flat


def differences(
  there: dict[str, Any], here: dict[str, Any], scopes: tuple[str, ...], where: tuple[str, str] = ('there', 'now')
) -> str:
  """Returns the keys of these scopes that differ, with both values as text; empty if none differs."""
  there, here = _with_name_of_tfds(there), _with_name_of_tfds(here)
  names = [name for name in {**there, **here} if name not in KEYS or KEYS[name].scope in scopes]
  return '; '.join(
    f'{name}: {there.get(name)!r} {where[0]}, {here.get(name)!r} {where[1]}'
    for name in names
    if there.get(name) != here.get(name)
  )


def _with_name_of_tfds(values: dict[str, Any]) -> dict[str, Any]:
  return {**values, 'data.name': preparing.normalised(str(values['data.name']))} if 'data.name' in values else values


# Reading a recipe and changing its keys ------------------------------------------------------------------------------


def read(name: str) -> ml_collections.ConfigDict:
  """Runs a recipe file and returns its recipe.

  Args:
    name: path of the file. `PATH:TEXT` calls `get_config(TEXT)`.

  Raises:
    UserError: there is no such file, or its code raises an error; the text names the line of the recipe.
  """
  path, *argument = split_name(name)
  file = expanded(path, '--config').absolute()
  if not file.is_file():
    what = 'it is a folder' if file.is_dir() else 'there is no such file'
    raise UserError(f'--config={name}: {what}. {_recipes(path)}')
  try:
    config = runpy.run_path(str(file))['get_config'](*argument)
  except Exception as error:  # the recipe is Python and may raise anything
    if isinstance(error, KeyError) and error.args == ('get_config',):
      raise UserError(f'--config={name}: the file has no function get_config') from error
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    if isinstance(error, SyntaxError) and error.filename == str(file):
      lines.append(error.lineno)
    where = f' ({file}, line {lines[-1]})' if lines else ''
    text = error.args[0] if error.args and not isinstance(error, OSError) else error
    text = ' '.join(str(text).split())
    raise UserError(f'--config={name} cannot be read: {type(error).__name__}: {text}{where}') from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f'--config={name}: get_config returns {type(config).__name__}, not the recipe: end with return config'
    )
  if not config.get('name'):
    config.name = pathlib.Path(path).stem
  return config


def split_name(name: str) -> list[str]:
  """Returns the path, and the text if there is one, of `PATH:TEXT`. The path may begin with `file:` or `C:`."""
  start = re.match(r'[A-Za-z][A-Za-z0-9+-]*:(?=[/\\])', name)
  before = start[0] if start else ''
  path, *argument = name.removeprefix(before).split(':', 1)
  return [before + path, *argument]


def _recipes(path: str) -> str:
  here = pathlib.Path('configs')
  folder = here if here.is_dir() else pathlib.Path(__file__).parents[1] / here  # started from another folder
  shipped = sorted(p for p in folder.glob('[a-z]*.py') if p.stem != 'default')
  near = difflib.get_close_matches(pathlib.Path(path).stem, [p.stem for p in shipped], 1)
  meant = [f'{path}.py'] if pathlib.Path(f'{path}.py').is_file() else [f'{folder / name}.py' for name in near]
  hint = f'Did you mean {meant[0]}? ' if meant else ''
  return f'{hint}Recipes in {folder}: {", ".join(p.name for p in shipped) or "none"}'


def suggest(name: str) -> str:
  """Returns a question with the keys most like `name`, or the name of the page that lists all keys."""
  word = name.split('.')[-1].lower().replace('-', '_')
  last = {key: key.split('.')[-1] for key in KEYS}
  near = [key for key in KEYS if word in (last[key], ''.join(part[0] for part in last[key].split('_')))]
  near = near or difflib.get_close_matches(name, KEYS, 2, 0.81)
  near = near or [key for key in KEYS if last[key] in difflib.get_close_matches(word, last.values(), 2, 0.75)]
  return f'Did you mean {" or ".join(f"--config.{key}" for key in near)}?' if near else 'docs/recipes.md lists all keys'


def override(config: ml_collections.ConfigDict, name: str, text: str) -> None:
  """Sets a key from the text of `--config.KEY=TEXT`.

  Raises:
    UserError: the key is unknown, or the text is not a value of its type.
  """
  if name not in KEYS:
    raise UserError(f'--config.{one_line(name)} is no key of a recipe. {suggest(name)}')
  kind = type(KEYS[name].default)
  try:
    value = {'true': True, 'false': False}[text.lower()] if kind is bool else kind(text)
  except (ValueError, KeyError) as error:
    raise UserError(f'--config.{name}={one_line(text)}: it must be {KINDS[kind]}') from error
  config.update_from_flattened_dict({name: value})


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns a recipe as nested dicts of JSON values."""
  return json.loads(config.to_json())


def write_table(page: str) -> None:
  """Writes the table of all keys between the marks `<!-- keys -->` of a Markdown page: `make docs`."""
  before, _, rest = pathlib.Path(page).read_text().partition('<!-- keys -->')
  after = rest.partition('<!-- end of keys -->')[2]
  lines = ['| Key | Default | Meaning | Changes later |', '|---|---|---|---|']
  words = {FREE: 'yes', TRAINING: 'evaluation only', NETWORK: 'no'}
  for name, key in KEYS.items():
    default = f'{key.default:.4g}' if isinstance(key.default, float) else str(key.default) or '(empty)'
    choices = [str(choice) for choice in key.choices or () if choice != '']
    new = [choice for choice in choices if choice not in key.meaning]
    meaning = f'{key.meaning}: {", ".join(choices)}' if new else key.meaning
    lines.append(f'| `{name}` | {default} | {meaning} | {words[key.scope]} |')
  table = '\n'.join(lines)
  pathlib.Path(page).write_text(f'{before}<!-- keys -->\n\n{table}\n\n<!-- end of keys -->{after}')
