"""A trained network with its classes and its preparation of images. Every prediction goes through this class.

  classifier = googlenet_jax.load('runs/digits')
  classifier.predict('picture.png')  # Prediction(name='3', probability=0.98, label=3)

Evaluation, crops and ensembles use it too. It reads only the workdir and needs no data set and no training code.
"""

import copy
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from googlenet_jax import runs
from googlenet_jax.data import augment, crops, pictures, splits
from googlenet_jax.host import cache, checkpoints, console, sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.model.googlenet import GoogLeNet, count_multiply_adds
from googlenet_jax.model.options import Options

Images = np.ndarray | jax.Array | str | os.PathLike | Sequence
PARTS = (8, 64)  # images that the network sees at once


class Prediction(NamedTuple):
  """The likeliest class of an image."""

  name: str
  probability: float
  label: int


def make_network(config: ConfigDict, num_classes: int, channels: int, rngs: nnx.Rngs) -> GoogLeNet:
  """Makes the network of a recipe."""
  return GoogLeNet(
    num_classes,
    channels,
    Options(**config.model),
    image_size=config.image_size,
    dtype=jnp.dtype(config.dtype),
    rngs=rngs,
  )


def make_predict_step(
  graphdef: nnx.GraphDef, config: ConfigDict, mesh: Mesh, crop_count: int = 1
) -> Callable[..., Any]:
  """Builds the jitted step `((params, batch_stats), batch) -> log-probabilities`, float32 `[B, num_classes]`."""

  def step(variables, batch):
    network = nnx.merge(graphdef, *variables)
    return crops.log_probabilities(network, batch, crop_count, config.image_size, config.augment)

  return _jitted(step, mesh)


def _jitted(function: Callable[..., Any], mesh: Mesh, cut: bool = False) -> Callable[..., Any]:
  """Jits `(variables, batch) -> output`. Each device gets the whole output, or with `cut` its share."""
  whole, share = sharding.whole(mesh), sharding.cut(mesh)
  return jax.jit(function, in_shardings=(whole, share), out_shardings=share if cut else whole)


