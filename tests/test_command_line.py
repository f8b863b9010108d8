"""What the program answers to mistakes on its command line and in recipes, and `--help`."""

import re

import pytest
from helpers import ROOT, assert_one_line, call_main, start_main

DIGITS = f'--config={ROOT}/configs/digits.py'
pytestmark = pytest.mark.usefixtures('from_the_repository')


@pytest.mark.parametrize(
  ('arguments', 'messages'),
  [
    ([], ['--config is missing, such as --config=configs/digits.py']),
    (['--mode=evaluate'], ['--workdir is missing: give the folder of a run']),
    (['--workdir={tmp}/runz'], ['--config is missing', 'runz holds no run to continue']),
    (
      ['--config=configs/nowhere.py'],
      ['--config=configs/nowhere.py: there is no such file', 'Recipes in configs: digits.py'],
    ),
    (['--config=digits'], ['Did you mean configs/digits.py?', 'fashion_fast.py']),
    (['--config=configs/nope.py'], ['Recipes in configs: digits.py, fashion.py, fashion_best.py']),
    (['--config=configs/nowhere.py', '--config.max_steps=3'], ['--config=configs/nowhere.py: there is no such file']),
    (['--config='], ['--config']),
    (['--config=configs'], ['--config=configs: it is a folder', 'digits.py']),
    ([DIGITS, '--config.bach_size=3'], ['--config.bach_size is no key', 'Did you mean --config.batch_size?']),
    ([DIGITS, '--config.learning_rat=1'], ['Did you mean --config.learning_rate?']),
    ([DIGITS, '--config.batch_size=abc'], ['--config.batch_size=abc: it must be a whole number']),
    ([DIGITS, '--config.batch_size=2.5'], ['--config.batch_size=2.5: it must be a whole number']),
    ([DIGITS, '--config.learning_rate=fast'], ['--config.learning_rate=fast: it must be a number']),
    ([DIGITS, '--config.nesterov=perhaps'], ['--config.nesterov=perhaps: it must be True or False']),
    ([DIGITS, '--config.epochs'], ['--config.epochs needs a value: --config.epochs=VALUE']),
    (['--workdir', '--mode=evaluate'], ['--workdir needs a value: --workdir=VALUE']),
    ([DIGITS, '--workdir='], ['--workdir needs a value']),
    ([DIGITS, '--config.learning_rate=nan'], ['config.learning_rate=nan must be finite']),
    ([DIGITS, '--lr=0.1'], ['--lr is no flag. Did you mean --config.learning_rate?']),
    ([DIGITS, '--epochs', '3'], ['--epochs is no flag. Did you mean --config.epochs?']),
    ([DIGITS, '--workdri=x'], ['--workdri is no flag. Did you mean --workdir?']),
    (['--mode=predict', '--top=two', 'a.png'], ["--top=two: no whole number: 'two'"]),
    (['--mode=predict', '-a.png'], ['--a.png is no flag. A file is written ./-a.png.']),
    ([DIGITS, '--xyzzy'], ['--xyzzy is no flag. docs/recipes.md lists all keys (python main.py --help)']),
    ([DIGITS, '--crops=1'], ['--crops is for --mode=evaluate']),
    ([DIGITS, '--step=3'], ['--step is for --mode=evaluate']),
    ([DIGITS, '--config.learning_rate=-1'], ['config.learning_rate=-1.0 is out of range: it must be at least 0']),
    ([DIGITS, '--config.image_size=16'], ['too small for the network']),
    ([DIGITS, '--mode=tran'], ['<train|evaluate|predict|explain|inspect|export|page|report>']),
    (['--mode=export', '--workdir={tmp}'], ['--to is missing: give --to=stablehlo']),
    (['--mode=export', '--workdir={tmp}', '--to=torch', '--precision=int8'], ['--precision=int8 is for --to=onnx']),
    (['--mode=export', '--workdir={tmp}', '--to=tflite'], ['<stablehlo|onnx|torch>']),
    (['--mode=export', '--workdir={tmp}', '--to=onnx', 'a.png'], ['{tmp} holds no run']),
    (['--mode=report', '--workdir={tmp}', '--to=onnx'], ['--to is for --mode=export, not for --mode=report']),
    (['--mode=report', '--workdir={tmp}', 'a.png'], ['unexpected argument a.png']),
    (['--mode=report', '--workdir={tmp}'], ['{tmp} holds no run']),
    (['--mode=page', '--workdir={tmp}'], ['{tmp} holds no run']),
    (['--mode=page', '--workdir={tmp}', '--compare='], ['--compare needs a value']),
    (['--mode=page', '--workdir={tmp}', '--port=99999'], ['--port=99999: ']),
    (
      ['--mode=page', '--workdir={tmp}', '--coordinator=a:1', '--num_processes=2', '--process_id=0'],
      ['in one process'],
    ),
    (['--mode=predict', '--workdir={tmp}', '--port=80', 'a.png'], ['--port is for --mode=page']),
    ([DIGITS, '--config.batch_size=2000'], ['larger than the 1437']),
    ([DIGITS, '--config.batch_size=13'], ['batch_size=13 does not divide by ']),
    ([DIGITS, '--mode=evaluate'], ['is no folder: train first']),
    ([DIGITS, 'extra'], ['unexpected argument extra']),
    (['--config=~nobodyhere/a.py'], ['error: --config=~nobodyhere/a.py: the home folder that ~ stands for is unknown']),
    ([DIGITS, '--workdir=~nobodyhere/x'], ['error: --workdir=~nobodyhere/x: the home folder']),
    ([DIGITS, '--config.init_from=~nobodyhere/x'], ['~nobodyhere/x: the home folder']),
    (['--config=configs/paper.py', '--mode=inspect', '--output=~nobodyhere/x'], ['~nobodyhere/x: the home folder']),
    (
      ['--config=configs/folder.py', '--workdir={tmp}/new', '--config.data.source_dir=~nobodyhere/x'],
      ['~nobodyhere/x: the home folder'],
    ),
    ([DIGITS, '--workdir=/dev/null/x'], ['--workdir=/dev/null/x cannot be made: Not a directory']),
  ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments, messages, tmp_path):
  arguments = [argument.format(tmp=tmp_path) for argument in arguments]
  if DIGITS in arguments and not any(argument.startswith('--workdir') for argument in arguments):
    arguments = [*arguments, f'--workdir={tmp_path}/new']
  assert_one_line(call_main(*arguments), *(message.replace('{tmp}', str(tmp_path)) for message in messages))


def test_a_mistake_ends_the_process_with_status_2_and_no_traceback(tmp_path):
  done = start_main('--config=configs/digits.py', f'--workdir={tmp_path}', '--config.model.norm=bach')
  assert done.returncode == 2
  assert re.fullmatch(r"error: config.model.norm='bach' is unknown: choose from none, .*batch.*\n", done.stderr)
  assert done.stdout == ''


DEFAULT = 'from configs import default\ndef get_config():\n  config = default.get_config()\n  '


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('def get_config(:', 'SyntaxError: invalid syntax ({path}, line 1)'),
    ('import no_such_package', "No module named 'no_such_package' ({path}, line 1)"),
    ('x = 1', 'the file has no function get_config'),
    (
      DEFAULT + 'config.bach_size = 3\n  return config',
      'unknown key config.bach_size. Did you mean --config.batch',
    ),
    (DEFAULT + 'del config.momentum\n  return config', 'lacks key config.momentum: start from default.get_config()'),
    (DEFAULT + 'config.epochs = "ten"\n  return config', 'line 4'),
    (DEFAULT + 'return config.nothing', 'nothing'),
    (DEFAULT, 'get_config returns NoneType, not the recipe: end with return config'),
  ],
)
def test_mistakes_in_a_recipe_are_one_line(text, message, tmp_path):
  path = tmp_path / 'recipe.py'
  path.write_text(text)
  assert_one_line(call_main(f'--config={path}', f'--workdir={tmp_path}'), message.format(path=path))


def test_help_names_every_flag_with_an_example_and_says_where_the_keys_are():
  done = start_main('--help')
  assert start_main('-h').stdout == done.stdout
  names = 'config workdir mode step crops split top output to precision compare port'
  for name in names.split():
    assert re.search(rf'^  --{name}: (.|\n    )*such as\s+--{name}=', done.stdout, re.MULTILINE), name
  for text in (
    '<train|evaluate|predict|explain|inspect|export|page|report>',
    'Exit status:',
    'docs/recipes.md',
    'configs/fashion_fast.py',
    '--config.KEY=VALUE',
  ):
    assert text in done.stdout
  assert len(done.stdout.splitlines()) < 85
  assert max(map(len, done.stdout.splitlines())) <= 120
