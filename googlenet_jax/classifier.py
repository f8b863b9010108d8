"""A trained network with its classes and its preparation of images. Every prediction goes through this class.

  classifier = googlenet_jax.load('runs/digits')
  classifier.predict('picture.png')  # Prediction(name='3', probability=0.98, label=3)

Evaluation, crops and ensembles use it too. `loading.load` makes one. It needs no data set and no training code.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from googlenet_jax.data import augment, crops, inputs, splits
from googlenet_jax.data.inputs import Images
from googlenet_jax.host import backend, sharding
from googlenet_jax.host.errors import UserError, plain_troubles
from googlenet_jax.model import googlenet
from googlenet_jax.model.googlenet import GoogLeNet, count_multiply_adds

PARTS = (8, 64)  # images that the network sees at once
CLASS_MAPS = 'class_maps'  # name of the program that `explain` runs


class Prediction(NamedTuple):
  """The likeliest class of an image."""

  name: str
  probability: float
  label: int


class Explanation(NamedTuple):
  """Where an image speaks for its likeliest classes: their class activation maps, likeliest class first.

  Source: Zhou et al., "Learning Deep Features for Discriminative Localization", 2016, arXiv:1512.04150.
  """

  names: tuple[str, ...]  # names of the classes
  probabilities: np.ndarray  # float32 [top]
  labels: np.ndarray  # int64 [top]
  maps: np.ndarray  # float32 [top, h, w]: the mean of a map plus the bias of its class is the logit of the class
  picture: np.ndarray  # uint8 or float32 [H, W, C]: the image, shrunk to `data.canvas` if it is a larger file
  box: tuple[float, float, float, float]  # top, left, height, width of what the maps cover, in pixels of `picture`


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

  @backend.our_settings()
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
    self.shape = googlenet.with_shapes(functools.partial(googlenet.make_network, config, len(self.classes), channels))
    self.graphdef, self.params_shape, self.batch_stats_shape = googlenet.split(self.shape)
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
      ValueError: an array of another shape, type or range, or another number of crops.
      UserError: a picture cannot be read.
    """
    batch, single = self._batch(images)
    found = self.batch_probabilities(batch, crop_count)
    return found[0] if single else found

  def batch_probabilities(self, batch: dict[str, np.ndarray], crop_count: int = 1) -> np.ndarray:
    """Returns the probability of each class for a batch of `inputs.batch_of`; see `probabilities`."""
    if crop_count not in crops.COUNTS:
      raise ValueError(f'crop_count={crop_count}: choose from {", ".join(map(str, crops.COUNTS))}')
    step, part = self._step('logits'), PARTS[-1]
    if crop_count > 1:
      step, part = self.predict_step(crop_count), crops.batch_size(part, crop_count, self.mesh.size)
    shape = (len(self.classes),)
    return mean_softmax([self._in_parts(step, variables, batch, shape, part) for variables in self.networks])

  def explain(self, images: Images, top: int = 3) -> Explanation | list[Explanation]:
    """Returns the class activation maps of the likeliest classes; for an ensemble, the mean of its members' maps.

    Global average pooling makes a map one product: `inception_5b` times the weights of the last layer.

    Args:
      images: as for `probabilities`.
      top: number of classes; all of them if there are fewer.

    Returns:
      An `Explanation` for one image, a list of them for several.

    Raises:
      ValueError: `top` is below 1.
      UserError: the network has a fully connected head; see also `probabilities`.
    """
    if top < 1:
      raise ValueError(f'top={top}: give a number of classes, 1 or more')
    batch, single = self._batch(images)
    found = self.explanations(batch, top)
    return found[0] if single else found

  def explanations(self, batch: dict[str, np.ndarray], top: int) -> list[Explanation]:
    """Explains a batch of `inputs.batch_of`; see `explain`."""
    maps, probabilities = self.class_maps(batch)
    found = []
    for own, row, picture in zip(maps, probabilities, splits.pictures(batch), strict=True):
      labels = np.argsort(-row, kind='stable')[:top]
      names = tuple(self.classes[label] for label in labels)
      chosen, box = own[..., labels].transpose(2, 0, 1), self.box(*picture.shape[:2])
      found.append(Explanation(names, row[labels], labels, chosen, picture, box))
    return found

  def class_maps(self, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the maps of all classes, float32 `[B, h, w, num_classes]`, and probabilities `[B, num_classes]`.

    Raises:
      UserError: the network has a fully connected head.
    """
    self.check_explains()
    shape = (*self.stages[_last_block()][:2], len(self.classes))
    step = self._step(CLASS_MAPS)
    members = [self._in_parts(step, variables, batch, shape) for variables in self.networks]
    biases = [np.asarray(params['logits']['bias']) for params, _ in self.networks]
    logits = [maps.mean((1, 2)) + bias for maps, bias in zip(members, biases, strict=True)]
    return np.mean(members, axis=0, dtype=np.float32), mean_softmax(logits)

  def check_explains(self) -> None:
    """Raises UserError if the network has no class activation maps."""
    if self.recipe.model.head != 'average_pool':
      raise UserError(
        f'model.head={self.recipe.model.head}: class activation maps need global average pooling '
        '(model.head=average_pool), so they cannot explain this network'
      )

  @property
  def tells_places(self) -> bool:
    """Whether there are class activation maps, and they have more than one cell."""
    return self.recipe.model.head == 'average_pool' and self.stages[_last_block()][:2] != (1, 1)

  def box(self, height: int, width: int) -> tuple[float, float, float, float]:
    """Returns top, left, height and width of what the network sees of an image, in pixels, padding included."""
    options = self.recipe.augment
    corner, extent = augment.seen(np.array([height, width]), self.recipe.image_size, options.padding, options.resize)
    return tuple(float(value) for value in (*corner, *extent))

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

  def prepared(self, images: Images) -> np.ndarray:
    """Returns images as the network takes them: resized, cut out and padded. The network itself normalises them.

    Args:
      images: as for `probabilities`.

    Returns:
      float32 `[B, image_size, image_size, C]` in [0, 1], or without the first axis for one image.
    """
    batch, single = self._batch(images)
    found = self.batch_prepared(batch)
    return found[0] if single else found

  def batch_prepared(self, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Prepares a batch of `inputs.batch_of`; see `prepared`."""
    size = self.recipe.image_size
    return self._in_parts(self._prepare, (), batch, (size, size, self.channels))

  @functools.cached_property
  @backend.our_settings()
  def stages(self) -> dict[str, tuple[int, ...]]:
    """The stages of the network, and the shape of what each computes for one image."""
    size = self.recipe.image_size
    image = jax.ShapeDtypeStruct((1, size, size, self.channels), jnp.float32)
    variables = self.params_shape, self.batch_stats_shape
    run = lambda variables, image: nnx.merge(self.graphdef, *variables).end_points(image)
    return {name: found.shape[1:] for name, found in jax.eval_shape(run, variables, image).items()}

  @functools.cached_property
  @backend.our_settings()
  def multiply_adds(self) -> int:
    """Multiply-adds in the convolutions for one image; counting them traces the network."""
    return count_multiply_adds(self.shape, self.recipe.image_size)

  def with_networks(self, networks: Sequence[tuple[Any, Any]], steps: Sequence[int] | None = None) -> 'Classifier':
    """Returns a classifier with other weights, and their steps if given, that shares the compiled programs."""
    other = copy.copy(self)
    other.networks, other.steps = list(networks), self.steps if steps is None else list(steps)
    return other

  def with_recipe(self, config: ConfigDict, networks: Sequence[tuple[Any, Any]] | None = None) -> 'Classifier':
    """Returns a classifier with another recipe, and other weights if given."""
    networks = self.networks if networks is None else networks
    return Classifier(config, self.classes, self.channels, networks, self.mesh, self.steps)

  def of_this_process(self) -> 'Classifier':
    """Returns a classifier that predicts on the devices of this process, and waits for no other process."""
    own = [device for device in self.mesh.devices.flat if device.process_index == jax.process_index()]
    if len(own) == self.mesh.size:
      return self
    mesh = sharding.make_mesh(own)
    networks = sharding.replicate(jax.tree.map(np.asarray, self.networks), mesh)
    return Classifier(self.recipe, self.classes, self.channels, networks, mesh, self.steps)

  # Preparing images and running the network are two programs: only the small one depends on the sizes of the images.

  def _prepared(self, _: tuple[()], batch: dict[str, jax.Array]) -> jax.Array:
    options = self.recipe.augment
    return augment.prepare(batch['image'], self.recipe.image_size, options.padding, batch.get('size'), options.resize)

  def _step(self, name: str) -> Callable[..., Any]:
    return lambda variables, part: self._stage(name)(variables, self._prepare((), part))

  def _make_stage(self, name: str) -> Callable[..., Any]:
    def stage(variables, image):
      found = nnx.merge(self.graphdef, *variables).end_points(image)
      if name == CLASS_MAPS:
        last, kernel = found[_last_block()].astype(jnp.float32), variables[0]['logits']['kernel']
        return jnp.einsum('bhwf,fc->bhwc', last, kernel, precision=jax.lax.Precision.HIGHEST)
      return found[name].astype(jnp.float32)

    return _jitted(stage, self.mesh)

  @plain_troubles('end other programs that need memory')
  @backend.our_settings()
  def _in_parts(
    self,
    step: Callable[..., Any],
    variables: Any,
    batch: dict[str, np.ndarray],
    shape: tuple[int, ...],
    most: int = PARTS[-1],
  ) -> np.ndarray:
    """Runs a step over parts of a batch; each part is filled up to one of PARTS, so few programs are compiled."""
    count, outputs = len(batch['image']), [np.empty((0, *shape), np.float32)]
    size = min(most, next((part for part in PARTS if part >= count), PARTS[-1]))
    size = -(-size // self.mesh.size) * self.mesh.size
    for start in range(0, count, size):
      indices = np.arange(start, min(start + size, count))
      padded = np.append(indices, np.full(size - len(indices), start))
      part = sharding.shard_batch({name: array[padded] for name, array in batch.items()}, self.mesh)
      outputs.append(np.asarray(step(variables, part))[: len(indices)])
    return np.concatenate(outputs)

  def _batch(self, images: Images) -> tuple[dict[str, np.ndarray], bool]:
    return inputs.batch_of(images, self.channels, self.recipe.data.canvas)


def mean_softmax(logits: Sequence[np.ndarray]) -> np.ndarray:
  """Returns the mean over members of their probabilities, float32, from the logits of each member, `[B, classes]`."""
  members = np.stack(logits)
  members = np.exp(members - members.max(-1, keepdims=True))
  return np.mean(members / members.sum(-1, keepdims=True), axis=0, dtype=np.float32)


def _last_block() -> str:
  return [*googlenet.TABLE][-1]