class Classifier:
  """One trained network, or an ensemble whose members' probabilities are averaged.

  Attributes:
    recipe: the recipe that trained the network.
    batch_size: images in a step of `evaluate`, over all devices.
    classes: names of the classes, by label.
    channels: channels of the images, 1 or 3.
    networks: `(params, batch_stats)` of each member.
    steps: step of each member's checkpoint.
    mesh: devices that predict.
    shape: the network with shapes in place of weights.
  """

  def __init__(
    self,
    config: ConfigDict,
    classes: Sequence[str],
    channels: int,
    networks: Sequence[tuple[Any, Any]],
    mesh: Mesh,
    steps: Sequence[int] = (),
  ):
    """Makes a classifier from weights in memory; `load` reads them from a workdir."""
    self.recipe, self.classes, self.channels = config, tuple(classes), channels
    self.networks, self.steps, self.mesh = list(networks), list(steps), mesh
    self.batch_size = config.batch_size
    self.shape = nnx.eval_shape(lambda: make_network(config, len(self.classes), channels, nnx.Rngs(0)))
    self.graphdef, self.params_shape, self.batch_stats_shape = split(self.shape)
    self.predict_step = functools.cache(functools.partial(make_predict_step, self.graphdef, config, mesh))
    self._stage = functools.cache(self._make_stage)
    self._prepare = _jitted(self._prepared, mesh, cut=True)

  @property
  def network(self) -> GoogLeNet:
    """The first member as a Flax module, with its weights: `network(images)` gives logits."""
    return nnx.merge(self.graphdef, *self.networks[0])

  def predict(self, images: Images) -> Prediction | list[Prediction]:
    """Names the likeliest class of an image, or of each of several.

    Args:
      images: as for `probabilities`.

    Returns:
      A `Prediction` for one image, a list of them for several.
    """
    probabilities = self.probabilities(images)
    labels = np.atleast_2d(probabilities).argmax(-1)
    found = [
      Prediction(self.classes[label], float(row[label]), int(label))
      for row, label in zip(np.atleast_2d(probabilities), labels, strict=True)
    ]
    return found[0] if probabilities.ndim == 1 else found

  def probabilities(self, images: Images, crop_count: int = 1) -> np.ndarray:
    """Returns the probability of each class.

    Args:
      images: uint8, or floating point in [0, 1]: `[B, H, W, C]`, or one image `[H, W, C]`; or a path of a picture, or
        a list of paths. Sizes are free: each image is prepared as the recipe says.
      crop_count: 1, 10 or 144 crops per image, or 6 views, see `data.crops`.

    Returns:
      float32 `[B, num_classes]`, or `[num_classes]` for one image.

    Raises:
      ValueError: an array of another shape, type or range.
      UserError: a picture cannot be read.
    """
    batch, single = self._batch(images)
    if crop_count == 1:
      step = self._step('logits')
    else:
      step = self.predict_step(crop_count)
    members = np.stack([self._in_parts(step, variables, batch, (len(self.classes),)) for variables in self.networks])
    members = np.exp(members - members.max(-1, keepdims=True))
    found = np.mean(members / members.sum(-1, keepdims=True), axis=0, dtype=np.float32)
    return found[0] if single else found

  def features(self, images: Images, name: str = 'head') -> np.ndarray:
    """Returns the output of a stage of the network. For an ensemble, the first member computes it.

    Args:
      images: as for `probabilities`.
      name: name of a stage, such as 'inception_3a', 'head' (the vector before the last layer) or 'logits'.

    Returns:
      float32 `[B, ...]`, or without the first axis for one image.

    Raises:
      ValueError: there is no such stage; see also `probabilities`.
    """
    batch, single = self._batch(images)
    if name not in self.stages:
      raise ValueError(f'{name!r} is no stage of the network: choose from {", ".join(self.stages)}')
    found = self._in_parts(self._step(name), self.networks[0], batch, self.stages[name])
    return found[0] if single else found

  @functools.cached_property
  def stages(self) -> dict[str, tuple[int, ...]]:
    """The stages of the network, and the shape of what each computes for one image."""
    size = self.recipe.image_size
    image = jax.ShapeDtypeStruct((1, size, size, self.channels), jnp.float32)
    variables = self.params_shape, self.batch_stats_shape
    run = lambda variables, image: nnx.merge(self.graphdef, *variables).end_points(image)
    return {name: found.shape[1:] for name, found in jax.eval_shape(run, variables, image).items()}

  @functools.cached_property
  def multiply_adds(self) -> int:
    """Multiply-adds in the convolutions for one image; counting them traces the network."""
    return count_multiply_adds(self.shape, self.recipe.image_size)

  def with_networks(self, networks: Sequence[tuple[Any, Any]]) -> 'Classifier':
    """Returns a classifier with other weights that shares the compiled programs."""
    other = copy.copy(self)
    other.networks = list(networks)
    return other

  # Preparing images and running the network are two programs: only the small one depends on the sizes of the images.

  def _prepared(self, _: tuple[()], batch: dict[str, jax.Array]) -> jax.Array:
    options = self.recipe.augment
    return augment.prepare(batch['image'], self.recipe.image_size, options.padding, batch.get('size'), options.resize)

  def _step(self, name: str) -> Callable[..., Any]:
    return lambda variables, part: self._stage(name)(variables, self._prepare((), part))

  def _make_stage(self, name: str) -> Callable[..., Any]:
    def stage(variables, image):
      return nnx.merge(self.graphdef, *variables).end_points(image)[name].astype(jnp.float32)

    return _jitted(stage, self.mesh)

  def _in_parts(
    self, step: Callable[..., Any], variables: Any, batch: dict[str, np.ndarray], shape: tuple[int, ...]
  ) -> np.ndarray:
    """Runs a step over parts of a batch; each part is filled up to one of PARTS, so few programs are compiled."""
    count, outputs = len(batch['image']), [np.empty((0, *shape), np.float32)]
    size = next((part for part in PARTS if part >= count), PARTS[-1])
    size = -(-size // self.mesh.size) * self.mesh.size
    for start in range(0, count, size):
      indices = np.arange(start, min(start + size, count))
      padded = np.append(indices, np.full(size - len(indices), start))
      part = sharding.shard_batch({name: array[padded] for name, array in batch.items()}, self.mesh)
      outputs.append(np.asarray(step(variables, part))[: len(indices)])
    return np.concatenate(outputs)

  def _batch(self, images: Images) -> tuple[dict[str, np.ndarray], bool]:
    """Returns `image [B, H, W, C]`, with `size [B, 2]` for pictures, and whether it was one image."""
    is_path = lambda value: isinstance(value, str | os.PathLike)
    if is_path(images):
      return self._pictures([images]), True
    if isinstance(images, list | tuple) and images and all(map(is_path, images)):
      return self._pictures(images), False
    try:
      array = np.asarray(images)
    except ValueError as error:
      raise ValueError('images of different sizes do not fit in one array: give them in turn, or as paths') from error
    single = array.ndim == 3
    batch = array[None] if single else array
    if batch.ndim != 4 or batch.shape[-1] != self.channels or 0 in batch.shape[1:]:
      raise ValueError(
        f'images of shape {array.shape} do not fit: give [B, H, W, {self.channels}], [H, W, {self.channels}], '
        'a path or a list of paths'
      )
    return {'image': _checked_values(batch)}, single

  def _pictures(self, paths: Sequence[str | os.PathLike]) -> dict[str, np.ndarray]:
    images = [pictures.read(path, self.channels) for path in paths]
    largest = max(max(image.shape[:2]) for image in images)
    side = min(self.recipe.data.canvas, 1 << (largest - 1).bit_length())  # powers of two: few programs are compiled
    canvas, sizes = splits.on_canvas(images, side)
    return {'image': canvas, 'size': sizes}


def _checked_values(batch: np.ndarray) -> np.ndarray:
  if batch.dtype == np.uint8:
    return batch
  if not jnp.issubdtype(batch.dtype, jnp.floating):
    raise ValueError(f'images of type {batch.dtype} do not fit: give uint8, or floating point in [0, 1]')
  batch = batch.astype(np.float32)
  if batch.size and not (batch.min() >= 0 and batch.max() <= 1):
    raise ValueError(
      f'floating point images must lie in [0, 1], these range from {batch.min():g} to {batch.max():g}: divide by 255, '
      'or give uint8'
    )
  return batch


def split(model: GoogLeNet) -> tuple[nnx.GraphDef, Any, Any]:
  """Returns the structure of a network, its parameters and its batch statistics, both as pure dicts."""
  graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def load(workdir: str | os.PathLike, step: int | str | None = None, mesh: Mesh | None = None) -> Classifier:
  """Loads what a run trained; for the workdir of an ensemble, all its members.

  Args:
    workdir: folder of the run.
    step: step of the checkpoint, or 'best' for the best on the validation images. By default the newest. A
      checkpoint that was saved before its batch statistics were computed is taken only if there is no other.
    mesh: devices that predict; by default all devices of this process.

  Raises:
    UserError: there is no run, no such checkpoint, or the members were trained by different recipes.
  """
  cache.use_compilation_cache()
  workdir = pathlib.Path(workdir).expanduser()
  folders = runs.members(workdir)
  if len(folders) > 1:
    if isinstance(step, int):
      raise UserError(f'{workdir} is an ensemble: --step=N is for a single run; take the newest, or --step=best')
    runs.check_alike(folders)
  run = runs.read(folders[0])
  mesh = mesh or sharding.make_mesh(jax.local_devices())
  classifier = Classifier(run.config, run.classes, run.image_shape[-1], [], mesh)
  for folder in folders:
    network, number = _read_network(classifier, folder, step)
    classifier.networks.append(network)
    classifier.steps.append(number)
  return classifier


def _read_network(classifier: Classifier, folder: pathlib.Path, step: int | str | None) -> tuple[tuple[Any, Any], int]:
  """Reads `(params, batch_stats)` that predict, the averaged ones if there are any, and the step."""
  if not runs.has_checkpoints(folder):
    raise UserError(f'{folder} holds no checkpoint yet: train first')
  both = {'params': classifier.params_shape, 'batch_stats': classifier.batch_stats_shape}
  wanted = {'step': jax.ShapeDtypeStruct((), jnp.int32), **both}
  wanted['averaged'] = both if classifier.recipe.average_decay else {}
  whole = sharding.whole(classifier.mesh)
  wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), wanted)
  saved = checkpoints.Checkpoints(folder, read_only=True)
  found, _ = saved.restore_whole({'network': wanted}, step, fresh_first=True)
  network = found['network']
  number = int(network['step'])
  if not saved.is_fresh(number):
    console.say(
      f'note: step {number} in {folder} was saved before the batch statistics of its weights were computed: '
      'its predictions are poor until the first evaluation of the run'
    )
  saved.close()
  chosen = network['averaged'] or network
  return (chosen['params'], chosen['batch_stats']), number
