"""GoogLeNet in JAX: trains and evaluates a recipe.

  python main.py --config=configs/fashion_fast.py
  python main.py --config=configs/fashion_fast.py --mode=evaluate

The same training command continues an interrupted run. Any key of the recipe can be given as --config.KEY=VALUE; the
keys and their meaning stand in configs/default.py. Recipes: configs/digits.py (a minute on a laptop),
configs/fashion_fast.py (minutes), configs/fashion.py (the article's), configs/fashion_best.py and configs/paper.py
(ImageNet, seven models), these for an accelerator.
"""

# Short on purpose: flags, checks, one call. The program is in googlenet_jax/.
import errno
import os
import pathlib
import signal
import sys
import traceback
from types import FrameType

from absl import app, flags
from ml_collections import config_flags

from googlenet_jax.host import huge_pages

MODES = ('train', 'evaluate')
CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe, such as configs/digits.py.', lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run. Default: runs/NAME for configs/NAME.py.')
MODE = flags.DEFINE_enum('mode', 'train', MODES, 'What to do.')
STEP = flags.DEFINE_integer('step', None, 'evaluate: step of the checkpoint; the newest by default.')
CROPS = flags.DEFINE_list('crops', ['1', '10', '144'], 'evaluate: by how many crops of an image: 1, 10, 144.')
SPLIT = flags.DEFINE_enum('split', 'test', ('train', 'validation', 'test'), 'evaluate: which images.')


def main(argv: list[str]) -> None:
  """Runs the mode asked for."""
  from googlenet_jax.host.errors import UserError

  if len(argv) > 1:
    raise UserError(f'unexpected argument {argv[1]}: options are written --name=value')
  if CONFIG.value is None:
    raise UserError('--config is missing, or its get_config returns None: for example --config=configs/digits.py')

  from googlenet_jax import recipe
  from googlenet_jax.host import checkpoints, console, sharding

  console.quieten_libraries()
  recipe.validate(CONFIG.value)
  sharding.use_compilation_cache()
  sharding.use_cpu_cores(CONFIG.value)
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS['config']).partition(':')[0]).stem
  workdir = pathlib.Path(WORKDIR.value or f'runs/{name}').expanduser()
  if MODE.value == 'evaluate':
    from googlenet_jax.data import crops
    from googlenet_jax.evaluation import table

    unknown = sorted(set(CROPS.value) - set(map(str, crops.COUNTS)))
    if unknown or not CROPS.value:
      raise UserError(f'--crops={",".join(CROPS.value)}: choose from {",".join(map(str, crops.COUNTS))}')
    counts = sorted(set(map(int, CROPS.value)))
    table.evaluate_checkpoint(CONFIG.value, workdir, STEP.value, SPLIT.value, counts)
  else:
    from googlenet_jax.training import ensemble

    for name in ('step', 'crops', 'split'):
      if flags.FLAGS[name].present:
        raise UserError(f'--{name} is for --mode=evaluate')
    try:
      workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f'--workdir={workdir} cannot be made: {error.strerror}') from error
    try:
      with checkpoints.lock(workdir):
        ensemble.train_members(CONFIG.value, workdir)
    except OSError as error:
      if error.filename or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise
      raise UserError(f'{error.strerror}; the run writes to {workdir}') from error  # a full disk names no file


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; raises UserError where absl and ml_collections would print pages."""
  from googlenet_jax.host.errors import UserError

  try:
    positional = flags.FLAGS(argv)
    getattr(CONFIG.value, 'to_dict', None)  # of a recipe that cannot be opened ml_collections tells at the first use
    return positional
  except flags.Error as error:
    text, _, pages = str(error).partition('Traceback')  # of what the recipe raised: the last line says it
    raise UserError(f'{text}{pages.strip().splitlines()[-1]}' if pages else text) from error
  except OSError as error:
    reason = str(error.__cause__ or error).splitlines()[-1].strip()
    before, _, path = reason.partition('No such file or directory: ')
    raise UserError(f'--config: {path} does not exist' if path else f'--config cannot be read: {reason}') from error
  except Exception as error:  # the recipe is Python and may raise anything
    frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if f.filename.endswith('.py')]
    frames = [f for f in frames if 'site-packages' not in f.filename]
    if isinstance(error, AttributeError) and 'get_config' not in str(error) and not frames:  # a misspelt --config.KEY
      key = getattr(error.args[0], 'args', error.args)[0]
      raise UserError(f'no such key in the recipe: {key}. configs/default.py lists them') from error
    where = f' ({frames[-1].filename}, line {frames[-1].lineno})' if frames else ''
    raise UserError(f'--config cannot be read: {type(error).__name__}: {error}{where}') from error


def interrupt(number: int, frame: FrameType | None) -> None:
  """Ends what the main thread is doing; the loop in train.py has its own answer to signals."""
  raise KeyboardInterrupt(number)


def run() -> None:
  """Runs `main`; every mistake of the user ends as one line and status 2."""
  from googlenet_jax.host.errors import UserError

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, interrupt)
  try:
    app.run(main, flags_parser=parse_flags)
  except (UserError, OSError) as error:  # OSError: a full disk, a folder that may not be written
    print('error: ' + ' '.join(str(error).split()), file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt as error:
    try:
      print('interrupted; checkpoints already written stay', file=sys.stderr)
      sys.stdout.flush()
      sys.stderr.flush()
    finally:
      os._exit(128 + error.args[0])  # sys.exit would wait for a thread in which XLA compiles, and then crash


if __name__ == '__main__':
  huge_pages.restart()
  run()
