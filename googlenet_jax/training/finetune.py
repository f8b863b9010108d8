"""Fine-tuning: the first weights are those of another run, or of a file of PyTorch's weights (`init_from`).

The network is then that of the source, whatever the recipe says, except for dropout and auxiliary classifiers. A head
for other classes is new. `freeze` and `body_learning_rate` say what is trained, and how fast.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from googlenet_jax import loading, runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.host import console, sharding
from googlenet_jax.host.errors import UserError, expanded
from googlenet_jax.model import auxiliary_classifiers, torch_weights, weight_files
from googlenet_jax.model.googlenet import HEADS, make_network, split, with_shapes
from googlenet_jax.model.options import STAGES, Options, numbers
from googlenet_jax.training.state import TrainState

CONV1 = ('params', 'conv1', 'kernel')
# The layers of each head in order. If one is new, so are those after it: they would read what they do not know.
HEAD_LAYERS = (
  (('hidden',), ('logits',)),
  *(((name, 'conv'), (name, 'fc1'), (name, 'fc2')) for name in auxiliary_classifiers.AFTER),
)


class Source(NamedTuple):
  """Where the first weights come from."""

  name: str  # for messages
  arrays: dict[tuple[str, ...], np.ndarray]  # by path, such as ('params', 'conv1', 'kernel')
  num_classes: int
  classes: tuple[str, ...] | None  # their names; None if they are not known
  naming: str = ''  # how a file names its tensors

  def name_of(self, path: tuple[str, ...]) -> str:
    """Returns the name that a tensor has in the source."""
    return torch_weights.torch_name(path[1:], self.naming) if self.naming else '.'.join(path[1:])

  def shape_of(self, array: Any, rank: int) -> tuple[int, ...]:
    """Returns the shape that a tensor has in the source; one of another rank was left as it is in the file."""
    return torch_weights.torch_shape(array) if self.naming and len(array.shape) == rank else tuple(array.shape)


def is_file(config: ConfigDict) -> bool:
  """Returns whether `init_from` names a file of PyTorch's weights, and not a workdir."""
  path = expanded(config.init_from, 'config.init_from')
  return path.suffix in loading.WEIGHTS and not path.is_dir()


# The network of the source, before anything is built -----------------------------------------------------------------


