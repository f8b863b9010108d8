"""Converts weights between PyTorch and this network.

A PyTorch `state_dict` is a flat dict from tensor names to arrays. The arrays here are NumPy's; `weight_files.py` reads
and writes files of them. Into a network and back:

  tensors = weight_files.read('googlenet.pth')
  what = torch_weights.describe(tensors)
  model = nnx.eval_shape(lambda: googlenet.GoogLeNet(what.num_classes, what.channels, what.options, rngs=nnx.Rngs(0)))
  graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  params, batch_stats = nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)
  weights = torch_weights.from_torch(tensors, params, batch_stats, what.naming)
  model = nnx.merge(graphdef, weights.params, weights.batch_stats)
  weight_files.write('back.safetensors', torch_weights.to_torch(*weights, naming='torchvision'))

Kernels are `[k, k, in, out]` and `[in, out]` here, `[out, in, k, k]` and `[out, in]` in PyTorch. Values are only moved:
both ways together give the same bits.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from googlenet_jax.host.errors import UserError
from googlenet_jax.model import googlenet
from googlenet_jax.model.options import Options

# torchvision's `googlenet` with its auxiliary classifiers.
TORCHVISION = Options(norm='batch', pool='torchvision', ch5x5_kernel=3, auxiliary='adaptive_pool', dropout=0.2)
# Its published weights. Their `transforms()` normalise images by ImageNet's mean and standard deviation, and their
# network then maps them to [-1, 1] (`transform_input`). Together that is (x - 0.5) / 0.5 in each channel.
PUBLISHED = dataclasses.replace(TORCHVISION, input_mean='0.5', input_std='0.5')

NAMINGS = ('own', 'torchvision')
COUNTER = 'num_batches_tracked'  # in PyTorch's batch normalisation; with a fixed momentum nothing depends on it

TORCHVISION_NAMES = {
  'conv2_reduce': 'conv2',
  'conv2': 'conv3',
  'ch1x1': 'branch1',
  'ch3x3_reduce': 'branch2.0',
  'ch3x3': 'branch2.1',
  'ch5x5_reduce': 'branch3.0',
  'ch5x5': 'branch3.1',
  'pool_proj': 'branch4.1',
  'aux_4a': 'aux1',
  'aux_4d': 'aux2',
  'logits': 'fc',
  'norm': 'bn',
}
LINEAR = ('hidden', 'fc1', 'fc2', 'logits')
LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}


class Weights(NamedTuple):
  """The contents of a PyTorch `state_dict` in this network's form."""

  params: dict[str, Any]
  batch_stats: dict[str, Any]
  counters: dict[str, np.ndarray]  # `num_batches_tracked` by PyTorch's name; `to_torch` returns them unchanged


class Description(NamedTuple):
  """What the tensors of a file are weights of."""

  options: Options
  naming: str  # see `from_torch`
  num_classes: int
  channels: int  # channels of the images


def describe(tensors: Mapping[str, np.ndarray]) -> Description:
  """Finds the network that weights belong to, from the names and shapes of its tensors.

  Some options have no weights. Under torchvision's names they are taken to be those of its published weights
  (`PUBLISHED`). Under our names they are the defaults: `norm='none'` stands for 'lrn' too, and 'adaptive_pool' for any
  auxiliary classifiers.

  Args:
    tensors: name to array, as `read` returns them.

  Returns:
    What they are; `from_torch` checks every tensor.

  Raises:
    UserError: they are not weights of a GoogLeNet.
  """
  tensors = {name: tuple(array.shape) for name, array in tensors.items()}
  naming = 'torchvision' if 'conv1.conv.weight' in tensors else 'own'

  def shape_of(*path: str, rank: int = 4) -> tuple[int, ...]:
    name = torch_name((*path, 'kernel'), naming)
    if len(tensors.get(name, ())) != rank:
      there = ', '.join([*tensors][:3]) or 'nothing'
      raise UserError(f'no weights of a GoogLeNet: {name} is missing or no kernel; the file begins with {there}')
    return tensors[name]

  block = next(iter(googlenet.TABLE))
  conv1, ch5x5, logits = shape_of('conv1'), shape_of(block, 'ch5x5'), shape_of('logits', rank=2)
  has = lambda *path: torch_name((*path, 'kernel'), naming) in tensors
  auxiliary = 'adaptive_pool' if has('aux_4a', 'conv') else 'none'
  if naming == 'torchvision':
    options = dataclasses.replace(PUBLISHED, auxiliary=auxiliary)
  else:
    options = Options(
      inception='reduced' if has(block, 'ch3x3_reduce') else 'naive',
      head='fully_connected' if has('hidden') else 'average_pool',
      stem='small' if conv1[2] == 3 else 'article',
      norm='batch' if torch_name(('conv1', 'norm', 'scale'), naming) in tensors else 'none',
      auxiliary=auxiliary,
    )
  kernel = 3 if ch5x5[2] == 3 else 5
  return Description(dataclasses.replace(options, ch5x5_kernel=kernel), naming, logits[0], conv1[1])


