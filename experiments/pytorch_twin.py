"""d2l's network and training step in PyTorch, for comparison with the JAX network.

The table, the names and the distribution of the initial weights are those of googlenet_jax/model/googlenet.py. The code
is plain PyTorch: arguments are channels first, and `channels_last` is a memory format that the caller sets.
"""

import torch
from torch import nn
from torch.nn import functional as F

# Channels of 1x1, 3x3 reduction, 3x3, 5x5 reduction, 5x5, pool projection: table 1 of the paper.
TABLE = {
  'inception_3a': (64, 96, 128, 16, 32, 32),
  'inception_3b': (128, 128, 192, 32, 96, 64),
  'inception_4a': (192, 96, 208, 16, 48, 64),
  'inception_4b': (160, 112, 224, 24, 64, 64),
  'inception_4c': (128, 128, 256, 24, 64, 64),
  'inception_4d': (112, 144, 288, 32, 64, 64),
  'inception_4e': (256, 160, 320, 32, 128, 128),
  'inception_5a': (256, 160, 320, 32, 128, 128),
  'inception_5b': (384, 192, 384, 48, 128, 128),
}


class Inception(nn.Module):
  """The four branches of figure 2b, `[B, C, H, W]`."""

  def __init__(self, in_channels, ch1x1, ch3x3_reduce, ch3x3, ch5x5_reduce, ch5x5, pool_proj):
    super().__init__()
    self.ch1x1 = nn.Conv2d(in_channels, ch1x1, 1)
    self.ch3x3_reduce = nn.Conv2d(in_channels, ch3x3_reduce, 1)
    self.ch3x3 = nn.Conv2d(ch3x3_reduce, ch3x3, 3, padding=1)
    self.ch5x5_reduce = nn.Conv2d(in_channels, ch5x5_reduce, 1)
    self.ch5x5 = nn.Conv2d(ch5x5_reduce, ch5x5, 5, padding=2)
    self.pool_proj = nn.Conv2d(in_channels, pool_proj, 1)
    self.out_channels = ch1x1 + ch3x3 + ch5x5 + pool_proj

  def forward(self, x):
    """The branches side by side on channels."""
    branch1 = F.relu(self.ch1x1(x))
    branch2 = F.relu(self.ch3x3(F.relu(self.ch3x3_reduce(x))))
    branch3 = F.relu(self.ch5x5(F.relu(self.ch5x5_reduce(x))))
    branch4 = F.relu(self.pool_proj(F.max_pool2d(x, 3, 1, padding=1)))
    return torch.cat((branch1, branch2, branch3, branch4), dim=1)


class GoogLeNet(nn.Module):
  """d2l's network: `[B, channels, H, W]` in [0, 1] to logits `[B, num_classes]`."""

  def __init__(self, num_classes=10, channels=1):
    super().__init__()
    self.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3)
    self.conv2_reduce = nn.Conv2d(64, 64, 1)
    self.conv2 = nn.Conv2d(64, 192, 3, padding=1)
    features = 192
    for name, widths in TABLE.items():
      block = Inception(features, *widths)
      setattr(self, name, block)
      features = block.out_channels
    self.logits = nn.Linear(features, num_classes)
    for module in self.modules():
      if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)

  def forward(self, x):
    """Logits."""
    x = F.max_pool2d(F.relu(self.conv1(x)), 3, 2, padding=1)
    x = F.relu(self.conv2(F.relu(self.conv2_reduce(x))))
    x = F.max_pool2d(x, 3, 2, padding=1)
    for name in TABLE:
      x = getattr(self, name)(x)
      if name in ('inception_3b', 'inception_4e'):
        x = F.max_pool2d(x, 3, 2, padding=1)
    return self.logits(x.mean((2, 3)))


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
