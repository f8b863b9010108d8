"""How far float32 training is from exact training: ours, XLA's own forms, and PyTorch, each against float64.

  FASHION_MNIST_DIR=DIR python experiments/rounding.py

All train from the same weights on the same real batches, by the options of compare_pytorch.py. Writes
experiments/results/rounding.md. What computes another function departs from float64 at once; rounding departs from it
little by little, by the same factor for everybody, and most where training leaves the plateau near 2.30.
"""

import argparse
import pathlib
import sys
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
import torch

from experiments import benchmark_jax, pytorch_twin, worker
from experiments.benchmark_tables import command, cores, cpu_model, publish, table
from experiments.compare_sides import MOMENTUM
from googlenet_jax.data import augment, pipeline
from googlenet_jax.host import sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import layers, torch_weights
from googlenet_jax.training import loop, optimizers
from googlenet_jax.training.state import create_state

SIZE = 32  # pixels
SHOWN = (1, 10, 20, 50, 100, 150, 200, 300, 500)


def jax_losses(batches, weights, learning_rate: float, dtype: str, devices: int, fast: bool) -> list[float]:
  """Losses of our training step; `fast` is for the forms of cpu_layers.py."""
  config = benchmark_jax.recipe(SIZE, len(batches[0]['label']), dtype)
  config.learning_rate, config.momentum, config.schedule = learning_rate, MOMENTUM, 'constant'
  config.augment.padding = (SIZE - batches[0]['image'].shape[1]) // 2  # as compare_pytorch.py
  mesh = sharding.make_mesh(jax.devices()[:devices])
  with jax.enable_x64(dtype == 'float64'), mock.patch.object(layers, '_cpu', return_value=fast):
    tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 1))
    graphdef, state = create_state(config, 10, 1, tx, mesh)
    state = jax.tree.map(lambda a: a.astype(dtype) if a.dtype == jnp.float32 else a, state)
    state = state.replace(params=torch_weights.from_torch(weights, state.params, {}).params)
    step = loop.make_train_step(graphdef, tx, config, mesh)
    first = sharding.shard_batch(batches[0], mesh)
    state = jax.tree.map(lambda a, to: a.astype(to.dtype), state, jax.eval_shape(step, state, first)[0])
    state, losses = sharding.replicate(state, mesh), []
    for batch in batches:
      state, loss = step(state, sharding.shard_batch(batch, mesh))
      losses.append(float(loss))
  return losses


def torch_losses(batches, module, learning_rate: float, dtype: torch.dtype) -> list[float]:
  """Losses of the twin's training step."""
  module = module.to(dtype).to(memory_format=torch.channels_last)
  optimizer = torch.optim.SGD(module.parameters(), lr=learning_rate, momentum=MOMENTUM)
  padding, losses = (SIZE - batches[0]['image'].shape[1]) // 2, []
  for batch in batches:
    image = np.asarray(augment.prepare(jnp.asarray(batch['image']), SIZE, padding)).transpose(0, 3, 1, 2)
    image = torch.tensor(image, dtype=dtype).to(memory_format=torch.channels_last)
    losses.append(float(pytorch_twin.train_step(module, optimizer, image, torch.tensor(batch['label']).long())))
  return losses


def main() -> None:
  """Prints and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--learning_rate', type=float, default=0.05)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--output', type=pathlib.Path, default=ROOT / 'experiments' / 'results')
  options = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 2)
  try:
    images, labels = worker.training_images()
  except (UserError, OSError) as error:
    sys.exit(f'error: {error}')
  order = pipeline.train_order(len(labels), options.batch_size, options.seed)
  batches = [{'image': images[order[i]], 'label': labels[order[i]]} for i in range(options.steps)]
  torch.manual_seed(options.seed)
  weights = {name: tensor.numpy().copy() for name, tensor in pytorch_twin.GoogLeNet().state_dict().items()}

  def twin():
    module = pytorch_twin.GoogLeNet()
    module.load_state_dict({name: torch.tensor(tensor) for name, tensor in weights.items()})
    return module

  rate, found = options.learning_rate, {}
  for name, losses in {
    'float64': lambda: jax_losses(batches, weights, rate, 'float64', 1, fast=False),
    'float64, PyTorch': lambda: torch_losses(batches, twin(), rate, torch.float64),
    'ours': lambda: jax_losses(batches, weights, rate, 'float32', 1, fast=True),
    'ours, 2 devices': lambda: jax_losses(batches, weights, rate, 'float32', 2, fast=True),
    "XLA's own forms": lambda: jax_losses(batches, weights, rate, 'float32', 1, fast=False),
    'PyTorch': lambda: torch_losses(batches, twin(), rate, torch.float32),
  }.items():
    found[name] = np.array(losses())
    print(f'{name}: last loss {found[name][-1]:.4f}', flush=True)
  exact, *others = found
  lines = [
    [str(step), f'{found[exact][step - 1]:.5f}', *(f'{abs(found[o] - found[exact])[step - 1]:.1e}' for o in others)]
    for step in sorted({s for s in SHOWN if s <= options.steps} | {options.steps})
  ]
  head = (
    f'Measured by `{command()}`: jax {jax.__version__}, torch {torch.__version__},\n'
    f'{cores()} cores of {cpu_model()};\n'
    f'{SIZE} pixels, batch {options.batch_size}, learning rate {options.learning_rate:g}. The loss in float64, by '
    "XLA's own forms, and how far\nthe others' is from it:\n\n"
  )
  publish(head + table(['step', exact, *others], lines), options.output / 'rounding.md')


if __name__ == '__main__':
  main()