def from_torch(tensors: Mapping[str, np.ndarray], params: Any, batch_stats: Any, naming: str = 'own') -> Weights:
  """Turns a PyTorch `state_dict` into parameters and batch statistics. Every tensor must belong to the network.

  Args:
    tensors: name to array, as `read` returns them; float32, or a type whose values float32 holds exactly.
      `num_batches_tracked` may be missing: files older than PyTorch 0.4.1 lack it.
    params: pure dict of the network's parameters, arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are read.
    batch_stats: the same for its batch statistics; empty without batch normalisation.
    naming: 'own' for the names of this network, as in exporting/torch_network.py; 'torchvision' for the names of
      torchvision's `googlenet`.

  Returns:
    float32 JAX arrays in the structure of `params` and `batch_stats`, and the counters.

  Raises:
    UserError: a tensor is missing or has the wrong shape or type, or is left over. The error names the first such
      tensor in the network's order.
    ValueError: the naming is unknown.
  """
  left = dict(tensors)
  trees, counters = ({}, {}), {}
  for name, tree, path, leaf in _entries(params, batch_stats, naming):
    if name not in left:
      if path is None:
        continue
      raise UserError(f'{name} is missing from the weights: the network expects it with shape {torch_shape(leaf)}')
    array = np.asarray(left.pop(name))  # also accepts a CPU tensor of PyTorch
    _check_fits(name, array, leaf)
    if path is None:
      counters[name] = array
    else:
      trees[tree][path] = jnp.asarray(array.transpose(_FROM_TORCH[array.ndim]), leaf.dtype)
  for name, array in left.items():
    raise UserError(f'{name} has no place in the network; its shape is {tuple(array.shape)}')
  return Weights(*(traverse_util.unflatten_dict(tree) for tree in trees), counters)


def match(
  tensors: Mapping[str, np.ndarray], params: Any, batch_stats: Any, naming: str
) -> tuple[dict[tuple[str, ...], np.ndarray], dict[str, np.ndarray]]:
  """Finds the place of each tensor by its name, whatever its shape.

  Args:
    tensors: see `from_torch`.
    params: see `from_torch`; only its structure and the number of axes are read.
    batch_stats: the same.
    naming: see `from_torch`.

  Returns:
    Arrays with this network's order of axes, by path such as `('params', 'conv1', 'kernel')`; and by name the tensors
    that have no place.
  """
  left, found = dict(tensors), {}
  for name, tree, path, leaf in _entries(params, batch_stats, naming):
    if name in left:
      array = np.asarray(left.pop(name))
      if path is not None:
        fits = array.ndim == len(leaf.shape)
        found['batch_stats' if tree else 'params', *path] = array.transpose(_FROM_TORCH[array.ndim]) if fits else array
  return found, left


def _check_fits(name: str, array: np.ndarray, leaf: Any) -> None:
  if tuple(array.shape) != torch_shape(leaf):
    raise UserError(f'{name} has shape {tuple(array.shape)}, but the network expects {torch_shape(leaf)}')
  if not np.can_cast(array.dtype, leaf.dtype):
    raise UserError(f'{name} is {array.dtype}, but the network expects {leaf.dtype}')


def to_torch(
  params: Any, batch_stats: Any, counters: Mapping[str, np.ndarray] | int = 0, naming: str = 'own'
) -> dict[str, np.ndarray]:
  """Turns parameters and batch statistics into a PyTorch `state_dict` in PyTorch's order.

  Args:
    params: pure dict of the network's parameters, such as `TrainState.params`.
    batch_stats: pure dict of its batch statistics, such as `TrainState.batch_stats`.
    counters: `num_batches_tracked` by PyTorch's name, or one number for all, such as `TrainState.step`.
    naming: see `from_torch`.

  Returns:
    Tensor name to C-contiguous array; counters are int64 scalars.

  Raises:
    ValueError: the naming is unknown.
  """
  tensors = {}
  for name, _, path, leaf in _entries(params, batch_stats, naming):
    if path is None:
      count = counters.get(name, 0) if isinstance(counters, Mapping) else counters
      tensors[name] = np.array(count, np.int64)
    else:
      array = np.asarray(leaf)
      tensors[name] = array.transpose(_TO_TORCH[array.ndim]).copy(order='C')
  return tensors


# Names and shapes ----------------------------------------------------------------------------------------------------

# Order of axes by rank.
_FROM_TORCH = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
_TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


def torch_shape(leaf) -> tuple[int, ...]:
  """Returns the shape of a parameter in PyTorch's order of axes."""
  return tuple(leaf.shape[axis] for axis in _TO_TORCH[len(leaf.shape)]) if leaf.shape else ()


def torch_name(path: tuple[str, ...], naming: str) -> str:
  """Returns PyTorch's name of a parameter, see `from_torch`; its path is such as `('conv1', 'kernel')`."""
  *modules, leaf = path
  if naming == 'torchvision':
    is_conv = modules[-1] not in (*LINEAR, 'norm')
    modules = [TORCHVISION_NAMES.get(m, m.replace('inception_', 'inception')) for m in modules]
    modules += ['conv'] * is_conv  # torchvision's BasicConv2d holds a `conv` and a `bn`
  return '.'.join([*modules, LEAVES[leaf]])


def _entries(params, batch_stats, naming):
  """Yields (PyTorch's name, 0 for params or 1 for batch_stats, path, leaf) in the network's order.

  Counters have neither tree nor path: both are None.
  """
  if naming not in NAMINGS:
    raise ValueError(f'naming={naming!r} is unknown: choose from {", ".join(NAMINGS)}')
  stages = ('conv1', 'conv2_reduce', 'conv2', *googlenet.TABLE, 'hidden', 'aux_4a', 'aux_4d', 'logits')
  layers, leaves = (*googlenet.Widths._fields, 'conv', 'fc1', 'fc2'), ('kernel', 'norm', 'scale', 'bias', 'mean', 'var')
  order = {name: i for i, name in enumerate((*stages, *layers, *leaves))}
  flat = traverse_util.flatten_dict
  found = [(path, i, leaf) for i, tree in enumerate((params, batch_stats)) for path, leaf in flat(tree).items()]
  for path, tree, leaf in sorted(found, key=lambda entry: [order[part] for part in entry[0]]):
    name = torch_name(path, naming)
    yield name, tree, path, leaf
    if path[-1] == 'var':
      yield f'{name.rpartition(".")[0]}.{COUNTER}', None, None, jax.ShapeDtypeStruct((), np.int64)
