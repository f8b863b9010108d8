"""GoogLeNet: the paper's table, the Inception block and the network.

Source: Szegedy et al., "Going deeper with convolutions", 2015, arXiv:1409.4842, table 1 and figure 2. Maps are
`[B, H, W, C]`. Padding and pooling follow PyTorch's arithmetic: PyTorch's weights give the same logits here.
"""

import types
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from googlenet_jax.data import random_keys
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import auxiliary_classifiers
from googlenet_jax.model.layers import Conv, Linear, dropout, flatten, max_pool, read_one_map, relu
from googlenet_jax.model.normalisation import local_response_norm
from googlenet_jax.model.options import D2L, MIN_IMAGE_SIZE, STAGES, Options, map_sides, numbers


class Widths(NamedTuple):
  """Output channels of an Inception block's convolutions: a row of the paper's table 1."""

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
POOL_AFTER = {'inception_3b': 3, 'inception_4e': 2}  # stride 2; torchvision's windows, the paper's are all 3x3
HIDDEN = 1024  # units in the hidden layer of the fully connected head

HEADS = ('hidden', 'logits', *auxiliary_classifiers.AFTER)  # what is not a stage of `STAGES`


class Inception(nnx.Module):
  """Four branches over the same map, joined along channels (figure 2b).

  `naive=True` gives figure 2a: there are no reductions, and the pool branch passes all its channels on. The output then
  grows from block to block: 416 channels after 3a instead of 256, 4944 after 5b instead of 1024.
  """

  def __init__(self, in_features: int, widths: Widths, naive: bool = False, ch5x5_kernel: int = 5, **conv_options):
    """Makes the block.

    Args:
      in_features: input channels.
      widths: output channels of each convolution.
      naive: whether to leave out the 1x1 reductions.
      ch5x5_kernel: side of the kernel of `ch5x5` in pixels.
      **conv_options: for every `layers.Conv`.
    """
    w, c = widths, conv_options
    self.ch1x1 = Conv(in_features, w.ch1x1, 1, **c)
    self.ch3x3_reduce = None if naive else Conv(in_features, w.ch3x3_reduce, 1, **c)
    self.ch3x3 = Conv(in_features if naive else w.ch3x3_reduce, w.ch3x3, 3, **c)
    self.ch5x5_reduce = None if naive else Conv(in_features, w.ch5x5_reduce, 1, **c)
    self.ch5x5 = Conv(in_features if naive else w.ch5x5_reduce, w.ch5x5, ch5x5_kernel, **c)
    self.pool_proj = None if naive else Conv(in_features, w.pool_proj, 1, **c)
    self.out_features = w.ch1x1 + w.ch3x3 + w.ch5x5 + (in_features if naive else w.pool_proj)

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Applies the block: `[B, H, W, in_features]` to `[B, H, W, out_features]`; for `train` see `Conv.__call__`."""
    if self.pool_proj is None:
      branch1, reduced3, reduced5, branch4 = self.ch1x1(x, train), x, x, max_pool(x, stride=1)
    else:
      branch1, reduced3, reduced5 = read_one_map((self.ch1x1, self.ch3x3_reduce, self.ch5x5_reduce), x, train)
      branch4 = self.pool_proj(max_pool(x, stride=1), train)  # [B, H, W, pool_proj]
    branch2 = self.ch3x3(reduced3, train)  # [B, H, W, ch3x3]
    branch3 = self.ch5x5(reduced5, train)  # [B, H, W, ch5x5]
    return jnp.concatenate([branch1, branch2, branch3, branch4], axis=-1)


class GoogLeNet(nnx.Module):
  """The network of d2l and the paper: stem, nine Inception blocks, global average pool, linear layer.

  With one input channel and ten classes it has 5,977,530 parameters. The fully connected head (what the paper argues
  against) flattens the last map, at 224 pixels 7 * 7 * 1024 = 50,176 values, into a hidden layer of 1024 with ReLU:
  51,381,248 more parameters.

  Stages are attributes, and the names of end points: `conv1, conv2_reduce, conv2, inception_3a .. inception_5b, head,
  logits`. Auxiliary classifiers add `aux_4a, aux_4d`.
  """

  def __init__(
    self,
    num_classes: int = 10,
    channels: int = 1,
    options: Options = D2L,
    *,
    image_size: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Makes the network.

    Args:
      num_classes: length of the logits.
      channels: channels of the images.
      options: the variant of the network.
      image_size: side of the square input in pixels; for `head='fully_connected'` and `auxiliary='average_pool'`.
      dtype: type of the computation, float32 or bfloat16; parameters and logits are float32.
      rngs: stream `params`.

    Raises:
      ValueError: see `Options.check`.
    """
    options.check(image_size, channels)
    self.channels, self.options = channels, options
    c = {'norm': options.norm, 'dtype': dtype, 'rngs': rngs}
    self.conv1 = Conv(channels, 64, 3, 1, **c) if options.stem == 'small' else Conv(channels, 64, 7, 2, **c)
    self.conv2_reduce = Conv(64, 64, 1, **c)
    self.conv2 = Conv(64, 192, 3, **c)
    features = 192
    for name, widths in TABLE.items():
      block = Inception(features, widths, options.inception == 'naive', options.ch5x5_kernel, **c)
      setattr(self, name, block)
      features = block.out_features
    middle, last = map_sides(image_size, options.stem, options.pool) if image_size else (0, 0)
    flat = options.head == 'fully_connected'
    self.hidden = Linear(last * last * features, HIDDEN, dtype, rngs) if flat else None
    self.logits = Linear(HIDDEN if flat else features, num_classes, dtype, rngs)
    # Last: the other initial weights are then the same with and without them.
    self.auxiliary = options.auxiliary != 'none'
    for name, block in auxiliary_classifiers.AFTER.items() if self.auxiliary else ():
      width = getattr(self, block).out_features
      setattr(self, name, auxiliary_classifiers.AuxiliaryClassifier(width, num_classes, options.auxiliary, middle, **c))

  def _check_shape(self, image: jax.Array) -> None:
    least = MIN_IMAGE_SIZE[self.options.stem]
    if image.ndim != 4 or image.shape[3] != self.channels or min(image.shape[1:3]) < least:
      raise ValueError(
        f'images of shape {image.shape} do not fit: expected [B, H, W, {self.channels}], H and W at least {least}'
      )

  def _halve(self, x: jax.Array, window: int = 3) -> jax.Array:
    """Pools between stages; the padded pools ignore `window`."""
    if self.options.pool == 'torchvision':
      return max_pool(x, stride=2, window=window, ceil_mode=True)
    return max_pool(x, stride=2)

  def _normalised(self, image: jax.Array) -> jax.Array:
    mean = numbers('input_mean', self.options.input_mean, self.channels)
    std = numbers('input_std', self.options.input_std, self.channels)
    if mean:
      image = image - jnp.array(mean, image.dtype)
    return image / jnp.array(std, image.dtype) if std else image

  def end_points(
    self, image: jax.Array, train: bool = False, keys: jax.Array | None = None, freeze: str = ''
  ) -> dict[str, jax.Array]:
    """Returns the output of every stage by name. Under jit, unused outputs cost nothing.

    Args:
      image: floating point `[B, H, W, channels]` in [0, 1].
      train: normalise with the statistics of the batch, and update the running statistics.
      keys: typed keys `[B]` for dropout; None for no dropout.
      freeze: name of a stage. Everything up to and including it keeps its running statistics, is normalised by them,
        and gets no gradient. Empty: nothing.

    Returns:
      Stage name to output; comments give the shapes at 224 pixels. Logits are float32 `[B, num_classes]`.

    Raises:
      ValueError: the images are too small for the network or have another number of channels.
    """
    self._check_shape(image)
    out = {}
    frozen = stages_up_to(freeze)

    def stage(name, x):
      x = out[name] = getattr(self, name)(x, train and name not in frozen)
      return jax.lax.stop_gradient(x) if name == freeze else x

    x = stage('conv1', self._normalised(image))  # [B, 112, 112, 64]
    if self.options.stem == 'article':
      x = self._halve(x)  # [B, 56, 56, 64]
    if self.options.norm == 'lrn':
      x = local_response_norm(x)
    x = stage('conv2_reduce', x)  # [B, 56, 56, 64]
    x = stage('conv2', x)  # [B, 56, 56, 192]
    if self.options.norm == 'lrn':
      x = local_response_norm(x)
    x = self._halve(x)  # [B, 28, 28, 192]
    for name in TABLE:
      x = stage(name, x)  # 3: [B, 28, 28, .]  4: [B, 14, 14, .]  5: [B, 7, 7, .]
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
    if keys is not None and self.options.dropout > 0:
      x = dropout(x, self.options.dropout, keys)
    out['logits'] = self.logits(x).astype(jnp.float32)  # [B, num_classes]
    return out

  def __call__(self, image: jax.Array, train: bool = False, keys: jax.Array | None = None) -> jax.Array:
    """Returns the logits, float32 `[B, num_classes]`; see `end_points` for arguments."""
    return self.end_points(image, train, keys)['logits']


