"""The paper's auxiliary classifiers (section 5), which send gradients into the middle of the network."""

import jax
import jax.numpy as jnp
from flax import nnx

from googlenet_jax.model.layers import Conv, Linear, dropout, flatten, relu
from googlenet_jax.model.options import AUXILIARY_POOL

AFTER = {'aux_4a': 'inception_4a', 'aux_4d': 'inception_4d'}  # classifier: block whose output it reads
LOSS_WEIGHT = 0.3
DROPOUT = 0.7
CHANNELS = 128  # output channels of the 1x1 convolution
HIDDEN = 1024  # units in the hidden layer


class AuxiliaryClassifier(nnx.Module):
  """A small classifier on an inner map (section 5 of the paper).

  Average pool, 1x1 convolution to 128 channels, 1024 hidden units with ReLU, 70 % dropout, linear layer.
  """

  def __init__(self, in_features: int, num_classes: int, pool: str, side: int, *, dtype, rngs, **conv_options):
    """Makes the classifier.

    Args:
      in_features: channels of the map.
      num_classes: length of the logits.
      pool: 'average_pool', the paper's 5x5 windows with stride 3; or 'adaptive_pool', torchvision's 4x4 windows for
        maps of any size. Both give 4x4 pixels on a map of 14x14.
      side: side of the map in pixels; only 'average_pool' needs it.
      dtype: type of the computation; parameters and logits are float32.
      rngs: stream `params`.
      **conv_options: for `layers.Conv`.
    """
    self.pool = pool
    pooled = 4 if pool == 'adaptive_pool' else (side - AUXILIARY_POOL) // 3 + 1
    self.conv = Conv(in_features, CHANNELS, 1, dtype=dtype, rngs=rngs, **conv_options)
    self.fc1 = Linear(pooled * pooled * CHANNELS, HIDDEN, dtype, rngs)
    self.fc2 = Linear(HIDDEN, num_classes, dtype, rngs)

  def __call__(self, x: jax.Array, train: bool = False, keys: jax.Array | None = None) -> jax.Array:
    """Applies the classifier.

    Args:
      x: `[B, H, W, in_features]`.
      train: see `GoogLeNet.end_points`.
      keys: typed keys `[B]` for dropout; None for no dropout.

    Returns:
      Logits, float32 `[B, num_classes]`.
    """
    if self.pool == 'adaptive_pool':
      x = adaptive_average_pool(x, 4)  # [B, 4, 4, in]
    else:
      x = nnx.avg_pool(x, (AUXILIARY_POOL,) * 2, (3, 3))  # [B, 4, 4, in]
    x = self.conv(x, train)  # [B, 4, 4, 128]
    x = relu(self.fc1(flatten(x)))  # [B, 1024]
    if keys is not None:
      x = dropout(x, DROPOUT, keys)
    return self.fc2(x).astype(jnp.float32)


def adaptive_average_pool(x: jax.Array, side: int) -> jax.Array:
  """Averages over `side` by `side` windows, as PyTorch's `AdaptiveAvgPool2d`.

  The windows overlap if `side` does not divide the size of the map.

  Args:
    x: `[B, H, W, C]`.
    side: side of the result in pixels.

  Returns:
    `[B, side, side, C]`.
  """
  for axis in (1, 2):
    size = x.shape[axis]
    bounds = [(i * size // side, -(-(i + 1) * size // side)) for i in range(side)]
    windows = [jax.lax.slice_in_dim(x, start, end, axis=axis) for start, end in bounds]
    x = jnp.stack([window.mean(axis) for window in windows], axis)
  return x
