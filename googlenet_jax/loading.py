"""`load`: makes a `Classifier` from the folder of a run, or from a file of PyTorch's weights."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from googlenet_jax import recipe, recipe_checks, runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import crops
from googlenet_jax.host import backend, cache, console, sharding
from googlenet_jax.host.errors import UserError, expanded

WEIGHTS = ('.pth', '.pt', '.safetensors')


@backend.our_settings()
def load(
  workdir: str | os.PathLike,
  step: int | str | None = None,
  mesh: Mesh | None = None,
  classes: Sequence[str] | None = None,
  data: Mapping[str, str | os.PathLike] | None = None,
) -> Classifier:
  """Loads what a run trained; for the workdir of an ensemble, all its members. Or loads a file of PyTorch's weights.

  Args:
    workdir: folder of the run; or a `.pth`, `.pt` or `.safetensors` file with the weights of a GoogLeNet, under the
      names of this network or of torchvision's. The options of the network are read from the tensors.
    step: step of the checkpoint, or 'best' for the best on the validation images. By default the newest. A
      checkpoint that was saved before its batch statistics were computed is taken only if there is no other.
    mesh: devices that predict; by default all devices of this process.
    classes: names of the classes, for a file of weights, which has none. By default their numbers, as text.
    data: where the images of the run are now, if not where it was trained: `source_dir` or `data_dir` of its recipe.

  Raises:
    UserError: there is no run, no such checkpoint or file, the weights belong to another network, or the members were
      trained by different recipes, or `data` names no folder.
  """
  workdir = expanded(workdir)
  cache.use_compilation_cache()
  backend.start()
  mesh = mesh or sharding.make_mesh(jax.local_devices())
  if workdir.suffix in WEIGHTS and not workdir.is_dir():
    if step is not None:
      raise UserError(f'{workdir} is a file of weights and has no steps: leave the step out')
    if data:
      raise UserError(f'{workdir} is a file of weights and knows no data: leave config.data.{next(iter(data))} out')
    return _load_weights(workdir, mesh, classes)
  if classes is not None:
    raise UserError(f'{workdir} knows its classes: classes= is for a file of weights')
  folders = runs.members(workdir)
  if len(folders) > 1:
    if isinstance(step, int):
      raise UserError(f'{workdir} is an ensemble: --step=N is for a single run; take the newest, or --step=best')
    runs.check_alike(folders)
  run = runs.read(folders[0])
  if data:
    _move(run.config, data)
  classifier = Classifier(run.config, run.classes, run.image_shape[-1], [], mesh)
  for folder in folders:
    network, number = _read_network(classifier, folder, step)
    classifier.networks.append(network)
    classifier.steps.append(number)
  return classifier


def _move(config: ConfigDict, data: Mapping[str, str | os.PathLike]) -> None:
  """Writes into a recipe where the images of its run are now."""
  for name, place in data.items():
    if name not in ('source_dir', 'data_dir'):
      raise UserError(f'data[{name!r}]: give source_dir or data_dir')
    if place and not expanded(place, f'config.data.{name}').is_dir():
      raise UserError(f'config.data.{name}={place}: there is no such folder')
    config.data[name] = os.fspath(place)
  recipe_checks.check_data(config)


def _read_network(classifier: Classifier, folder: pathlib.Path, step: int | str | None) -> tuple[tuple[Any, Any], int]:
  """Reads `(params, batch_stats)` that predict, the averaged ones if there are any, and the step."""
  from googlenet_jax.host import checkpoints  # Orbax takes a second to import

  if not runs.has_checkpoints(folder):
    raise UserError(f'{folder} holds no checkpoint yet: train first')
  both = {'params': classifier.params_shape, 'batch_stats': classifier.batch_stats_shape}
  wanted = {'step': jax.ShapeDtypeStruct((), jnp.int32), **both}
  wanted['averaged'] = both if classifier.recipe.average_decay else {}
  whole = sharding.whole(classifier.mesh)
  wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), wanted)
  saved = checkpoints.Checkpoints(folder, runs.validation_accuracies(folder), read_only=True)
  found = saved.restore_whole({'network': wanted}, step, fresh_first=True)
  if found is None:
    raise UserError(
      f'the only checkpoint of {folder} is being written anew: wait until it is there; if the training was killed, '
      'continue it with the same command'
    )
  network = found[0]['network']
  number = int(network['step'])
  if not saved.is_fresh(number):
    console.say(
      f'note: step {number} in {folder} was saved before the batch statistics of its weights were computed: '
      'its predictions are poor until the first evaluation of the run'
    )
  saved.close()
  chosen = network['averaged'] or network
  return (chosen['params'], chosen['batch_stats']), number


def _load_weights(path: pathlib.Path, mesh: Mesh, classes: Sequence[str] | None) -> Classifier:
  from googlenet_jax.model import torch_weights, weight_files

  tensors = weight_files.read(path)
  try:
    what = torch_weights.describe(tensors)
  except UserError as error:
    raise UserError(f'{path} holds {error}') from error
  if classes is not None and len(classes) != what.num_classes:
    raise UserError(f'{path} has {what.num_classes} classes, and {len(classes)} names are given')
  config = recipe_of_weights(what.options)
  config.name = path.stem
  names = classes or [str(number) for number in range(what.num_classes)]
  classifier = Classifier(config, names, what.channels, [], mesh)
  weights = torch_weights.from_torch(tensors, classifier.params_shape, classifier.batch_stats_shape, what.naming)
  classifier.networks.append(sharding.replicate((weights.params, weights.batch_stats), mesh))
  return classifier


def recipe_of_weights(options: Any) -> ConfigDict:
  """Returns a recipe for weights from elsewhere: 224 pixels out of 256, as in the paper and in torchvision.

  Args:
    options: the `Options` of the network.
  """
  config = recipe.default()
  config.model.update({name: getattr(options, name) for name in config.model})
  config.image_size = crops.PAPER_SIZE
  config.augment.resize = crops.PAPER_SCALES[0] / crops.PAPER_SIZE
  return config
