"""GoogLeNet in JAX: trains, evaluates, predicts, explains, exports and shows.

  python main.py --config=configs/digits.py            # trains into runs/digits; ^C saves, the same command continues
  python main.py --config=configs/digits.py --config.epochs=3 --workdir=runs/short
  python main.py --mode=evaluate --workdir=runs/digits # the run knows its own recipe
  python main.py --mode=predict --workdir=runs/digits PATH...  # files, folders, patterns; - reads a list from stdin
  python main.py --mode=explain --workdir=runs/digits PATH...  # where in the picture the network finds what it says
  python main.py --mode=inspect --config=configs/paper.py      # the layers, as in the paper's table 1
  python main.py --mode=export --to=onnx --workdir=runs/digits # for other programs; also stablehlo and torch
  python main.py --mode=page --workdir=runs/digits             # a page in the browser, also while it trains
  python main.py --mode=report --workdir=runs/digits           # the same as one file, report.html

Recipes for a laptop: configs/digits.py (a minute) and configs/fashion_fast.py (minutes). Recipes for a GPU or TPU:
configs/fashion.py (the network of Dive into Deep Learning), configs/fashion_speed.py (short), configs/fashion_best.py
(accurate), and configs/paper.py (ImageNet, seven networks). --config.KEY=VALUE changes a key of a recipe.
docs/recipes.md lists all keys; googlenet_jax/recipe.py defines them.

Several hosts: under Slurm (srun), Open MPI (mpirun), Kubernetes and on Cloud TPUs the same command finds the other
processes; elsewhere give --coordinator, --num_processes and --process_id. docs/scaling.md shows how.

Exit status: 0; 1 if predict or explain could not read some of the pictures; 2 after a mistake, which is one line; 75
after another process was killed.
"""

# This file has the flags, and one call for each mode. The program is in googlenet_jax/.
import contextlib
import functools
import pathlib
from typing import TYPE_CHECKING

from absl import app, flags

from googlenet_jax import command_line, ending
from googlenet_jax.exporting.formats import FORMATS, PRECISIONS
from googlenet_jax.host import console, errors, huge_pages, program, signals

if TYPE_CHECKING:
  from ml_collections import ConfigDict

