"""Properties: whatever is in a recipe, a flag or a path, the outcome is a valid run or one line that names it.

PROPERTY_EXAMPLES=3000 tries more of them; the usual number is small, and always the same examples.
"""

import json
import math
import os
import re
import warnings

import jax
import jax.numpy as jnp
import pytest
from helpers import call_main
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from googlenet_jax import recipe, recipe_checks, runs
from googlenet_jax.data import pipeline
from googlenet_jax.host import cpu_cores
from googlenet_jax.host.errors import UserError
from googlenet_jax.model.options import Options
from googlenet_jax.training import ensemble, feed, optimizers, summary

EXAMPLES = int(os.environ.get('PROPERTY_EXAMPLES', '0'))


def some(count):
  """Settings of a test that tries `count` examples."""
  return settings(
    max_examples=EXAMPLES or count, derandomize=not EXAMPLES, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
  )  # fmt: skip


NUMBERS = [
  *(0, 1, -1, 2, 3, 7, 17, 224, 2**31 - 1, 2**31, 2**63, -(2**63), 10**400, -(10**400)),
  *(0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-300, 5e-324, 1e30, 1.7e308, math.nan, math.inf, -math.inf, True, False),
]
TEXTS = [
  '',
  ' ',
  'none',
  'é',
  '日本語',
  '\0',
  '\n',
  'a\nb',
  '\udcff',
  '%s',
  '{}',
  '0.5,0.5,0.5',
  '1,2',
  'nan',
  '~',
  '~x/y',
  'x' * 300,
]
OTHERS = [None, [], [1], {}, {'x': 1}, (), (1, 2), b'x', 1j, {1}, print]


def near(key):
  """Values about the edges of what a key may be, and its choices."""
  edges = [bound for bound in (key.least, key.above, key.most, key.below) if bound is not None]
  kind = type(key.default) if isinstance(key.default, int | float) else int
  return [*(key.choices or ()), key.default, *(kind(edge) + step for edge in edges for step in (-1, 0, 1))]


def values(name):
  key = recipe.KEYS[name]
  odd = st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.sampled_from(OTHERS)
  return st.sampled_from(near(key)) | odd | st.integers() | st.floats() | st.text(max_size=20)


changes = st.lists(st.sampled_from(list(recipe.KEYS)), min_size=2, max_size=3, unique=True).flatmap(
  lambda names: st.fixed_dictionaries({name: values(name) for name in names})
)


def refusal(function, *arguments):
  """Returns the one line of the mistake, or '' if there is none."""
  try:
    function(*arguments)
  except UserError as error:
    text = str(error)
    assert text.splitlines() == [text]
    return text
  return ''


def outcome(changed):
  """Checks the property for a recipe; returns whether it is valid."""
  config = recipe.from_flat({**recipe.flatten(recipe.default()), **changed})
  if text := refusal(recipe_checks.validate, config):
    assert any(f'config.{name}' in text for name in changed), text
    return False
  build(config, changed)
  return True


OF_OPTIMIZER = {'learning_rate', 'schedule', 'epochs', 'warmup_epochs', 'decay_factor', 'decay_epochs', 'momentum'}
OF_OPTIMIZER |= {'nesterov', 'weight_decay', 'clip_norm', 'body_learning_rate', 'batch_size', 'max_steps'}


def build(config, changed):
  """Makes what a training makes of a valid recipe before it needs images."""
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    text = json.dumps(recipe.to_json(config))
    assert recipe.flatten(json.loads(text)) == recipe.flatten(config)
    assert runs.preparation(config, 3)
    Options(**config.model).check(config.image_size, 3)
    assert cpu_cores.cpu_devices(2, config.batch_size // config.micro_batches, config.image_size, config.model) in (
      1,
      2,
    )
    summary.augmentations_in_words(config.augment)
    text = refusal(pipeline.steps_per_epoch, 60_000, config.batch_size)
    if not text:
      steps = pipeline.steps_per_epoch(60_000, config.batch_size)
      text = refusal(optimizers.learning_rate_schedule, config, steps)
    if text:
      assert re.match(r'(config\.)?(batch_size|epochs)=', text), text
      return
    schedule = optimizers.learning_rate_schedule(config, steps)
    every = (steps, config.log_every_steps, config.checkpoint_every_steps)
    assert next(feed.call_ends(0, steps, 1, every)) == 1
    if not OF_OPTIMIZER & set(changed):
      return  # it is the same as for other values
    last = min(config.epochs * steps, config.max_steps or math.inf)
    for step in (0, steps, min(last, 2**31) - 1):
      rate = float(schedule(jnp.int32(step)))
      assert math.isfinite(rate)
      assert rate >= 0
    params = {'conv1': {'kernel': jnp.ones((1, 1, 1, 1)), 'bias': jnp.ones(1)}, 'logits': {'bias': jnp.ones(1)}}
    optimizer = optimizers.make_optimizer(config, schedule)
    jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)


