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
from googlenet_jax.exporting import onnx_network, onnx_preparing
from googlenet_jax.exporting.artefact import Artefact, Pictures
from googlenet_jax.exporting.onnx_graph import IR_VERSION, OPSET, Graph, Value
from googlenet_jax.host.errors import UserError

FILE = 'googlenet.onnx'
PRODUCER = 'googlenet_jax'
PRECISIONS = ('float32', 'float16', 'int8')
TOLERANCE = 1e-4  # the largest difference of a probability in float32
LARGEST = 2**31 - 2**20  # bytes; a file of the format ends below 2 GiB, and the graph needs a few
EXAMPLE = """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession('googlenet.onnx', providers=['CPUExecutionProvider'])
sample = np.load('sample.npz')
probabilities, = session.run(None, {'image': sample['image']})  # uint8 [N, H, W, C] -> float32 [N, classes]
print('largest difference', abs(probabilities - sample['probabilities']).max())
"""


def write(classifier: Classifier, folder: pathlib.Path, pictures: Pictures, precision: str = 'float32') -> Artefact:
  """Writes `googlenet.onnx`, which ONNX's own checker accepts.

  Args:
    classifier: a run, or an ensemble, whose members become one graph.
    folder: is there, and gets the file.
    pictures: real images.
    precision: one of PRECISIONS. 'float16' and 'int8' need the test split, and measure what they cost in accuracy.

  Raises:
    UserError: a package is missing, the file would be too large, or the data is not here that `precision` needs.
  """
  onnx, onnxruntime = packages()
  model = make_model(classifier)
  onnx.checker.check_model(model, full_check=True)
  facts = {'opset': OPSET, 'ir_version': IR_VERSION, 'producer': f'{PRODUCER} {__version__}', 'precision': precision}
  facts |= {'onnx_checker': f'passed, onnx {onnx.__version__}', 'nodes': len(model.graph.node)}
  path, tolerance = folder / FILE, TOLERANCE
  path.write_bytes(model.SerializeToString())
  if precision != 'float32':
    from googlenet_jax.exporting import onnx_precision

    facts |= onnx_precision.reduce(path, precision, classifier, pictures)
    tolerance = onnx_precision.TOLERANCES[precision]
  return Artefact(
    (FILE,), runner(path), tolerance, EXAMPLE, (f'onnxruntime=={onnxruntime.__version__}', 'numpy'), facts
  )


def packages() -> tuple[Any, Any]:
  """Returns the modules onnx and onnxruntime.

  Raises:
    UserError: one of them is missing.
  """
  try:
    import onnx
    import onnxruntime
  except ImportError as error:
    raise UserError("--to=onnx needs the packages onnx and onnxruntime: pip install -e '.[onnx]'") from error
  return onnx, onnxruntime


def make_model(classifier: Classifier) -> Any:
  """Returns the `onnx.ModelProto` of a classifier.

  Raises:
    UserError: it would be larger than a file of the format can be.
  """
  graph, config, options = Graph(), classifier.recipe, classifier.shape.options
  image = Value('image', 'uint8', ('N', 'H', 'W', classifier.channels))
  augment = config.augment
  prepared = onnx_preparing.add_preparation(
    graph, image.name, config.image_size, augment.padding, augment.resize, options, classifier.channels
  )
  members = []
  for number, variables in enumerate(classifier.networks):
    own = graph.within(f'member_{number}' if len(classifier.networks) > 1 else '')
    members.append(onnx_network.add_network(own, nnx.merge(classifier.graphdef, *variables), prepared))
  if len(members) > 1:
    graph.add('Mean', onnx_network.PROBABILITIES, *members)
  if graph.nbytes > LARGEST:
    raise UserError(
      f'the onnx file would have {graph.nbytes / 2**30:.1f} GiB, and the format takes 2 at most: '
      'export the members of the ensemble one at a time, or choose another format'
    )
  preparation = runs.preparation(config, classifier.channels)
  text = (
    f'GoogLeNet, recipe {config.name}: probabilities of {len(classifier.classes)} classes for uint8 images '
    f'[N, H, W, {classifier.channels}] of any size. The preparation of images is part of the graph: {preparation}.'
  )
  output = Value(onnx_network.PROBABILITIES, 'float32', ('N', len(classifier.classes)))
  model = graph.model('googlenet', text, [image], [output])
  describe(model, {'classes': list(classifier.classes), 'preparation': preparation})
  return model


def describe(model: Any, properties: dict[str, Any]) -> None:
  """Writes the producer and properties, each as JSON, into a model."""
  model.producer_name, model.producer_version = PRODUCER, __version__
  del model.metadata_props[:]
  for key, value in properties.items():
    model.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))


def runner(path: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function that runs a file by onnxruntime: uint8 `[N, H, W, C]` to probabilities `[N, num_classes]`."""
  _, onnxruntime = packages()
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # errors only: warnings would stand among our lines
  session = onnxruntime.InferenceSession(os.fspath(path), options, providers=['CPUExecutionProvider'])
  return lambda images: session.run(None, {'image': images})[0]