MODES = ('train', 'evaluate', 'predict', 'explain', 'inspect', 'export', 'page', 'report')
ALONE = ('export', 'page', 'report')  # modes that run in one process
READ_BY = {  # flag: modes that read it; --workdir is for all
  'config': ('train', 'evaluate', 'inspect'),
  'step': ('evaluate', 'predict', 'explain', 'inspect', 'export', 'page', 'report'),
  'crops': ('evaluate', 'predict'),
  'split': ('evaluate',),
  'top': ('predict', 'explain'),
  'output': ('evaluate', 'predict', 'explain', 'inspect', 'export', 'report'),
  'to': ('export',),
  'precision': ('export',),
  'compare': ('page', 'report'),
  'port': ('page',),
  'host': ('page',),
}
DATA = ('data.source_dir', 'data.data_dir')  # recipe keys that say where the images of a run are
READ_DATA = ('export', 'page', 'report')  # modes that read them, and otherwise the recipe of the run
AGAIN = {'allow_override': True}  # a notebook may run this file again
CONFIG = flags.DEFINE_string(
  'config', None, 'Recipe, such as --config=configs/digits.py. Not needed where the workdir holds a run.', **AGAIN
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run, such as --workdir=runs/mine. Default: runs/NAME for configs/NAME.py.', **AGAIN
)
MODE = flags.DEFINE_enum('mode', 'train', MODES, 'What to do, such as --mode=evaluate.', **AGAIN)
STEP = flags.DEFINE_string(
  'step', None, 'Step of the checkpoint, such as --step=858, or --step=best for the best on the validation images. '
  'Default: the newest.', **AGAIN
)  # fmt: skip
CROPS = flags.DEFINE_list(
  'crops', None, 'evaluate: crops per image, such as --crops=1 (quick) or --crops=1,10,144; default 1,6,10,144. 6 are '
  'views of the whole image, mirrored and shifted by one pixel. predict: one of these numbers; default 1.', **AGAIN
)  # fmt: skip
SPLIT = flags.DEFINE_enum(
  'split', 'test', ('train', 'validation', 'test'), 'evaluate: which images, such as --split=validation.', **AGAIN
)
TOP = flags.DEFINE_integer(
  'top', None, 'predict, explain: classes per picture, such as --top=2. Default: 5, or 3 for explain.', lower_bound=1,
  **AGAIN
)  # fmt: skip
OUTPUT = flags.DEFINE_string(
  'output',
  None,
  'Folder to write to, such as --output=answers. Default: in the workdir.',
  **AGAIN,
)
TO = flags.DEFINE_enum(
  'to', None, tuple(FORMATS), 'export: for which programs, such as --to=onnx: stablehlo for JAX, onnx '
  'for onnxruntime and others, torch for PyTorch.', **AGAIN
)  # fmt: skip
PRECISION = flags.DEFINE_enum(
  'precision', 'float32', PRECISIONS, 'export --to=onnx: numbers in the file, such as '
  '--precision=int8.', **AGAIN
)  # fmt: skip
COMPARE = flags.DEFINE_string(
  'compare', None, 'page, report: another run to stand beside, such as --compare=runs/other.', **AGAIN
)
PORT = flags.DEFINE_integer(
  'port', 7860, 'page: port of the page, such as --port=8000.', lower_bound=1, upper_bound=65535, **AGAIN
)
HOST = flags.DEFINE_string(
  'host', '127.0.0.1', 'page: address to listen on. Default: this computer only. --host=0.0.0.0: everyone on the '
  'network.', **AGAIN
)  # fmt: skip
COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'Host and port of process 0 of several, such as --coordinator=node1:1234. srun, mpirun and '
  'others say it themselves.', **AGAIN
)  # fmt: skip
NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes, such as --num_processes=2, where no launcher says it.', lower_bound=1,
  **AGAIN
)  # fmt: skip
PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Number of this process, from 0, such as --process_id=0.', lower_bound=0, **AGAIN
)
START_TIMEOUT = flags.DEFINE_float(
  'start_timeout', 300.0, 'Seconds in which all processes must have come, such as --start_timeout=600.', **AGAIN
)
MEMORY = {  # what helps if the memory is not enough; a training says it itself
  'evaluate': 'try a smaller --config.batch_size, or --crops=1',
  'predict': f'try --crops=1, or {errors.MEMORY_OF_OTHERS}',
}


