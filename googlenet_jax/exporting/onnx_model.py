"""The `onnx.ModelProto` of a classifier: made, checked, written, and run."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from googlenet_jax import __version__, runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.exporting import onnx_network, onnx_preparing
from googlenet_jax.exporting.onnx_graph import FLOAT, UINT8, Graph, Value
from googlenet_jax.host.errors import UserError

PRODUCER = 'googlenet_jax'
LARGEST = 2**31 - 2**20  # bytes of weights; a file of the format ends below 2 GiB, and the graph needs a few


def make_model(classifier: Classifier, half: bool = False) -> Any:
  """Returns the `onnx.ModelProto` of a classifier; with `half`, its networks are float16.

  Raises:
    UserError: it would be larger than a file of the format can be.
  """
  graph, config, members = Graph(), classifier.recipe, []
  channels, augment, options = classifier.channels, config.augment, classifier.shape.options
  images = Value('images', UINT8, ('N', 'H', 'W', channels))
  x = onnx_preparing.add_preparation(
    graph, images.name, config.image_size, augment.padding, augment.resize, options, channels
  )
  for number, variables in enumerate(classifier.networks):
    own = graph.within(f'member_{number}') if len(classifier.networks) > 1 else graph
    members.append(onnx_network.add_network(own, nnx.merge(classifier.graphdef, *variables), x, half))
  if len(members) > 1:
    graph.add('Mean', onnx_network.PROBABILITIES, *members)
  if graph.nbytes > LARGEST:
    raise UserError(
      f'the onnx file would have {graph.nbytes / 2**30:.1f} GiB, and the format ends at 2: export the members of the '
      'ensemble one by one, or choose another --to'
    )
  preparation = runs.preparation(config, channels)
  text = (
    f'GoogLeNet, recipe {config.name}: probabilities of {len(classifier.classes)} classes for uint8 images of any size '
    f'[N, H, W, {channels}]. The nodes prepare/ are the preparation of images: {preparation}.'
  )
  output = Value(onnx_network.PROBABILITIES, FLOAT, ('N', len(classifier.classes)))
  model = graph.model('googlenet', text, [images], [output])
  properties = {'classes': list(classifier.classes), 'preparation': preparation}
  for key, value in properties.items():
    model.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))
  return model


def save(model: Any, path: pathlib.Path) -> None:
  """Names this program as the producer of a model, checks it by ONNX's own checker, and writes it."""
  import onnx

  model.producer_name, model.producer_version = PRODUCER, __version__
  onnx.checker.check_model(model, full_check=True)
  path.write_bytes(model.SerializeToString())


def runner(path: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function that runs a file by onnxruntime: uint8 `[N, H, W, C]` to probabilities `[N, num_classes]`."""
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # errors: warnings would stand between our lines
  session = onnxruntime.InferenceSession(os.fspath(path), options, providers=['CPUExecutionProvider'])
  return lambda images: session.run(None, {'images': images})[0]
