"""Parses the flags of main.py. A mistake is one line; absl itself would print pages of help."""

import difflib
import sys
from collections.abc import Iterator, Sequence

from absl import flags

from googlenet_jax.host import console, errors

overrides: list[tuple[str, str]] = []  # --config.KEY=VALUE, in order


def parse(argv: Sequence[str], module: str) -> list[str]:
  """Parses a command line into absl's flags, and `--config.KEY=VALUE` into `overrides`.

  Args:
    argv: the program and its arguments.
    module: name of the module that defines the flags, for suggestions.

  Returns:
    The program and the arguments that are no flags.

  Raises:
    UserError: a flag does not exist, or has no value or a wrong one.
  """
  rest, arguments = [*argv[:1]], iter(argv[1:])
  overrides.clear()  # a process may call this again, such as a notebook
  for argument in arguments:
    if argument == '--':  # names of files follow
      rest += [argument, *arguments]
      break
    name, equals, value = argument.lstrip('-').partition('=')
    if argument.startswith('-') and name.startswith('config.'):
      overrides.append((name.removeprefix('config.'), value if equals else _next_value(name, arguments)))
    elif argument.startswith('-') and name.startswith('noconfig.'):
      overrides.append((name.removeprefix('noconfig.'), 'False'))
    else:
      rest.append('--help' if argument == '-h' else argument)
  try:
    return flags.FLAGS(rest)
  except (SystemExit, BrokenPipeError):  # absl has shown its help, or `head` has gone: no mistake
    console.flush()
    sys.exit(0)
  except flags.UnrecognizedFlagError as error:
    raise errors.UserError(_unknown(error.flagname, module)) from error
  except flags.IllegalFlagValueError as error:
    text = str(error).removeprefix('flag ')
    raise errors.UserError(text.replace('invalid literal for int() with base 10', 'no whole number')) from error
  except flags.Error as error:
    raise errors.UserError(str(error)) from error


def _next_value(name: str, arguments: Iterator[str]) -> str:
  """Returns the value of `--config.KEY VALUE`; a switch needs none."""
  from googlenet_jax import recipe

  key = recipe.KEYS.get(name.removeprefix('config.'))
  if key and isinstance(key.default, bool):
    return 'True'
  value = next(arguments, None)
  if value is None or value.startswith('--'):
    raise errors.UserError(f'--{name} needs a value: --{name}=VALUE')
  return value


def _unknown(name: str, module: str) -> str:
  """Says that a flag does not exist, and what the user may have meant."""
  from googlenet_jax import recipe

  own = [flag.name for flag in flags.FLAGS.get_flags_for_module(module)]
  near = difflib.get_close_matches(name, own, 1)
  hint = f'Did you mean --{near[0]}?' if near else recipe.suggest(name)
  if '.' in name.removeprefix('config.'):
    hint = f'A file is written ./-{name}.'
  return f'--{name} is no flag. {hint} (python main.py --help)'