def test_every_key_takes_every_odd_value_or_is_named():
  valid = {name: 0 for name in recipe.KEYS}
  for name, key in recipe.KEYS.items():
    for value in (*near(key), *NUMBERS, *TEXTS[:6], *OTHERS[:5]):
      valid[name] += outcome({name: value})
  alone = {name for name, count in valid.items() if count < 2}  # one value is valid: the default
  assert alone <= {'freeze', 'body_learning_rate', 'nesterov'} | {n for n in recipe.KEYS if n.startswith('data.')}, (
    alone
  )


@some(150)
@given(changes)
def test_keys_together_make_a_run_or_are_named(changed):
  outcome(changed)


@some(150)
@given(
  st.sampled_from(list(recipe.KEYS)), st.sampled_from(TEXTS) | st.text(max_size=30) | st.from_regex(r'\A[-+0-9_.eE]*\Z')
)
def test_values_on_the_command_line_are_read_or_named(name, text):
  config = recipe.default()
  if error := refusal(recipe.override, config, name, text):
    assert error.startswith(f'--config.{name}=')
  else:
    found = recipe.flatten(config)
    assert type(found[name]) is type(recipe.KEYS[name].default)
    outcome({name: found[name]})


# Flags, paths and workdirs -------------------------------------------------------------------------------------------

ODD_PATHS = [
  *(
    '',
    '.',
    '..',
    '/dev/null',
    '/dev/null/x',
    '/proc/self/mem',
    '/proc/nothing/x',
    '/dev/full',
    'x' * 300,
    'a/' * 2100,
  ),
  *(
    '\0',
    'a\0b',
    '\udcff',
    'é',
    '日本',
    'a\nb',
    '~nobody-at-all/x',
    '~',
    'gs://b/r',
    's3://x',
    'file:///nowhere',
    'file:',
  ),
  *('-', '--', '-x', '*', '[', 'link', 'loop', 'secret', 'file', 'file/x', 'http://127.0.0.1:1/x'),
]
FLAGS = {
  'config': [*ODD_PATHS, 'configs', '/dev/zero:', 'x.py', 'x.py:y', ':', 'bad.py', 'good.py'],
  'workdir': ODD_PATHS,
  'mode': ['train', 'evaluate', 'predict', 'explain', 'inspect', '', 'TRAIN', 'é', '\0'],
  'step': ['best', '', '0', '-1', '1.5', '٣', '²', '9' * 5000, 'nan', '\n'],
  'crops': ['', '1', '10', '144', '1,1', '2', ',', '1,,10', '-1', '1' * 5000, 'é'],
  'split': ['train', 'validation', 'test', '', 'Test'],
  'top': ['', '0', '1', '-1', '1e3', '9' * 5000, '٣', 'nan'],
  'output': ODD_PATHS,
  'config.epochs': ['', '0', '1', 'x', '1e3', '9' * 5000],
  'config.data.source_dir': ODD_PATHS,
  'config.init_from': ODD_PATHS,
  'config.nonsense': ['1'],
  'nonsense': ['', '1'],
}
arguments = st.lists(
  st.sampled_from(sorted(FLAGS)).flatmap(
    lambda name: st.sampled_from(FLAGS[name]).map(lambda value: f'--{name}={value}')
  ) | st.sampled_from([*ODD_PATHS, '--help=x', '--noconfig.nesterov', '--config.epochs', '--workdir']),
  max_size=5,
)  # fmt: skip


class ReachedError(UserError):
  """The run would begin here."""


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """A folder with odd things, in which nothing trains; what is made in it is looked at."""
  folder = tmp_path_factory.mktemp('odd')
  (folder / 'file').write_text('x')
  (folder / 'secret').mkdir(mode=0)
  (folder / 'link').symlink_to('nothing')
  (folder / 'loop').symlink_to('loop')
  (folder / 'bad.py').write_text('def get_config():\n  return 1 / 0\n')
  (folder / 'good.py').write_text('from googlenet_jax import recipe\nget_config = recipe.default\n')

  def reached(*_, **__):
    raise ReachedError('reached')

  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.setenv('HOME', str(folder / 'home'))
    patch.setattr(ensemble, 'train_members', reached)
    patch.setattr('jax.config.update', lambda *_: None)
    yield folder
  os.chmod(folder / 'secret', 0o700)


@some(120)
@given(arguments)
def test_every_command_line_ends_in_one_line(place, given_arguments):
  ended = call_main(*given_arguments)
  *_, last = ended.err.strip().split('\n')
  assert 'Traceback' not in ended.err
  assert ended.status == 2, (ended.out[-300:], ended.err)
  assert last.startswith('error: '), ended.err
  for path in place.iterdir():  # no folder whose name is a URL or the like
    assert ':' not in path.name, path
