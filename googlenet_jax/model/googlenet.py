"""GoogLeNet as a table, its Inception block, and both heads of the article's comparison.

Source: Szegedy et al., "Going deeper with convolutions", 2015, arXiv:1409.4842, table 1 and figure 2. Maps are
`[B, H, W, C]`; padding and pooling arithmetic are PyTorch's, so that weights carried over give the same logits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from googlenet_jax.data import random_keys
from googlenet_jax.model import auxiliary_classifiers
from googlenet_jax.model.layers import Conv, Linear, dropout, flatten, local_response_norm, max_pool, read_one_map, relu


class Widths(NamedTuple):
  """One row of the paper's table 1: output channels of the convolutions of one Inception block."""

  ch1x1: int
  ch3x3_reduce: int
  ch3x3: int
  ch5x5_reduce: int
  ch5x5: int
  pool_proj: int


TABLE = {
  #                    1x1  3x3r  3x3  5x5r  5x5  pool
  'inception_3a': Widths(64, 96, 128, 16, 32, 32),  # -> 256
  'inception_3b': Widths(128, 128, 192, 32, 96, 64),  # -> 480
  'inception_4a': Widths(192, 96, 208, 16, 48, 64),  # -> 512
  'inception_4b': Widths(160, 112, 224, 24, 64, 64),  # -> 512
  'inception_4c': Widths(128, 128, 256, 24, 64, 64),  # -> 512
  'inception_4d': Widths(112, 144, 288, 32, 64, 64),  # -> 528
  'inception_4e': Widths(256, 160, 320, 32, 128, 128),  # -> 832
  'inception_5a': Widths(256, 160, 320, 32, 128, 128),  # -> 832
  'inception_5b': Widths(384, 192, 384, 48, 128, 128),  # -> 1024
}
POOL_AFTER = {'inception_3b': 3, 'inception_4e': 2}  # stride 2; windows of torchvision, the paper's are all 3x3
HIDDEN = 1024  # of the fully connected head

# The smallest input, in pixels, in which every halving still has two pixels to choose from (five, or three halvings).
MIN_IMAGE_SIZE = {'article': 17, 'small': 5}

CHOICES = {  # keys of a recipe
  'inception': ('reduced', 'naive'),
  'head': ('average_pool', 'fully_connected'),
  'stem': tuple(MIN_IMAGE_SIZE),
  'norm': ('none', 'batch', 'lrn'),
  'auxiliary': ('none', 'average_pool', 'adaptive_pool'),
}
VARIANTS = {  # for weights from elsewhere; no keys of a recipe
  'pool': ('padded', 'torchvision'),
  'ch5x5_kernel': (5, 3),
}

# What torchvision's `transform_input` does: from images normalised by ImageNet's mean and standard deviation to images
# in [-1, 1], for which its published weights were trained.
TRANSFORM_SCALE = (0.229 / 0.5, 0.224 / 0.5, 0.225 / 0.5)
TRANSFORM_SHIFT = ((0.485 - 0.5) / 0.5, (0.456 - 0.5) / 0.5, (0.406 - 0.5) / 0.5)


