"""The JAX side of an experiment: the training and prediction steps that main.py runs.

The experiments start it as a worker, see worker.py.
"""

import collections
import contextlib
import itertools
import os
import pathlib
import sys
import tempfile
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from experiments import hlo, worker
from googlenet_jax import classifier, recipe
from googlenet_jax.data.splits import Split
from googlenet_jax.host import cache, cpu_cores, sharding
from googlenet_jax.model import cpu_layers, googlenet, gpu_layers, layers, torch_weights, weight_files
from googlenet_jax.training import feed, optimizers
from googlenet_jax.training.state import create_state
from googlenet_jax.training.step import make_train_step, make_train_steps

PLATFORMS = {'cpu': 'cpu', 'gpu': 'cuda,cpu'}
EXAMPLES = 60_000  # images that lie on the device where a call takes several steps
INDICES = 8  # different arrays of indices
STEPS_PER_EPOCH = 100


class Form(NamedTuple):
  """Another form of our program, to see what a choice is worth."""

  replace: tuple[tuple[Any, str, Any], ...] = ()  # (module, name, value), while it is traced
  keys: dict[str, Any] = {}  # keys of the recipe
  options: dict[str, Any] | None = None  # for XLA


def _own(form, *arrays, **_):
  return form(*arrays)


def _xla_pointwise(x, *kernels):
  return [cpu_layers.xla_conv(x, kernel[None, None]) for kernel in kernels]


def _read_separately(finish, x, kernels, vectors):
  return [finish(cpu_layers.xla_conv(x, k[None, None]), *own) for k, own in zip(kernels, vectors, strict=True)]


def _sums_in_one_step(*maps):
  return [lax.reduce_sum(x.astype(jnp.promote_types(x.dtype, jnp.float32)), (0, 1, 2)) for x in maps]


def _command_buffers(*kinds):
  """Options for CUDA graphs of these kinds of instructions. Set for one jit, XLA takes no '+' for 'as well'."""
  return {'xla_gpu_enable_command_buffer': ','.join(kinds)}


GRAPHS = ('FUSION', 'CUBLAS', 'CUBLASLT', 'CUSTOM_CALL', 'CUDNN', 'DYNAMIC_SLICE_FUSION')  # XLA's default
XLA = Form(((layers, 'by_platform', _own),))
CPU_FORMS = {
  "XLA's layers": XLA,
  'no patches': Form(((cpu_layers, 'PATCHES_UP_TO', {}),)),
  'no 1x1 products': Form(((cpu_layers, 'pointwise', _xla_pointwise),)),
  'no Winograd': Form(((cpu_layers, 'MIN_TILES', 10**9),)),
  "XLA's max-pool": Form(((cpu_layers, 'max_pool', layers.xla_max_pool),)),
  'convolutions by Eigen': Form(options={'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_DOT'}),
}
GPU_FORMS = {
  "XLA's layers": XLA,
  "XLA's max-pool": Form(((gpu_layers, 'max_pool', layers.xla_max_pool),)),
  'separate 1x1 layers': Form(((gpu_layers, 'read_one_map', _read_separately),)),
  "XLA's first layer": Form(((gpu_layers, 'conv', cpu_layers.xla_conv),)),
  'sums in one step': Form(((gpu_layers, 'channel_sums', _sums_in_one_step),)),
  'one step a call': Form(keys={'steps_per_call': 1}),
  '10 steps a call': Form(keys={'steps_per_call': 10}),
  '40 steps a call': Form(keys={'steps_per_call': 40}),
  'no graphs': Form(options=_command_buffers()),
  'graphs with convolutions and loops': Form(options=_command_buffers(*GRAPHS, 'CONVOLUTION', 'WHILE', 'CONDITIONAL')),
  'fused convolutions': Form(options={'xla_gpu_experimental_enable_conv_fusion': True}),
  'latency hiding': Form(options={'xla_gpu_enable_latency_hiding_scheduler': True}),
}


