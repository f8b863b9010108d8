"""GoogLeNet in JAX: trains and evaluates.

  python main.py --config=configs/digits.py            # trains into runs/digits; ^C saves, the same command continues
  python main.py --config=configs/digits.py --config.epochs=3 --workdir=runs/short
  python main.py --mode=evaluate --workdir=runs/digits # the run knows its own recipe

Recipes for a laptop: configs/digits.py (a minute) and configs/fashion_fast.py (minutes). Recipes for a GPU or TPU:
configs/fashion.py (the network of Dive into Deep Learning), configs/fashion_speed.py (short), configs/fashion_best.py
(accurate), and configs/paper.py (ImageNet, seven networks). --config.KEY=VALUE changes a key of a recipe.
docs/recipes.md lists all keys; googlenet_jax/recipe.py defines them.
"""

# This file has the flags, and one call for each mode. The program is in googlenet_jax/.
import difflib
import os
import pathlib
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from absl import app, flags

from googlenet_jax.host import huge_pages

if TYPE_CHECKING:
  from ml_collections import ConfigDict

MODES = ('train', 'evaluate')
CONFIG = flags.DEFINE_string(
  'config', None, 'Recipe, such as --config=configs/digits.py. Not needed where the workdir holds a run.'
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run, such as --workdir=runs/mine. Default: runs/NAME for configs/NAME.py.'
)
MODE = flags.DEFINE_enum('mode', 'train', MODES, 'What to do, such as --mode=evaluate.')
STEP = flags.DEFINE_string(
  'step', None, 'evaluate: step of the checkpoint, such as --step=858, or --step=best for the best on the validation '
  'images. Default: the newest.'
)  # fmt: skip
CROPS = flags.DEFINE_list(
  'crops', ['1', '6', '10', '144'], 'evaluate: crops per image, such as --crops=1 (quick) or --crops=1,10,144; 6 are '
  'views of the whole image, mirrored and shifted by one pixel.'
)  # fmt: skip
SPLIT = flags.DEFINE_enum(
  'split', 'test', ('train', 'validation', 'test'), 'evaluate: which images, such as --split=validation.'
)
_overrides: list[tuple[str, str]] = []  # --config.KEY=VALUE, in order


def main(argv: list[str]) -> None:
  """Runs the chosen mode."""
  from googlenet_jax import recipe
  from googlenet_jax.host import cache, console, cpu_cores
  from googlenet_jax.host.errors import UserError

  if len(argv) > 1:
    raise UserError(f'unexpected argument {argv[1]}: options are written --name=value')
  for name in ('step', 'crops', 'split'):
    if MODE.value == 'train' and flags.FLAGS[name].present:
      raise UserError(f'--{name} is for --mode=evaluate')
  console.quieten_libraries()
  config = config_of_flags()
  recipe.validate(config)
  cache.use_compilation_cache()
  cpu_cores.use_cpu_cores(config)
  if MODE.value == 'evaluate':
    from googlenet_jax.evaluation import table

    table.evaluate_run(config, workdir_of_flags(), step_of_flags(), SPLIT.value, crops_of_flags())
  else:
    from googlenet_jax.training import ensemble

    ensemble.train_in(config, workdir_of_flags())


def config_of_flags() -> 'ConfigDict':
  """Returns the recipe of --config, or else of the run in --workdir, with the changes of --config.KEY=VALUE."""
  from googlenet_jax import recipe, runs
  from googlenet_jax.host.errors import UserError

  workdir = workdir_of_flags()
  if workdir is None:
    missing = '--config is missing, such as --config=configs/digits.py'
    if MODE.value != 'train':
      missing = '--workdir is missing: give the folder of a run, such as --workdir=runs/digits'
    raise UserError(missing)
  if CONFIG.value is not None:
    config = recipe.read(CONFIG.value)
  elif MODE.value == 'train' and not (runs.is_run(workdir) or runs.has_checkpoints(workdir)):
    raise UserError(f'--config is missing, such as --config=configs/digits.py: {workdir} holds no run to continue')
  else:
    config = runs.recipe_of(workdir)
  for name, text in _overrides:
    recipe.override(config, name, text)
  if MODE.value == 'evaluate':
    runs.check_agrees(config, workdir)
  return config


