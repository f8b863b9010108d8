import os
import pathlib
import sys
import types

import jax
import pytest
from helpers import call_main

from googlenet_jax import load, loading, recipe, train
from googlenet_jax.data import datasets, pictures
from googlenet_jax.evaluation import sources
from googlenet_jax.host.errors import UserError, expanded, expanded_text, plain_troubles, trouble
from googlenet_jax.training import ensemble


@pytest.mark.parametrize(
  ('given', 'path'),
  [
    ('runs/x/', 'runs/x/'),
    ('/runs/x', '/runs/x'),
    ('~/x', '/home/somebody/x'),
    ('~/x/*.png', '/home/somebody/x/*.png'),
    ('file:///x/my%20pictures', '/x/my pictures'),
    ('file:/x', '/x'),
    ('FILE://localhost/x', '/x'),
    ('c:/x', 'c:/x'),
    ('c:\\x', 'c:\\x'),
    ('note: a/b', 'note: a/b'),
    ('12:30/x', '12:30/x'),
    ('a:b', 'a:b'),
    ('made://x', None),
    ('made:/x', 'made:/x'),
    ('gs://bucket/x', None),
    ('gs:/bucket/x', None),
    ('s3://bucket', None),
    ('https://example.org/x.png', None),
    ('file://host/x', None),
    ('~nosuchuser/x', None),
    ('~there', '~there'),
  ],
)
def test_a_path_of_a_user_is_one_of_this_machine(given, path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', '/home/somebody')
  for name in ('made:', '~there'):
    (tmp_path / name).mkdir()
  if path is None:
    with pytest.raises(UserError, match=r'is a URL|is unknown') as caught:
      expanded_text(given)
    assert str(caught.value).startswith(given)
  else:
    assert expanded_text(given) == path
    assert expanded(given) == pathlib.Path(path)
    if 'localhost' not in given:  # pathlib takes one of two slashes
      assert expanded(pathlib.Path(given)) == pathlib.Path(path)


def test_a_home_folder_that_does_not_exist_is_not_made(tmp_path, monkeypatch):
  monkeypatch.setattr('pwd.getpwnam', lambda name: types.SimpleNamespace(pw_dir=f'{tmp_path}/{name}'))
  with pytest.raises(UserError) as caught:
    expanded('~nobody/x', '--workdir')
  assert str(caught.value) == (
    f'--workdir=~nobody/x: the home folder {tmp_path}/nobody does not exist: write the whole path'
  )
  (tmp_path / 'nobody').mkdir()
  assert expanded('~nobody/x') == tmp_path / 'nobody/x'


URL = 'gs://bucket/x'


def call(*arguments):
  ended = call_main(*arguments)
  if ended.status == 2:
    raise UserError(ended.err)


@pytest.mark.parametrize(
  ('use', 'name'),
  [
    (lambda: call('--config=configs/digits.py', f'--workdir={URL}'), 'error: --workdir='),
    (lambda: call('--mode=evaluate', f'--workdir={URL}'), 'error: --workdir='),
    (lambda: call('--mode=predict', f'--workdir={URL}', 'x.png'), 'error: --workdir='),
    (lambda: call('--mode=inspect', '--config=configs/digits.py', f'--output={URL}'), 'error: --output='),
    (lambda: call(f'--config={URL}/digits.py'), 'error: --config='),
    (lambda: call('--config=configs/digits.py', f'--config.init_from={URL}'), 'error: config.init_from='),
    (
      lambda: call('--config=configs/folder.py', '--workdir=x', f'--config.data.source_dir={URL}'),
      'error: config.data.source_dir=',
    ),
    (lambda: datasets.load('folder', URL), 'config.data.source_dir='),
    (lambda: datasets.load('mnist', '', URL), 'config.data.data_dir='),
    (lambda: datasets.load('fashion_mnist', '', 'x'), 'FASHION_MNIST_DIR='),
    (lambda: train('configs/digits.py', URL), ''),
    (lambda: load(URL), ''),
    (lambda: recipe.read(f'{URL}.py'), '--config='),
    (lambda: sources.find([URL], []), ''),
    (lambda: pictures.read(URL, 3), ''),
  ],
)
def test_a_url_is_one_line_before_anything_is_made(use, name, tmp_path, monkeypatch):
  (tmp_path / 'configs').symlink_to(os.path.abspath('configs'))
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('FASHION_MNIST_DIR', URL)
  with pytest.raises(UserError, match=rf'{name}gs://bucket/x\S* is a URL, and files must be on this machine') as caught:
    use()
  assert str(caught.value).startswith(name)
  assert str(caught.value).count('gs://') == 1 or not name
  assert os.listdir() == ['configs']


@pytest.mark.parametrize(
  ('name', 'parts'),
  [
    ('configs/x.py', ['configs/x.py']),
    ('configs/x.py:text', ['configs/x.py', 'text']),
    ('configs/x.py:/data:2', ['configs/x.py', '/data:2']),
    ('file:///x.py:text', ['file:///x.py', 'text']),
    ('C:\\x.py:text', ['C:\\x.py', 'text']),
  ],
)
def test_a_recipe_may_have_a_text(name, parts):
  assert recipe.split_name(name) == parts


def test_one_picture_that_is_a_url_does_not_stop_the_others(tmp_path):
  found = sources.find([URL, f'file://{tmp_path}/a.png'], [])
  assert [one.name for one in found] == [URL, f'{tmp_path}/a.png']
  assert 'is a URL' in found[0].error


def test_a_list_on_a_closed_standard_input(monkeypatch):
  monkeypatch.setattr(sys, 'stdin', None)
  with pytest.raises(UserError, match='standard input is closed'):
    sources.find(['-'], [])


TROUBLES = [
  (MemoryError(), 'the memory is not enough (MemoryError): use less'),
  (OSError(12, 'Cannot allocate memory'), 'the memory is not enough (/run: Cannot allocate memory): use less'),
  (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.'), ': use less'),
  (jax.errors.JaxRuntimeError('INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory'), ': use less'),
  (jax.errors.JaxRuntimeError('INTERNAL: Failed to allocate 100 bytes for new constant'), ': use less'),
  (jax.errors.JaxRuntimeError('INTERNAL: cuBLAS: CUBLAS_STATUS_ALLOC_FAILED'), ': use less'),
  (RuntimeError('std::bad_alloc'), 'the memory is not enough (std::bad_alloc): use less'),
  (
    ImportError('libx.so: failed to map segment from shared object'),
    'the memory is not enough (libx.so: failed to map segment from shared object): end other programs',
  ),
  (
    ImportError('libx.so: cannot create shared object descriptor: Cannot allocate memory'),
    ': end other programs that need memory',
  ),
  (RuntimeError("can't start new thread"), "can't start new thread: end other programs, or raise"),
  (ValueError('RESOURCE_EXHAUSTED: write: No space left on device'), ': make room there'),
  (OSError(28, 'No space left on device'), '/run: No space left on device: make room there'),
  (OSError(28, 'No space left on device', '/x'), '/x: No space left on device: make room there'),
  (OSError(122, 'Disk quota exceeded', '/x'), '/x: Disk quota exceeded: make room there'),
  (OSError(27, 'File too large', '/x'), '/x: File too large: raise the limit, such as by ulimit -f'),
  (OSError(24, 'Too many open files', '/x'), '/x: Too many open files: raise the limit'),
  (OSError(5, 'Input/output error', '/x'), '/x: Input/output error: look at the disk'),
  (OSError(13, 'Permission denied', '/x'), '/x: Permission denied'),
  (UserError('as it is'), 'as it is'),
]


@pytest.mark.parametrize(('error', 'says'), TROUBLES)
def test_a_trouble_of_the_machine_is_one_line(error, says):
  with pytest.raises(UserError) as caught, plain_troubles('use less', '/run'):
    raise error
  assert says in str(caught.value)
  assert str(caught.value).startswith(says) or says.startswith(':')


@pytest.mark.parametrize('error', [ValueError('a bug'), KeyError('RESOURCE'), RuntimeError('')])
def test_a_fault_of_the_program_keeps_its_traceback(error):
  with pytest.raises(type(error)), plain_troubles('use less'):
    raise error
  assert trouble(error, 'use less') is None


def test_a_precision_that_the_device_lacks_is_blamed_on_the_environment_only_if_it_stands_there(monkeypatch):
  error = jax.errors.JaxRuntimeError('Algorithm not supported by the ElementalIrEmitter: ALG_DOT')
  monkeypatch.delenv('JAX_DEFAULT_MATMUL_PRECISION', raising=False)
  assert trouble(error, 'use less') is None
  monkeypatch.setenv('JAX_DEFAULT_MATMUL_PRECISION', 'BF16_BF16_F32_X9')
  assert trouble(error, 'use less').endswith(
    ': JAX_DEFAULT_MATMUL_PRECISION=BF16_BF16_F32_X9 in the environment asks for it: leave it out'
  )


def test_a_training_without_memory_names_the_keys_that_help(monkeypatch, tmp_path):
  def train_members(*_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 7846012096 bytes.')

  monkeypatch.setattr(ensemble, 'train_members', train_members)
  ended = call_main('--config=configs/digits.py', f'--workdir={tmp_path}')
  assert ended.err == (
    'error: the memory is not enough (RESOURCE_EXHAUSTED: Out of memory allocating 7846012096 bytes.): try a smaller '
    '--config.batch_size or --config.image_size, or a larger --config.micro_batches\n'
  )


def test_other_modes_without_memory(monkeypatch, tmp_path):
  def no_memory(*_, **__):
    raise MemoryError

  monkeypatch.setattr(loading, 'load', no_memory)
  ended = call_main('--mode=predict', f'--workdir={tmp_path}', 'x.png')
  assert ended.err == (
    'error: the memory is not enough (MemoryError): try --crops=1, or end other programs that need memory\n'
  )
