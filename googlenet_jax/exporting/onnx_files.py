"""`--to=onnx`: one file with the preparation of images, the network or the networks of an ensemble, and softmax."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from googlenet_jax import __version__, runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.exporting import artefact, onnx_network, onnx_preparing
from googlenet_jax.exporting.artefact import Artefact
from googlenet_jax.exporting.onnx_graph import FLOAT, IR_VERSION, OPSET, UINT8, Graph, Value
from googlenet_jax.host.errors import one_line

FILE = 'googlenet.onnx'
PRODUCER = 'googlenet_jax'
EXAMPLE = """\
import json
import pathlib

import numpy as np
import onnxruntime

folder = pathlib.Path(__file__).parent
session = onnxruntime.InferenceSession(str(folder / 'googlenet.onnx'), providers=['CPUExecutionProvider'])
sample, classes = np.load(folder / 'sample.npz'), json.loads(session.get_modelmeta().custom_metadata_map['classes'])
[found] = session.run(None, {'images': sample['images']})  # uint8 [N, H, W, C] -> float32 [N, classes]
print(f'first image: {classes[found[0].argmax()]!r}')
print('largest difference:', abs(found - sample['probabilities']).max())
"""


def write(classifier: Classifier, folder: pathlib.Path) -> Artefact:
  """Writes `googlenet.onnx`, which ONNX's own checker accepts.

  Args:
    classifier: a run, or an ensemble, whose members become one graph.
    folder: gets the file.

  Raises:
    UserError: the file would be too large.
  """
  path = folder / FILE
  save(make_model(classifier), path)
  producer = f'{PRODUCER} {__version__}'
  return Artefact(
    files={FILE: 'the preparation of images, the network, and softmax'},
    run=runner(path),
    tolerance=artefact.TOLERANCE,
    example=EXAMPLE,
    needs=artefact.pinned('onnxruntime', 'numpy'),
    facts={'opset': OPSET, 'ir_version': IR_VERSION, 'producer': producer, 'precision': 'float32'},
  )


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
  artefact.check_size(graph.nbytes, 'onnx')
  preparation = runs.preparation(config, channels)
  text = (
    f'GoogLeNet, recipe {one_line(config.name)}: probabilities of {len(classifier.classes)} classes for uint8 images '
    f'of any size [N, H, W, {channels}]. The nodes prepare/ are the preparation of images: {preparation}.'
  )
  output = Value(onnx_network.PROBABILITIES, FLOAT, ('N', len(classifier.classes)))
  model = graph.model('googlenet', text, [images], [output])
  properties = {'classes': list(classifier.classes), 'preparation': preparation}
  for key, value in properties.items():
    model.metadata_props.add(key=key, value=json.dumps(value))  # in ASCII: names of classes may be no text
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