def workdir_of_flags() -> pathlib.Path | None:
  """Returns the folder of the run; None if neither --workdir nor --config is given."""
  if WORKDIR.value is None and CONFIG.value is None:
    return None
  name = pathlib.Path((CONFIG.value or '').partition(':')[0]).stem
  return pathlib.Path(WORKDIR.value or f'runs/{name}').expanduser()


def step_of_flags() -> int | str | None:
  """Returns --step as a number, 'best' or None."""
  from googlenet_jax.host.errors import UserError

  if STEP.value in (None, 'best'):
    return STEP.value
  if not STEP.value.isdecimal():
    raise UserError(f'--step={STEP.value}: give a number, or best')
  return int(STEP.value)


def crops_of_flags() -> list[int]:
  """Returns --crops as ascending numbers."""
  from googlenet_jax.data import crops
  from googlenet_jax.host.errors import UserError

  if not CROPS.value or set(CROPS.value) - set(map(str, crops.COUNTS)):
    raise UserError(f'--crops={",".join(CROPS.value)}: choose from {",".join(map(str, crops.COUNTS))}')
  return sorted(set(map(int, CROPS.value)))


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line. A mistake raises UserError; absl itself would print pages of help."""
  from googlenet_jax.host.errors import UserError

  rest, arguments = argv[:1], iter(argv[1:])
  for argument in arguments:
    name, equals, value = argument.lstrip('-').partition('=')
    if argument.startswith('-') and name.startswith('config.'):
      _overrides.append((name.removeprefix('config.'), value if equals else next_value(name, arguments)))
    elif argument.startswith('-') and name.startswith('noconfig.'):
      _overrides.append((name.removeprefix('noconfig.'), 'False'))
    else:
      rest.append('--help' if argument == '-h' else argument)
  try:
    return flags.FLAGS(rest)
  except flags.UnrecognizedFlagError as error:
    raise UserError(unknown_flag(error.flagname)) from error
  except flags.Error as error:
    raise UserError(str(error)) from error


def next_value(name: str, arguments) -> str:
  """Returns the value of `--config.KEY VALUE`; a switch needs none."""
  from googlenet_jax import recipe
  from googlenet_jax.host.errors import UserError

  key = recipe.KEYS.get(name.removeprefix('config.'))
  if key and isinstance(key.default, bool):
    return 'True'
  value = next(arguments, None)
  if value is None or value.startswith('--'):
    raise UserError(f'--{name} needs a value: --{name}=VALUE')
  return value


def unknown_flag(name: str) -> str:
  """Says that a flag does not exist, and what the user may have meant."""
  from googlenet_jax import recipe

  own = [flag.name for flag in flags.FLAGS.get_flags_for_module(__name__)]
  near = difflib.get_close_matches(name, own, 1)
  hint = f'Did you mean --{near[0]}?' if near else recipe.suggest(name)
  return f'--{name} is no flag. {hint} (python main.py --help)'


def interrupt(number: int, frame: FrameType | None) -> None:
  """Interrupts the main thread. During training, `StopRequest` handles signals instead."""
  raise KeyboardInterrupt(number)


def what_stays() -> str:
  """Says which checkpoints a program leaves that ends too early."""
  from googlenet_jax import runs

  workdir = workdir_of_flags() if flags.FLAGS.is_parsed() else None
  folders = [workdir, *workdir.glob('member_*')] if workdir else []
  saved = any(map(runs.has_checkpoints, folders))
  return f'the checkpoints in {workdir} stay' if saved else 'nothing was saved yet'


def run() -> None:
  """Runs `main`; every mistake of the user ends as one line and status 2."""
  from googlenet_jax.host.errors import UserError

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, interrupt)
  try:
    app.run(main, flags_parser=parse_flags)
  except BrokenPipeError:
    print(f'error: nobody reads the output any more; {what_stays()}', file=sys.stderr)
    os._exit(2)  # sys.exit would try to write what is left of the output
  except (UserError, OSError) as error:  # OSError: a full disk, or a folder that is not writable
    text = f'{error.filename}: {error.strerror}' if getattr(error, 'filename', None) else str(error)
    print('error: ' + ' '.join(text.split()), file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt as error:
    try:
      print(f'interrupted; {what_stays()}', file=sys.stderr)
      sys.stdout.flush()
      sys.stderr.flush()
    finally:
      os._exit(128 + error.args[0])  # sys.exit would wait for a thread in which XLA compiles, and then crash


if __name__ == '__main__':
  huge_pages.restart()
  run()
