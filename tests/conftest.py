"""Eight virtual CPU devices and one compilation cache for every test; flags parsed, as grain expects."""

import gc
import importlib.metadata
import os
import tempfile

# Compiling is most of what the tests wait for. Together these make it seven times as fast.
FAST = ['--xla_backend_optimization_level=0']
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # later versions end at an unknown flag
  FAST.append('--xla_cpu_use_fusion_emitters=false')
  FAST.append('--xla_cpu_parallel_codegen_split_count=1')  # parts cost more than they save: the cores are busy anyway
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8', *FAST])
os.environ['JAX_PLATFORMS'] = 'cpu'
# Tests and the programs they start compile the same networks: once is enough, also for the processes of pytest-xdist.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  CACHE = tempfile.TemporaryDirectory(prefix='googlenet_jax_tests_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = os.environ['XDG_CACHE_HOME'] = CACHE.name
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')  # 1 by default
# Tracing need not note from which line of Python an operation comes: that takes time. test_hlo.py notes it.
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')

import sys

import jax
import pytest
from absl import flags

# Tracing makes and drops many objects. Looking for garbage among them takes a third of the time.
gc.set_threshold(100_000, 20, 100)

if not flags.FLAGS.is_parsed():
  flags.FLAGS(sys.argv[:1])


# Files that take longest. They come first, so the processes of pytest-xdist end at about the same time.
LONGEST = (
  'test_end_to_end', 'test_many_processes', 'test_step', 'test_main', 'test_notebook', 'test_parity', 'test_ensemble',
  'test_gpu_layers', 'test_layers', 'test_page_server', 'test_classifier', 'test_loss', 'test_onnx', 'test_googlenet',
  'test_statistics', 'test_finetune', 'test_page_report', 'test_export', 'test_datasets', 'test_plots',
)  # fmt: skip


def pytest_collection_modifyitems(items):
  """Puts the longest files first."""
  items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


# Modules that look at the forms of layers for other platforms. Elsewhere to trace these forms is half of all tracing.
ALL_FORMS = ('test_benchmark', 'test_gpu_layers', 'test_hlo', 'test_layers', 'test_stablehlo')


@pytest.fixture(autouse=True, scope='module')
def forms_for_a_cpu(request):
  """Lets the layers trace only the forms of a CPU, which are the ones that the tests run."""
  from googlenet_jax.model import layers

  with pytest.MonkeyPatch.context() as patch:
    if request.module.__name__ not in ALL_FORMS:
      patch.setattr(layers, 'by_platform', lambda own, *arrays, cpu=None, gpu=None: (cpu or own)(*arrays))
    yield


@pytest.fixture
def mesh_of():
  """`mesh_of(n)`: a mesh over the first n devices."""
  from googlenet_jax.host import sharding

  return lambda n: sharding.make_mesh(jax.devices()[:n])


@pytest.fixture
def from_the_repository(monkeypatch):
  """As if the shell were in the folder of main.py."""
  import helpers

  monkeypatch.chdir(helpers.ROOT)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
  """What is kept of the folders of one test is not there for another."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def small_network(monkeypatch):
  """The network of `small_table`."""
  import helpers

  from googlenet_jax.model import googlenet

  monkeypatch.setattr(googlenet, 'TABLE', helpers.small_table())


@pytest.fixture(scope='module')
def torchvision_googlenet():
  """`torchvision.models.googlenet`, beside any PyTorch.

  The wheel on PyPI is built for CUDA. Beside a PyTorch for the CPU its compiled part does not load, and the import
  fails where it describes two of that part's operators, unless somebody has defined them. googlenet uses neither.
  """
  import torch

  operators = torch.library.Library('torchvision', 'FRAGMENT')
  try:
    import torchvision
  except RuntimeError:
    for name in ('nms', 'qnms'):
      operators.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    import torchvision

  yield torchvision.models.googlenet
  del operators  # deleting it removes the definitions


@pytest.fixture(autouse=True)
def warn_again(monkeypatch):
  """Each test is a new process as far as `console.warn_once` goes."""
  from googlenet_jax.host import console

  monkeypatch.setattr(console, '_warned', set())
