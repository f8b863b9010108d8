"""A training step in PyTorch, for comparison with the JAX network.

The network is `GoogLeNet` of googlenet_jax/exporting/torch_network.py, whose defaults are d2l's network. The code is
plain PyTorch: arguments are channels first, and `channels_last` is a memory format that the caller sets.
"""

from torch.nn import functional as F


def train_step(model, optimizer, image, label):
  """One step of training; returns the mean cross-entropy before it, a scalar tensor still on the device."""
  return update(lambda image, label: F.cross_entropy(model(image), label), optimizer, image, label)


def update(loss_fn, optimizer, image, label):
  """One step of training with `loss_fn(image, label)`; returns the loss before it."""
  optimizer.zero_grad(set_to_none=True)
  loss = loss_fn(image, label)
  loss.backward()
  optimizer.step()
  return loss.detach()
