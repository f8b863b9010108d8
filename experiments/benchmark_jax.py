"""Our side of experiments/benchmark.py, started by it: the steps of train.py and evaluate.py, as a run takes them."""

import collections
import itertools
import pathlib
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import default
from experiments import worker
from googlenet_jax.host import huge_pages, sharding
from googlenet_jax.model import googlenet
from googlenet_jax.training import optimizers

WARM_UP = 4  # steps


def recipe(image_size: int, batch_size: int, dtype: str = 'float32', norm: str = 'none'):
  """The article's recipe at another size."""
  config = default.get_config()
  config.image_size, config.batch_size, config.dtype, config.model.norm = image_size, batch_size, dtype, norm
  return config


def random_batch(batch_size: int, mesh) -> dict[str, jax.Array]:
  """Images of noise, as they come from the input pipeline, on the device."""
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (batch_size, 28, 28, 1), np.uint8)
  return sharding.shard_batch({'image': image, 'label': rng.integers(0, 10, batch_size).astype(np.int32)}, mesh)


def make_training(config, mesh, compiler_options: dict[str, str] | None = None):
  """The compiled training step, its state, and the network."""
  from googlenet_jax.training import loop
  from googlenet_jax.training.state import create_state

  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 100))
  graphdef, state = create_state(config, 10, 1, tx, mesh)
  batch = random_batch(config.batch_size, mesh)
  step = loop.make_train_step(graphdef, tx, config, mesh).lower(state, batch).compile(compiler_options)
  return step, state, nnx.merge(graphdef, state.params, state.batch_stats)


def timed_steps(step, state, batch, count: int) -> tuple[list[float], Any]:
  """Seconds of each of `count` training steps, and the state after them."""
  seconds = []
  for _ in range(count):
    begin = time.perf_counter()
    state, loss = step(state, batch)
    loss.block_until_ready()
    seconds.append(time.perf_counter() - begin)
  return seconds, state


class Case:
  """One network at one size: what is timed."""

  def __init__(self, mode: str, image_size: int, batch_size: int, dtype: str, norm: str = 'none'):
    """Compiles and warms up; `mode` is 'training', 'inference' or 'epochs'."""
    from googlenet_jax.evaluation import evaluate
    from googlenet_jax.training.state import create_state

    config = recipe(image_size, batch_size, dtype, norm)
    on_cpu = jax.default_backend() == 'cpu'
    mesh = sharding.make_mesh(None if on_cpu else jax.devices()[:1])  # one GPU: PyTorch gets no more
    self._batches = itertools.repeat(random_batch(batch_size, mesh))
    if mode == 'inference':
      import optax

      graphdef, state = create_state(config, 10, 1, optax.identity(), mesh)
      network = nnx.merge(graphdef, state.params, state.batch_stats)
      variables = (state.params, state.batch_stats)
      eval_step = evaluate.make_eval_step(graphdef, config, mesh).lower(variables, next(self._batches)).compile()
      self._step = lambda batch: eval_step(variables, batch)
    else:
      train_step, self._state, network = make_training(config, mesh)

      def step(batch):
        self._state, loss = train_step(self._state, batch)
        return loss

      self._step = step
    passes = 1 if mode == 'inference' else 3  # backward is twice forward
    self.multiply_adds = passes * batch_size * googlenet.count_multiply_adds(network, image_size)  # of a step
    self.run(WARM_UP)
    self.whole_epochs = mode == 'epochs'
    if self.whole_epochs:
      from googlenet_jax.data import datasets, pipeline

      images, labels = worker.training_images()
      self._batches = pipeline.train_batches(datasets.Split(images, labels), batch_size, 0, 0, mesh)

  def run(self, steps: int) -> float:
    """Seconds a step; results are waited for as far behind as train.py and evaluate.py do."""
    pending, ahead = collections.deque(), sharding.steps_ahead()
    begin = time.perf_counter()
    for batch in itertools.islice(self._batches, steps):
      pending.append(self._step(batch))
      if len(pending) > ahead:
        jax.block_until_ready(pending.popleft())
    jax.block_until_ready(pending)
    return (time.perf_counter() - begin) / steps


def product(size: int, dtype: str, repeats: int) -> float:
  """Floating point operations a second of a square matrix product, median."""
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
  multiply = jax.jit(lambda a: a @ a)
  multiply(a).block_until_ready()
  seconds = []
  for _ in range(repeats):
    begin = time.perf_counter()
    multiply(a).block_until_ready()
    seconds.append(time.perf_counter() - begin)
  return 2 * size**3 / float(np.median(seconds))


def main() -> None:
  """Answers the parent's requests."""

  def make_case(mode: str, image_size: int, batch_size: int, dtype: str, norm: str = 'none'):
    sharding.use_cpu_cores(recipe(image_size, batch_size, dtype, norm))  # as main.py does
    return Case(mode, image_size, batch_size, dtype, norm)

  def describe():
    device, versions = jax.devices()[0], {'jax': jax.__version__}
    return {'platform': device.platform, 'device': device.device_kind, 'versions': versions}

  worker.serve_cases(make_case, describe=describe, product=product)


if __name__ == '__main__':
  huge_pages.restart()  # as main.py
  main()
