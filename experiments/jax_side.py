"""The JAX side of an experiment: the training and prediction steps that main.py runs.

benchmark.py and compare_pytorch.py start it as a worker; profile_step.py uses it directly.
"""

import collections
import itertools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import worker
from googlenet_jax import classifier, recipe
from googlenet_jax.host import cache, cpu_cores, sharding
from googlenet_jax.model import cpu_layers, googlenet, layers, torch_weights
from googlenet_jax.training import optimizers
from googlenet_jax.training.state import create_state
from googlenet_jax.training.step import make_train_step

PLATFORMS = {'cpu': 'cpu', 'gpu': 'cuda,cpu'}
EIGEN = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_DOT'}


def _xla_pointwise(x, *kernels):
  return [cpu_layers.xla_conv(x, kernel[None, None]) for kernel in kernels]


NO_PATCHES = (cpu_layers, 'PATCHES_UP_TO', {})
NO_PRODUCTS = (cpu_layers, 'pointwise', _xla_pointwise)
NO_MAX_POOL = (cpu_layers, 'max_pool', layers.xla_max_pool)
FORMS_OF_A_CPU = (layers, '_cpu', lambda: True)
# Other forms of our layers, to see what each is worth: replacements (module, name, value) and options for XLA.
CPU_FORMS = {
  "XLA's layers": ([(layers, '_cpu', lambda: False)], None),
  'no patches': ([NO_PATCHES], None),
  'no 1x1 products': ([NO_PRODUCTS], None),
  "XLA's max-pool": ([NO_MAX_POOL], None),
  'convolutions by Eigen': ([], EIGEN),
}
GPU_FORMS = {
  "the CPU's max-pool": ([FORMS_OF_A_CPU, NO_PATCHES, NO_PRODUCTS], None),
  "the CPU's 1x1 products": ([FORMS_OF_A_CPU, NO_PATCHES, NO_MAX_POOL], None),
}
FORMS = CPU_FORMS | GPU_FORMS


class JaxSide(worker.Side):
  """Our network and its steps, on the devices that main.py uses; on one GPU, because PyTorch has one."""

  def __init__(self, device: str = 'auto'):
    """Chooses the device: 'auto', 'cpu' or 'gpu'."""
    if device != 'auto':
      jax.config.update('jax_platforms', PLATFORMS[device])

  def describe(self) -> dict[str, Any]:
    """Platform, device, versions, and the names in `FORMS`. Before `make` this fixes the number of CPU devices."""
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
  ) -> dict[str, Any]:
    """Builds and compiles.

    Args:
      mode: 'training' or 'inference'.
      image_size: pixels that the network sees.
      batch_size: images in a step.
      dtype: 'float32' or 'bfloat16'.
      config: recipe for everything else.
      form: key of `FORMS`.
      learning_rate: a constant one instead of the recipe's schedule.
      input_size: side of the images in a batch, in pixels.
      weights: safetensors file of the PyTorch twin to start from.

    Returns:
      `multiply_adds` of a step, and `runs_on`, the number of devices.
    """
    replacements, options = FORMS[form] if form else ([], None)
    for module, name, value in replacements:
      setattr(module, name, value)
    self.image_size, self.config = image_size, recipe.read(str(worker.ROOT / config))
    self.config.image_size, self.config.batch_size, self.config.dtype = image_size, batch_size, dtype
    if learning_rate:
      self.config.learning_rate, self.config.schedule = learning_rate, 'constant'
    cache.use_compilation_cache()  # this and the next as main.py does
    cpu_cores.use_cpu_cores(self.config)
    self.mesh = sharding.make_mesh(None if jax.default_backend() == 'cpu' else jax.devices()[:1])
    self._pending, self._ahead = collections.deque(), sharding.steps_ahead()
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (batch_size, input_size, input_size, 1), np.uint8)
    self._compile(mode, self.put(noise, rng.integers(0, 10, batch_size)), weights, options)
    passes = 1 if mode == 'inference' else 3  # the backward pass costs two forward passes
    multiply_adds = passes * batch_size * googlenet.count_multiply_adds(self.network, image_size)
    return {'multiply_adds': multiply_adds, 'runs_on': f'{self.mesh.size} device{"s" * (self.mesh.size > 1)}'}

  def _compile(self, mode, batch, weights, options) -> None:
    self.batches = itertools.repeat(batch)
    training = mode != 'inference'
    schedule = optimizers.learning_rate_schedule(self.config, steps_per_epoch=100)
    tx = optimizers.make_optimizer(self.config, schedule) if training else optax.identity()
    self.graphdef, self.state = create_state(self.config, num_classes=10, channels=1, tx=tx, mesh=self.mesh)
    if weights:
      params = torch_weights.from_torch(torch_weights.read(pathlib.Path(weights)), self.state.params, {}).params
      self.state = self.state.replace(params=sharding.replicate(params, self.mesh))
    self.network = nnx.merge(self.graphdef, self.state.params, self.state.batch_stats)
    self._predict = classifier.make_predict_step(self.graphdef, self.config, self.mesh)
    if training:
      step = make_train_step(self.graphdef, tx, self.config, self.mesh)
      self.compiled = step.lower(self.state, batch).compile(options)
    else:
      self.compiled = self._predict.lower(self._variables(), batch).compile(options)
    self._training = training

  def _variables(self):
    return self.state.params, self.state.batch_stats

  def step(self, batch: dict[str, jax.Array]) -> Any:
    """One step; waits for results as far behind as main.py does."""
    if self._training:
      self.state, result = self.compiled(self.state, batch)
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
    return sharding.shard_batch({'image': images, 'label': labels.astype(np.int32)}, self.mesh)

  def wait(self) -> None:
    """Returns when the devices are done."""
    jax.block_until_ready(self._pending)
    self._pending.clear()

  def multiply(self, size: int, dtype: str):
    """A function that multiplies two matrices."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = jax.jit(lambda a: a @ a)
    return lambda: product(a).block_until_ready()

  def device_memory(self) -> int | None:
    """Peak bytes on the GPU."""
    stats = self.mesh.devices.flat[0].memory_stats()
    return stats and stats.get('peak_bytes_in_use')


if __name__ == '__main__':
  worker.serve(JaxSide(*sys.argv[1:]))