class JaxSide(worker.Side):
  """Our network and its steps, on the devices that main.py uses; on one GPU, because PyTorch has one."""

  def __init__(self, device: str = 'auto'):
    """Chooses the device: 'auto', 'cpu' or 'gpu'."""
    if device != 'auto':
      jax.config.update('jax_platforms', PLATFORMS[device])
    if os.environ.get(worker.TINY):
      googlenet.TABLE = {name: googlenet.Widths(*widths) for name, widths in worker.tiny_table(googlenet.TABLE).items()}

  def describe(self) -> dict[str, Any]:
    """Platform, device, versions, and the names of the forms. Before `make` this fixes the number of CPU devices."""
    device = jax.devices()[0]
    forms = list(CPU_FORMS if device.platform == 'cpu' else GPU_FORMS)
    versions = {'jax': jax.__version__}
    return {'platform': device.platform, 'device': device.device_kind, 'versions': versions, 'forms': forms}

  def make(
    self,
    mode: str,
    image_size: int,
    batch_size: int,
    dtype: str = 'float32',
    config: str = 'configs/default.py',
    form: str | None = None,
    learning_rate: float | None = None,
    input_size: int = 28,
    weights: str | None = None,
    steps_per_call: int = 0,
  ) -> dict[str, Any]:
    """Builds and compiles.

    Args:
      mode: 'training' or 'inference'.
      image_size: pixels that the network sees.
      batch_size: images in a step.
      dtype: 'float32' or 'bfloat16'.
      config: recipe for everything else.
      form: key of `CPU_FORMS` or `GPU_FORMS`.
      learning_rate: a constant one instead of the recipe's schedule.
      input_size: side of the images in a batch, in pixels.
      weights: safetensors file of the PyTorch twin to start from.
      steps_per_call: 0 for what the recipe says.

    Returns:
      `multiply_adds` of a step, and `runs_on`, the number of devices.
    """
    form = (CPU_FORMS | GPU_FORMS)[form] if form else Form()
    self.image_size, self.config = image_size, recipe.read(str(worker.ROOT / config))
    self.config.image_size, self.config.batch_size, self.config.dtype = image_size, batch_size, dtype
    if learning_rate:
      self.config.learning_rate, self.config.schedule = learning_rate, 'constant'
    if steps_per_call:
      self.config.steps_per_call = steps_per_call
    self.config.update_from_flattened_dict(form.keys)
    cache.use_compilation_cache()  # this and the next as main.py does
    cpu_cores.use_cpu_cores(self.config)
    self.mesh = sharding.make_mesh(None if jax.default_backend() == 'cpu' else jax.devices()[:1])
    self._pending, self._ahead = collections.deque(), sharding.steps_ahead()
    self._training = mode == 'training'
    rng = np.random.default_rng(0)
    count = batch_size if steps_per_call == 1 or not self._training else max(EXAMPLES, batch_size)
    noise, labels = rng.integers(0, 256, (count, input_size, input_size, 1), np.uint8), rng.integers(0, 10, count)
    jax.clear_caches()  # forget what was traced in another form
    with contextlib.ExitStack() as stack:
      for module, name, value in form.replace:
        stack.enter_context(mock.patch.object(module, name, value))
      self._compile(Split(noise, labels.astype(np.int32)), weights, form.options)
    passes = 3 if self._training else 1  # the backward pass costs two forward passes
    runs_on = f'{self.mesh.size} device{"s" * (self.mesh.size > 1)}'
    if self.steps_a_call > 1:
      runs_on += f', {self.steps_a_call} steps a call'
    return {'multiply_adds': passes * batch_size * self._multiply_adds, 'runs_on': runs_on}

  def _compile(self, split, weights, options) -> None:
    schedule = optimizers.learning_rate_schedule(self.config, STEPS_PER_EPOCH)
    tx = optimizers.make_optimizer(self.config, schedule) if self._training else optax.identity()
    self.graphdef, self.state = create_state(self.config, num_classes=10, channels=1, tx=tx, mesh=self.mesh)
    if weights:
      params = torch_weights.from_torch(weight_files.read(pathlib.Path(weights)), self.state.params, {}).params
      self.state = self.state.replace(params=sharding.replicate(params, self.mesh))
    network = nnx.merge(self.graphdef, self.state.params, self.state.batch_stats)
    self._multiply_adds = googlenet.count_multiply_adds(network, self.image_size)
    self._predict = classifier.make_predict_step(self.graphdef, self.config, self.mesh)
    size = self.config.batch_size
    batch = self.put(split.images[:size], split.labels[:size])
    self.batches, self.steps_a_call = itertools.repeat(batch), 1
    if not self._training:
      self.compiled = self._predict.lower(self._variables(), batch).compile(options)
      return
    parts = self.graphdef, tx, self.config, self.mesh, STEPS_PER_EPOCH
    self.steps_a_call = feed.most_steps(self.config, split, self._multiply_adds, self.mesh)
    if self.steps_a_call == 1:
      self.compiled = make_train_step(*parts).lower(self.state, batch).compile(options)
      return
    data = sharding.replicate(split.batch(np.s_[:]), self.mesh)
    shape = INDICES, self.steps_a_call, size
    indices = np.random.default_rng(1).integers(0, len(split), shape).astype(np.int32)
    indices = [jax.device_put(each, sharding.cut_steps(self.mesh)) for each in indices]
    self.compiled = make_train_steps(*parts).lower(self.state, data, indices[0]).compile(options)
    self.batches = itertools.cycle([(data, each) for each in indices])

  def _variables(self):
    return self.state.params, self.state.batch_stats

  def step(self, batch: dict[str, jax.Array] | tuple[Any, ...]) -> Any:
    """One call for a batch, or for data and indices; waits for results as far behind as main.py does."""
    if self._training:
      self.state, result = self.compiled(self.state, *(batch if isinstance(batch, tuple) else (batch,)))
    else:
      result = self.compiled(self._variables(), batch)
    self._pending.append(result)
    if len(self._pending) > self._ahead:
      jax.block_until_ready(self._pending.popleft())
    return result

  def loss_of(self, result: Any) -> float:
    """The mean loss of a training step."""
    return float(result.losses['loss'] / result.count)

  def predict(self, batch: dict[str, jax.Array]) -> np.ndarray:
    """Classes `[B]`."""
    return np.asarray(self._predict(self._variables(), batch)).argmax(-1)

  def put(self, images: np.ndarray, labels: np.ndarray) -> dict[str, jax.Array]:
    """A batch on the devices."""
    index = np.arange(len(labels), dtype=np.int32)
    return sharding.shard_batch({'image': images, 'label': labels.astype(np.int32), 'index': index}, self.mesh)

  def wait(self) -> None:
    """Returns when the devices are done."""
    jax.block_until_ready(self._pending)
    self._pending.clear()

  def multiply(self, size: int, dtype: str):
    """A function that multiplies two matrices."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = jax.jit(lambda a: a @ a)
    return lambda: product(a).block_until_ready()

  def profile(self, steps: int, before: int) -> dict[str, Any]:
    """Where the time of a step goes: `wall`, its milliseconds without the profiler, and what `hlo.profile` returns."""
    wall = 1e3 * self.run(steps, before)
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        self.run(steps, before=0)
      (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
      data = jax.profiler.ProfileData.from_file(str(path))
    taken = -(-steps // self.steps_a_call) * self.steps_a_call
    kernel_sizes = {p.size for p in jax.tree.leaves(self.state.params) if p.ndim == 4}
    return {'wall': wall, **hlo.profile(data, self.compiled.as_text(), taken, kernel_sizes)}

  def device_memory(self) -> int | None:
    """Peak bytes on the GPU."""
    stats = self.mesh.devices.flat[0].memory_stats()
    return stats and stats.get('peak_bytes_in_use')


if __name__ == '__main__':
  worker.serve(JaxSide(*sys.argv[1:]))