def map_sides(image_size: int, stem: str = 'article', pool: str = 'padded') -> tuple[int, int]:
  """Sides in pixels of the square maps of stages 4 and 5 for an image of `image_size` pixels: 14 and 7 for 224."""

  def halved(side, window):
    return -(-side // 2) if pool == 'padded' else -(-(side - window) // 2) + 1

  side = image_size
  if stem == 'article':
    side = halved(-(-side // 2), 3)
  side = halved(halved(side, 3), 3)
  return side, halved(side, 2)


class Inception(nnx.Module):
  """Four branches over the same map, joined on channels (figure 2b): `[B, H, W, in]` to `[B, H, W, out_features]`.

  With `naive=True` it is figure 2a: no reductions, and the pool branch passes its input through, so that the output
  grows from block to block (416 channels after 3a instead of 256, 4944 after 5b instead of 1024).
  """

  def __init__(self, in_features: int, widths: Widths, naive: bool = False, ch5x5_kernel: int = 5, **conv_options):
    """Makes the block; `ch5x5_kernel` is the side of `ch5x5`'s kernel, `conv_options` go to every `layers.Conv`."""
    w, c = widths, conv_options
    self.ch1x1 = Conv(in_features, w.ch1x1, 1, **c)
    self.ch3x3_reduce = None if naive else Conv(in_features, w.ch3x3_reduce, 1, **c)
    self.ch3x3 = Conv(in_features if naive else w.ch3x3_reduce, w.ch3x3, 3, **c)
    self.ch5x5_reduce = None if naive else Conv(in_features, w.ch5x5_reduce, 1, **c)
    self.ch5x5 = Conv(in_features if naive else w.ch5x5_reduce, w.ch5x5, ch5x5_kernel, **c)
    self.pool_proj = None if naive else Conv(in_features, w.pool_proj, 1, **c)
    self.out_features = w.ch1x1 + w.ch3x3 + w.ch5x5 + (in_features if naive else w.pool_proj)

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Applies the block; `train` normalises by the batch where there is batch normalisation."""
    if self.pool_proj is None:
      branch1, reduced3, reduced5, branch4 = self.ch1x1(x, train), x, x, max_pool(x, stride=1)
    else:
      branch1, reduced3, reduced5 = read_one_map((self.ch1x1, self.ch3x3_reduce, self.ch5x5_reduce), x, train)
      branch4 = self.pool_proj(max_pool(x, stride=1), train)  # [B, H, W, pool_proj]
    branch2 = self.ch3x3(reduced3, train)  # [B, H, W, ch3x3]
    branch3 = self.ch5x5(reduced5, train)  # [B, H, W, ch5x5]
    return jnp.concatenate([branch1, branch2, branch3, branch4], axis=-1)


class GoogLeNet(nnx.Module):
  """The article's network: stem, nine Inception blocks, global average pool, linear.

  With one input channel and ten classes it has 5,977,530 parameters. Stages are attributes and end points by the same
  names: `conv1, conv2_reduce, conv2, inception_3a .. inception_5b, head, logits`, with auxiliary classifiers also
  `aux_4a, aux_4d`.
  """

  def __init__(
    self,
    num_classes: int = 10,
    channels: int = 1,
    *,
    inception: str = 'reduced',
    head: str = 'average_pool',
    stem: str = 'article',
    norm: str = 'none',
    dropout: float = 0.0,
    auxiliary: str = 'none',
    pool: str = 'padded',
    ch5x5_kernel: int = 5,
    transform_input: bool = False,
    image_size: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    axis_name: str | None = None,
    rngs: nnx.Rngs,
  ):
    """Makes the network.

    Args:
      num_classes: length of the logits.
      channels: of the images.
      inception: 'reduced' (figure 2b) or 'naive' (figure 2a).
      head: 'average_pool', the paper's: one vector of 1024 an image; or 'fully_connected', what the paper argues
        against: the last map flattened (at 224 pixels 7 * 7 * 1024 = 50,176 values), a hidden layer of 1024 with
        ReLU, then the logits. At 224 pixels the hidden layer alone has 51,381,248 parameters, nine times the rest.
      stem: 'article' (7x7 stride 2 and two pools: a map of 1/8) or 'small' for images of 28 or 32 pixels
        (3x3 stride 1 and one pool: a map of 1/2).
      norm: 'none'; 'batch' for batch normalisation after every convolution; or 'lrn' for the paper's local response
        normalisation after the first pool and before the second.
      dropout: probability of zeroing a feature before the last linear layer; the paper uses 0.4.
      auxiliary: 'none', or classifiers on the outputs of 4a and 4d: 'average_pool' as in the paper, 'adaptive_pool' as
        in torchvision; see `auxiliary_classifiers`.
      pool: what halves the maps: 'padded', 3x3 windows with padding 1; or 'torchvision', 3x3 without padding, the last
        window hanging over the edge (`ceil_mode`), and 2x2 after 4e.
      ch5x5_kernel: side of the kernel of the 5x5 branches; torchvision has 3 there.
      transform_input: takes images normalised by ImageNet's mean and standard deviation to [-1, 1] first, as
        torchvision does for its published weights; for 3 channels.
      image_size: side of the square input in pixels; needed by the fully connected head and by
        `auxiliary='average_pool'`, whose weights depend on it.
      dtype: of the computation, float32 or bfloat16; parameters and logits are float32.
      axis_name: mesh axis over which batch statistics are averaged, or None.
      rngs: stream `params`.

    Raises:
      ValueError: an unknown option, `image_size` missing where it is needed or too small for `average_pool`, or
        `transform_input` with other than 3 channels.
    """
    options = dict(inception=inception, head=head, stem=stem, norm=norm)
    options |= dict(auxiliary=auxiliary, pool=pool, ch5x5_kernel=ch5x5_kernel)
    for name, known in (CHOICES | VARIANTS).items():
      if options[name] not in known:
        raise ValueError(f'{name}={options[name]!r} is unknown: choose from {", ".join(map(str, known))}')
    if image_size is None and head == 'fully_connected':
      raise ValueError("head='fully_connected' needs image_size: its weights depend on it")
    if image_size is None and auxiliary == 'average_pool':
      raise ValueError("auxiliary='average_pool' needs image_size: its weights depend on it")
    if transform_input and channels != 3:
      raise ValueError(f'transform_input is for images of 3 channels, not {channels}')
    self.channels, self.stem, self.dropout_rate = channels, stem, dropout
    self.pool, self.transform_input = pool, transform_input
    self.lrn = norm == 'lrn'
    middle, last = map_sides(image_size, stem, pool) if image_size else (0, 0)
    if auxiliary == 'average_pool' and middle < auxiliary_classifiers.POOL:
      raise ValueError(
        f"auxiliary='average_pool' needs maps of 5 pixels in stage 4, image_size={image_size} gives {middle}: "
        "auxiliary='adaptive_pool' takes maps of any size"
      )

    c = {'norm': norm, 'dtype': dtype, 'axis_name': axis_name, 'rngs': rngs}
    self.conv1 = Conv(channels, 64, 7, 2, **c) if stem == 'article' else Conv(channels, 64, 3, 1, **c)
    self.conv2_reduce = Conv(64, 64, 1, **c)
    self.conv2 = Conv(64, 192, 3, **c)
    features = 192
    for name, widths in TABLE.items():
      block = Inception(features, widths, naive=inception == 'naive', ch5x5_kernel=ch5x5_kernel, **c)
      setattr(self, name, block)
      features = block.out_features
    if head == 'fully_connected':
      self.hidden = Linear(last * last * features, HIDDEN, dtype, rngs)
      features = HIDDEN
    else:
      self.hidden = None
    self.logits = Linear(features, num_classes, dtype, rngs)
    # Last, so that the other initial weights are the same with and without them.
    self.auxiliary = auxiliary != 'none'
    for name, block in auxiliary_classifiers.AFTER.items() if self.auxiliary else ():
      classifier = auxiliary_classifiers.AuxiliaryClassifier(
        getattr(self, block).out_features, num_classes, auxiliary, middle, **c
      )
      setattr(self, name, classifier)

  def _halve(self, x: jax.Array, window: int = 3) -> jax.Array:
    """A pool between stages; only torchvision's know other windows than 3x3."""
    if self.pool == 'torchvision':
      return max_pool(x, stride=2, window=window, ceil_mode=True)
    return max_pool(x, stride=2)

  def end_points(self, image: jax.Array, train: bool = False, keys: jax.Array | None = None) -> dict[str, jax.Array]:
    """Every stage's output by name; under jit, what is not used costs nothing.

    Args:
      image: floating point `[B, H, W, channels]` in [0, 1], or whatever the weights were trained for.
      train: normalise by the batch and update the running statistics, instead of using them.
      keys: typed keys `[B]` for dropout; None for no dropout.

    Returns:
      Stage name to output. Shapes at 224 pixels stand in the comments.

    Raises:
      ValueError: images too small for the network, or of another number of channels.
    """
    least = MIN_IMAGE_SIZE[self.stem]
    if image.ndim != 4 or image.shape[3] != self.channels or min(image.shape[1:3]) < least:
      raise ValueError(
        f'images of shape {image.shape} do not fit: expected [B, H, W, {self.channels}], H and W at least {least}'
      )
    out = {}
    if self.transform_input:
      image = image * jnp.array(TRANSFORM_SCALE, image.dtype) + jnp.array(TRANSFORM_SHIFT, image.dtype)
    x = out['conv1'] = self.conv1(image, train)  # [B, 112, 112, 64]
    if self.stem == 'article':
      x = self._halve(x)  # [B, 56, 56, 64]
    if self.lrn:
      x = local_response_norm(x)
    x = out['conv2_reduce'] = self.conv2_reduce(x, train)  # [B, 56, 56, 64]
    x = out['conv2'] = self.conv2(x, train)  # [B, 56, 56, 192]
    if self.lrn:
      x = local_response_norm(x)
    x = self._halve(x)  # [B, 28, 28, 192]
    for name in TABLE:
      x = out[name] = getattr(self, name)(x, train)  # 3: [B, 28, 28, .]  4: [B, 14, 14, .]  5: [B, 7, 7, .]
      for number, (classifier, block) in enumerate(auxiliary_classifiers.AFTER.items()):
        if self.auxiliary and name == block:
          own_keys = None if keys is None else random_keys.stream(keys, number)
          out[classifier] = getattr(self, classifier)(x, train, own_keys)  # [B, num_classes]
      if name in POOL_AFTER:
        x = self._halve(x, window=POOL_AFTER[name])
    if self.hidden is None:
      x = x.mean(axis=(1, 2))  # [B, 1024]
    else:
      x = relu(self.hidden(flatten(x)))  # [B, 1024]
    out['head'] = x
    if keys is not None and self.dropout_rate > 0:
      x = dropout(x, self.dropout_rate, keys)
    out['logits'] = self.logits(x).astype(jnp.float32)  # [B, num_classes]
    return out

  def __call__(self, image: jax.Array, train: bool = False, keys: jax.Array | None = None) -> jax.Array:
    """Logits, float32 `[B, num_classes]`; see `end_points`."""
    return self.end_points(image, train, keys)['logits']


def count_parameters(module: nnx.Module) -> int:
  """Number of trained values in a module."""
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def count_multiply_adds(model: GoogLeNet, image_size: int) -> int:
  """Multiply-adds of the convolutions for one image: 1.582 G for the article's network at 224 pixels, 3 channels."""
  image = jax.ShapeDtypeStruct((1, image_size, image_size, model.channels), jnp.float32)
  graphdef, state = nnx.split(model)
  maps = jax.eval_shape(lambda state, image: nnx.merge(graphdef, state).end_points(image), state, image)
  total = 0
  for name in ('conv1', 'conv2_reduce', 'conv2', *TABLE):
    kernels = [p for p in jax.tree.leaves(nnx.state(getattr(model, name), nnx.Param)) if p.ndim == 4]
    total += maps[name].shape[1] * maps[name].shape[2] * sum(kernel.size for kernel in kernels)
  return total