def main(argv: list[str]) -> int | None:
  """Runs the chosen mode and returns the exit status; None is 0."""
  check_flags(argv[1:])
  console.quieten_libraries()
  try:
    import jax  # noqa: F401
  except Exception as error:  # any, such as for JAX_ENABLE_X64=maybe
    text = errors.trouble(error, errors.MEMORY_OF_OTHERS) or errors.reason(error)
    raise errors.UserError(f'JAX cannot be imported: {text}') from error
  from googlenet_jax import recipe_checks
  from googlenet_jax.host import backend, distributed, processes

  place = distributed.place(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
  if place is not None and MODE.value in ALONE:
    raise errors.UserError(f'--mode={MODE.value} works in one process: start it once, not {place.count} times')
  with (
    backend.our_settings_everywhere(),
    errors.plain_troubles(MEMORY.get(MODE.value, errors.MEMORY_OF_OTHERS)),
  ):
    config = None
    if MODE.value in READ_BY['config']:
      config = config_of_flags()
      recipe_checks.validate(config, trains=MODE.value != 'inspect')
    given = {f'--{flag.name}': flag.value for flag in (MODE, STEP, CROPS, SPLIT, TOP)}
    given['--workdir'] = str(workdir_of_flags() if config else workdir_of_run())
    with distributed.together(place, START_TIMEOUT.value, ends_itself=True):
      processes.agree('commands', given)
      return use_run(argv[1:]) if config is None else run_mode(config)


def use_run(paths: list[str]) -> int | None:
  """Runs a mode for which the run knows its recipe; returns the exit status."""
  if MODE.value == 'predict':
    from googlenet_jax.evaluation import predict

    (count,) = crops_of_flags()
    return predict.predict_paths(workdir_of_run(), paths, step_of_flags(), TOP.value or 5, count, output_of_flags())
  if MODE.value == 'explain':
    from googlenet_jax.evaluation import explain

    return explain.explain_paths(workdir_of_run(), paths, step_of_flags(), TOP.value or 3, output_of_flags())
  other = None if COMPARE.value is None else errors.expanded(COMPARE.value, '--compare')
  data = {name.removeprefix('data.'): text for name, text in command_line.overrides}
  if MODE.value == 'export':
    from googlenet_jax.exporting import export

    workdir, step, output = workdir_of_run(), step_of_flags(), output_of_flags()
    export.export_run(workdir, TO.value, step, output, PRECISION.value, paths, data)
  elif MODE.value == 'page':
    from googlenet_jax.page import app

    app.serve(workdir_of_run(), step_of_flags(), PORT.value, HOST.value, other, data)
  else:
    from googlenet_jax.page import report

    report.write_report(workdir_of_run(), step_of_flags(), output_of_flags(), other, data)
  return None


def run_mode(config: 'ConfigDict') -> None:
  """Trains, evaluates or inspects a recipe."""
  from googlenet_jax import recipe_checks
  from googlenet_jax.host import backend, cache, cpu_cores, distributed

  recipe_checks.check_alike(config)
  cache.use_compilation_cache()
  cpu_cores.use_cpu_cores(config)
  joins = MODE.value == 'evaluate'
  if MODE.value == 'train':
    from googlenet_jax.training import ensemble

    joins = not ensemble.trains_apart(config)
  if joins:
    distributed.join()
  backend.start()
  if MODE.value == 'evaluate':
    from googlenet_jax.evaluation import table

    split, counts = SPLIT.value, crops_of_flags()
    table.evaluate_run(config, workdir_of_flags(), step_of_flags(), split, counts, output_of_flags())
  elif MODE.value == 'inspect':
    from googlenet_jax.evaluation import inspection

    workdir = workdir_of_flags() if WORKDIR.value else None
    inspection.inspect(config, workdir, step_of_flags(), output_of_flags())
  else:
    ensemble.train_in(config, workdir_of_flags())


def check_flags(paths: list[str]) -> None:
  """Refuses what the chosen mode does not read."""
  mode = MODE.value
  if not START_TIMEOUT.value >= 1:
    raise errors.UserError(f'--start_timeout={START_TIMEOUT.value:g}: give 1 second or more')
  for name, modes in READ_BY.items():
    if mode not in modes and flags.FLAGS[name].present:
      raise errors.UserError(f'--{name} is for --mode={" or ".join(modes)}, not for --mode={mode}')
  allowed = DATA if mode in READ_DATA else ()
  for name, _ in command_line.overrides if mode not in READ_BY['config'] else ():
    if name not in allowed:
      only = f', and only --config.{" and --config.".join(DATA)} say where its images are now' if allowed else ''
      raise errors.UserError(f'--config.{name} is not for --mode={mode}: the run knows its recipe{only}')
  if mode == 'export' and TO.value is None:
    raise errors.UserError(f'--to is missing: give --to={", or --to=".join(FORMATS)}')
  if TO.value != 'onnx' and PRECISION.value != 'float32':
    raise errors.UserError(f'--precision={PRECISION.value} is for --to=onnx')
  if mode in READ_BY['top']:
    if not paths:
      raise errors.UserError(f'--mode={mode} needs pictures: give files, folders, or - for a list on standard input')
  elif paths and mode != 'export':
    raise errors.UserError(f'unexpected argument {errors.one_line(paths[0])}: options are written --name=value')


def workdir_of_run() -> pathlib.Path:
  """Returns --workdir, which must be given."""
  if WORKDIR.value is None:
    raise errors.UserError('--workdir is missing: give the folder of a run, such as --workdir=runs/digits')
  return workdir_of_flags()


def output_of_flags() -> pathlib.Path | None:
  """Returns --output; None if it is not given."""
  return None if OUTPUT.value is None else errors.expanded(OUTPUT.value, '--output')


def config_of_flags() -> 'ConfigDict':
  """Returns the recipe of --config, or else of the run in --workdir, with the changes of --config.KEY=VALUE."""
  from googlenet_jax import recipe, runs

  workdir = workdir_of_flags()
  if workdir is None:
    missing = '--config is missing, such as --config=configs/digits.py'
    if MODE.value == 'evaluate':
      missing = '--workdir is missing: give the folder of a run, such as --workdir=runs/digits'
    raise errors.UserError(missing)
  if CONFIG.value is not None:
    config = recipe.read(CONFIG.value)
  elif MODE.value == 'train' and not (runs.is_run(workdir) or runs.has_checkpoints(workdir)):
    raise errors.UserError(
      f'--config is missing, such as --config=configs/digits.py: {workdir} holds no run to continue'
    )
  else:
    config = runs.recipe_of(workdir)
  for name, text in command_line.overrides:
    recipe.override(config, name, text)
  given = recipe.flatten(config)
  if MODE.value == 'evaluate':
    config = runs.with_network_of_run(config, workdir)
  elif config.init_from:
    from googlenet_jax.training import finetune

    config = finetune.with_network_of_source(config, workdir)
  found = recipe.flatten(config)
  for name, _ in command_line.overrides:
    if repr(found[name]) != repr(given[name]):  # NaN is unequal to itself
      raise errors.UserError(
        f'--config.{name}={given[name]}: the network of config.init_from={config.init_from} has {found[name]!r}, and '
        'its weights fit no other: leave this key out'
      )
  if MODE.value == 'evaluate' or (MODE.value == 'inspect' and WORKDIR.value is not None):
    runs.check_agrees(config, workdir)
  return config


def workdir_of_flags() -> pathlib.Path | None:
  """Returns the folder of the run; None if neither --workdir nor --config is given."""
  from googlenet_jax import recipe

  if WORKDIR.value is None and CONFIG.value is None:
    return None
  name = pathlib.Path(recipe.split_name(CONFIG.value or '')[0]).stem
  return errors.expanded(WORKDIR.value or f'runs/{name}', '--workdir')


def step_of_flags() -> int | str | None:
  """Returns --step as a number, 'best' or None."""
  if STEP.value in (None, 'best'):
    return STEP.value
  if not STEP.value.isdecimal():
    raise errors.UserError(f'--step={STEP.value}: give a number, or best')
  return int(STEP.value)


def crops_of_flags() -> list[int]:
  """Returns --crops as ascending numbers; --mode=predict takes one."""
  from googlenet_jax.data import crops

  several = MODE.value == 'evaluate'
  if CROPS.value is None:
    return list(crops.COUNTS) if several else [1]
  given, known = ','.join(CROPS.value), ','.join(map(str, crops.COUNTS))
  if not CROPS.value or set(CROPS.value) - set(map(str, crops.COUNTS)):
    raise errors.UserError(f'--crops={given}: choose from {known}')
  if len(CROPS.value) > 1 and not several:
    raise errors.UserError(f'--crops={given}: --mode={MODE.value} takes one of {known}')
  return sorted(set(map(int, CROPS.value)))


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line."""
  paths = command_line.parse(argv, __name__)
  for flag in (WORKDIR, CONFIG, OUTPUT, COMPARE, HOST):
    if flag.value is not None and (not flag.value or flag.value.startswith('--')):
      raise errors.UserError(f'--{flag.name} needs a value: --{flag.name}=VALUE')
  return paths


def run() -> None:
  """Runs `main`; every mistake of the user, and every trouble of the machine, ends as one line and status 2."""
  program.open_standard_streams()
  end = functools.partial(ending.after_signal, workdir_of_flags)
  of_program = signals.of_program(end) if program.is_program() else contextlib.nullcontext()
  try:
    with of_program:
      app.run(main, flags_parser=parse_flags)
  except Exception as error:
    ending.after_error(error)
  except KeyboardInterrupt as error:
    if not program.is_program():
      raise
    end(*error.args)


if __name__ == '__main__':
  huge_pages.restart()
  run()