def with_network_of_source(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
  """Returns the recipe with the network of `init_from`. It prints nothing, because JAX has not looked for devices yet.

  Where the run has begun, its own recipe tells the network, and the source is not read: it may be gone.

  Args:
    config: the recipe.
    workdir: folder of the run.

  Raises:
    UserError: `init_from` names nothing that can be read, or weights of another kind of network.
  """
  if not config.init_from or runs.has_begun(workdir):
    return runs.with_network_of_run(config, workdir)
  network = _network_of_file if is_file(config) else _network_of_run
  with _named(config):
    found = network(config)
  config = config.copy_and_resolve_references()
  config.model.update(found)
  return config


@contextlib.contextmanager
def _named(config: ConfigDict) -> Iterator[None]:
  """Adds the key to an error about the source."""
  try:
    yield
  except UserError as error:
    raise UserError(f'config.init_from={config.init_from}: {error}') from error


def _network_of_run(config: ConfigDict) -> dict[str, Any]:
  source = runs.read(_source_folder(config)).config
  return {name: source.model[name] for name in runs.OF_SOURCE}


def _source_folder(config: ConfigDict) -> pathlib.Path:
  """Returns the folder of the source run; that of the first member if it is an ensemble."""
  path = expanded(config.init_from)
  if not path.is_dir():
    text = f'there is no such folder: give the workdir of a run, or a file that ends with {", ".join(loading.WEIGHTS)}'
  else:
    folder = runs.first_member(path)
    if not runs.is_run(folder) or runs.has_checkpoints(folder):
      return folder
    text = 'the run holds no checkpoint yet: train it first'
  raise UserError(text)


def _network_of_file(config: ConfigDict) -> dict[str, Any]:
  """Returns the options of the network in a file. The recipe keeps what no weight of the file tells."""
  _, what = _read_file(config)
  options, own = what.options, config.model
  prepared = {'input_mean': own.input_mean, 'input_std': own.input_std}
  if what.naming == 'own':
    norm = 'lrn' if (options.norm, own.norm) == ('none', 'lrn') else options.norm
    options = dataclasses.replace(options, pool=own.pool, norm=norm, **prepared)
  elif any(prepared.values()):
    options = dataclasses.replace(options, **prepared)
  return {name: getattr(options, name) for name in runs.OF_SOURCE}


def _read_file(config: ConfigDict) -> tuple[dict[str, np.ndarray], torch_weights.Description]:
  tensors = weight_files.read(config.init_from)
  return tensors, torch_weights.describe(tensors)


# The weights ---------------------------------------------------------------------------------------------------------


def initialise(state: TrainState, config: ConfigDict, classifier: Classifier) -> TrainState:
  """Returns a first state with the weights of `init_from`, and prints what was loaded, what is new and what left out.

  All members of an ensemble begin with the same weights; new layers differ if `ensemble.initial_weights` says so.
  Averaged weights begin with the same weights, too.

  Args:
    state: the state with random weights.
    config: the recipe, from `with_network_of_source`.
    classifier: the network, its classes and its channels.

  Raises:
    UserError: a tensor is missing, does not fit, or has no place; or the source cannot be read.
  """
  from_file = is_file(config)
  with _named(config):
    source = _file(config) if from_file else _run(config, classifier)
  target = traverse_util.flatten_dict({'params': state.params, 'batch_stats': state.batch_stats})
  new = _new_layers(target, source, classifier.classes)
  for path in source.arrays:
    if path not in target and path[1] not in HEADS:
      raise UserError(f'{source.name}: {source.name_of(path)} has no place in the network')
  first, lines = {}, []
  for path, leaf in target.items():
    first[path] = leaf
    if _layer(path) not in new:
      array = _found(path, leaf, source)
      if path == CONV1 and array.shape[2] != leaf.shape[2]:
        lines.append(f'conv1 adapted from {array.shape[2]} to {leaf.shape[2]} channels')
        array, exact = adapt_channels(array, leaf.shape[2], Options(**config.model))
        lines[-1] += '' if exact else '; the means of the channels differ, so grey pictures look a little different'
      if array.shape != leaf.shape:
        there, here = (source.shape_of(tensor, leaf.ndim) for tensor in (array, leaf))
        raise UserError(f'{source.name}: {source.name_of(path)} has shape {there}, but the network expects {here}')
      first[path] = array.astype(leaf.dtype)
  for line in (*_network_in_words(source, config), *_report(target, source, new, classifier.classes, lines)):
    console.say(line)
  variables = sharding.replicate(traverse_util.unflatten_dict(first), classifier.mesh)
  variables.setdefault('batch_stats', state.batch_stats)  # empty without batch normalisation
  return state.replace(**variables, averaged=jax.tree.map(jnp.copy, variables) if state.averaged else {})


def adapt_channels(kernel: np.ndarray, channels: int, options: Options) -> tuple[np.ndarray, bool]:
  """Makes the first kernel fit images of one channel or of three.

  A grey image and the same image in three equal channels then give the same map. For grey images the kernel is summed
  over the channels; for colour it is repeated, a third each. The standard deviations of `input_std` are made up for.

  Args:
    kernel: `[k, k, in, out]`.
    channels: 1 or 3, and not `in`.
    options: with `input_mean` and `input_std`. Three means become their mean for grey images.

  Returns:
    The kernel `[k, k, channels, out]`, and whether the maps are the same up to rounding. From three channels to one
    they are not if the means differ.

  Raises:
    UserError: there is no rule for these channels.
  """
  before = kernel.shape[2]
  if {before, channels} != {1, 3}:
    raise UserError(f'the first layer has {before} input channels, but the images have {channels}')
  std = np.broadcast_to(np.float64(numbers('input_std', options.input_std, 3) or 1), 3)[:, None]  # [3, 1]
  means = set(numbers('input_mean', options.input_mean, 3))
  if channels == 1:
    return (kernel * (std.mean() / std)).sum(2, keepdims=True), len(means) <= 1
  return kernel * (std / std.mean()) / 3, True


def _run(config: ConfigDict, classifier: Classifier) -> Source:
  folder = _source_folder(config)
  found = loading.load(folder, mesh=classifier.mesh)
  (params, batch_stats), averaged = jax.device_get(found.networks[0]), bool(found.recipe.average_decay)
  arrays = traverse_util.flatten_dict({'params': params, 'batch_stats': batch_stats})
  name = f'{folder}, step {found.steps[0]}' + ', averaged weights' * averaged
  return Source(name, arrays, len(found.classes), found.classes)


def _file(config: ConfigDict) -> Source:
  tensors, what = _read_file(config)
  own = config.copy_and_resolve_references()
  own.model.auxiliary = what.options.auxiliary
  shape = with_shapes(functools.partial(make_network, own, what.num_classes, what.channels))
  _, params, batch_stats = split(shape)
  arrays, rest = torch_weights.match(tensors, params, batch_stats, what.naming)
  for name, array in rest.items():
    raise UserError(f'{name} of shape {array.shape} has no place in the network')
  return Source(config.init_from, arrays, what.num_classes, None, what.naming)


def _layer(path: tuple[str, ...]) -> tuple[str, ...]:
  return path[1:3] if path[1] in auxiliary_classifiers.AFTER else path[1:2]


def _new_layers(target: dict, source: Source, classes: tuple[str, ...]) -> dict[tuple[str, ...], str]:
  """Returns the layers of the heads that keep random weights, and why."""
  other = f'{len(classes)} classes, and the source has {source.num_classes} classes'
  if source.num_classes == len(classes):
    other = '' if source.classes in (None, classes) else 'the source has classes of other names'
  new = {}
  for layers in HEAD_LAYERS:
    why = ''
    for layer in layers:
      for path in (path for path in target if _layer(path) == layer and path[0] == 'params'):
        found = source.arrays.get(path)
        if found is None:
          why = why or 'not in the source'
        elif found.shape[:-1] != target[path].shape[:-1]:  # the last axis is that of the classes
          there, here = (source.shape_of(tensor, target[path].ndim) for tensor in (found, target[path]))
          why = why or f'{source.name_of(path)} has shape {there} there, and {here} here'
      if layer == layers[-1]:
        why = why or other
      if why:
        new[layer] = why
  return new


def _found(path: tuple[str, ...], leaf: jax.Array, source: Source) -> np.ndarray:
  """Returns the tensor of the source at a path.

  Raises:
    UserError: it is missing, or holds something else than finite numbers.
  """
  array = source.arrays.get(path)
  if array is None:
    shape = source.shape_of(leaf, leaf.ndim)
    raise UserError(f'{source.name}: {source.name_of(path)} is missing; the network expects it with shape {shape}')
  if not jnp.issubdtype(array.dtype, jnp.floating) or not np.isfinite(array).all():
    raise UserError(f'{source.name}: {source.name_of(path)} holds values that are not finite numbers ({array.dtype})')
  return array


def _network_in_words(source: Source, config: ConfigDict) -> list[str]:
  default = Options()
  options = {name: config.model[name] for name in runs.OF_SOURCE}
  words = [f'model.{name}={value}' for name, value in options.items() if value != getattr(default, name)]
  lines = [f'the network is that of {config.init_from}, whatever the recipe says: {", ".join(words) or "d2l"}']
  published = (torch_weights.PUBLISHED.input_mean, torch_weights.PUBLISHED.input_std)
  if source.naming == 'torchvision' and (config.model.input_mean, config.model.input_std) == published:
    lines.append(
      'images are prepared as for the published weights of torchvision, (x - 0.5) / 0.5; for other weights with its '
      'names set config.model.input_mean and config.model.input_std'
    )
  return lines


def _report(
  target: dict, source: Source, new: dict[tuple[str, ...], str], classes: tuple[str, ...], adapted: list[str]
) -> list[str]:
  """Says in a few lines what was loaded, what is new and what was left out."""
  loaded = [path for path in target if _layer(path) not in new]
  left = [path for path in source.arrays if path not in target or _layer(path) in new]
  lines = [f'first weights from {source.name}: {_modules(loaded)}', *adapted]
  for why in dict.fromkeys(new.values()):
    lines.append(f'new: {_modules([path for path in target if new.get(_layer(path)) == why])}: {why}')
  if ('logits',) not in new and source.classes is None:
    lines.append(f'note: the source does not name its {len(classes)} classes, so its head is kept as it is')
  if left:
    lines.append(f'left out: {_modules(left)}')
  return lines


def _modules(paths: list[tuple[str, ...]]) -> str:
  """Names modules in the order of the network, such as '287 tensors (conv1 to inception_5b)'."""
  found = {path[1] for path in paths}
  stages = [name for name in STAGES if name in found]
  heads = sorted('.'.join(layer) for layer in {_layer(path) for path in paths if path[1] in HEADS})
  words = ([f'{stages[0]} to {stages[-1]}'] if stages else []) + heads
  return f'{len(paths)} tensors ({", ".join(words)})'
