"""The auxiliary classifiers of the paper (section 5): they send gradients into the middle of the network."""

import jax
import jax.numpy as jnp
from flax import nnx

from googlenet_jax.model.layers import Conv, Linear, dropout, flatten, relu
from googlenet_jax.model.options import AUXILIARY_POOL

AFTER = {'aux_4a': 'inception_4a', 'aux_4d': 'inception_4d'}  # classifier: the block whose output it reads
LOSS_WEIGHT = 0.3
DROPOUT = 0.7


class AuxiliaryClassifier(nnx.Module):
  """A small classifier on an inner map (section 5 of the paper), `[B, H, W, in]` to logits `[B, num_classes]`.

  Pool to a small map, 1x1 convolution to 128 channels, 1024 hidden units with ReLU, dropout of 70 %, linear.
  """

  def __init__(self, in_features: int, num_classes: int, pool: str, side: int, *, dtype, rngs, **conv_options):
    """Makes the classifier.

    Args:
      in_features: channels of the map.
      num_classes: length of the logits.
      pool: 'average_pool', the paper's 5x5 windows with stride 3; or 'adaptive_pool', torchvision's: 4x4 windows that
        share the map among them, however large it is. On the map of 14 pixels both give 4x4.
      side: of the map in pixels; read for 'average_pool' only.
      dtype: of the computation.
      rngs: stream `params`.
      **conv_options: for `layers.Conv`.
    """
    self.pool = pool
    pooled = 4 if pool == 'adaptive_pool' else (side - AUXILIARY_POOL) // 3 + 1
    self.conv = Conv(in_features, 128, 1, dtype=dtype, rngs=rngs, **conv_options)
    self.fc1 = Linear(pooled * pooled * 128, 1024, dtype, rngs)
    self.fc2 = Linear(1024, num_classes, dtype, rngs)

  def __call__(self, x: jax.Array, train: bool = False, keys: jax.Array | None = None) -> jax.Array:
    """Logits, float32; `train` and `keys` (for dropout) as in `GoogLeNet.end_points`."""
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
  """Means over `side` by `side` windows, as PyTorch's `AdaptiveAvgPool2d`: where they do not divide a map they overlap.

  Args:
    x: `[B, H, W, C]`.
    side: of the result.

  Returns:
    `[B, side, side, C]`.
  """
  for axis in (1, 2):
    size = x.shape[axis]
    bounds = [(i * size // side, -(-(i + 1) * size // side)) for i in range(side)]
    windows = [jax.lax.slice_in_dim(x, start, end, axis=axis) for start, end in bounds]
    x = jnp.stack([window.mean(axis) for window in windows], axis)
  return x