def with_shapes(make: Callable[[Any], GoogLeNet]) -> GoogLeNet:
  """Returns the network `make(rngs)` with shapes in place of weights.

  Every layer gets the same key. `nnx.Rngs` would count its keys, and to trace that takes longer than all the rest.
  """
  key = jax.eval_shape(jax.random.key, 0)
  return nnx.eval_shape(lambda key: make(types.SimpleNamespace(params=lambda: key)), key)


def stages_up_to(name: str) -> tuple[str, ...]:
  """Returns the stages up to and including one; none for an empty name."""
  return STAGES[: STAGES.index(name) + 1] if name else ()


def count_parameters(module: nnx.Module) -> int:
  """Counts the trained values in a module."""
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def count_multiply_adds(model: GoogLeNet, image_size: int, stages: Collection[str] = STAGES) -> int:
  """Counts the multiply-adds in the convolutions for one image: 1.582 G for d2l's network at 224x224x3.

  Args:
    model: only shapes are read; it may come from `with_shapes`.
    image_size: side of the square input in pixels.
    stages: which to count.

  Returns:
    Number of multiply-adds, auxiliary classifiers excluded.
  """
  image = jax.ShapeDtypeStruct((1, image_size, image_size, model.channels), jnp.float32)
  graphdef, state = nnx.split(model)
  maps = jax.eval_shape(lambda state, image: nnx.merge(graphdef, state).end_points(image), state, image)
  total = 0
  for name in (name for name in ('conv1', 'conv2_reduce', 'conv2', *TABLE) if name in stages):
    kernels = [p for p in jax.tree.leaves(nnx.state(getattr(model, name), nnx.Param)) if p.ndim == 4]
    total += maps[name].shape[1] * maps[name].shape[2] * sum(kernel.size for kernel in kernels)
  return total


def make_network(config: ConfigDict, num_classes: int, channels: int, rngs: nnx.Rngs) -> GoogLeNet:
  """Makes the network of a recipe.

  Raises:
    UserError: an option of the recipe does not go with the channels of the images.
  """
  options = Options(**config.model)
  try:
    options.check(config.image_size, channels)
  except ValueError as error:
    raise UserError(f'config.model.{error}') from error
  dtype = jnp.dtype(config.dtype)
  return GoogLeNet(num_classes, channels, options, image_size=config.image_size, dtype=dtype, rngs=rngs)


def split(model: GoogLeNet) -> tuple[nnx.GraphDef, Any, Any]:
  """Returns the structure of a network, its parameters and its batch statistics, both as pure dicts."""
  graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)
