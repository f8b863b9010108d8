"""`--to=onnx`: one file with the preparation of images, the network or the networks of an ensemble, and softmax."""

import pathlib

from googlenet_jax import __version__
from googlenet_jax.classifier import Classifier
from googlenet_jax.exporting import onnx_model, onnx_precision
from googlenet_jax.exporting.artefact import TOLERANCE, Artefact, Pictures, pinned
from googlenet_jax.exporting.onnx_graph import IR_VERSION, OPSET

FILE = 'googlenet.onnx'
EXAMPLE = """\
import json
import pathlib

import numpy as np
import onnxruntime

folder = pathlib.Path(__file__).parent
session = onnxruntime.InferenceSession(str(folder / 'googlenet.onnx'), providers=['CPUExecutionProvider'])
sample, classes = np.load(folder / 'sample.npz'), json.loads(session.get_modelmeta().custom_metadata_map['classes'])
[found] = session.run(None, {'images': sample['images']})  # uint8 [N, H, W, C] -> float32 [N, classes]
print('first image:', classes[found[0].argmax()])
print('largest difference:', abs(found - sample['probabilities']).max())
"""


def write(classifier: Classifier, folder: pathlib.Path, pictures: Pictures, precision: str = 'float32') -> Artefact:
  """Writes `googlenet.onnx`, which ONNX's own checker accepts.

  Args:
    classifier: a run, or an ensemble, whose members become one graph.
    folder: gets the file.
    pictures: real images.
    precision: 'float32'; or 'float16' or 'int8', which need the test split and measure what they cost in accuracy.

  Raises:
    UserError: the file would be too large, the test split is missing that `precision` needs, or the graph in float32
      answers otherwise than we do.
  """
  path, tolerance = folder / FILE, TOLERANCE
  onnx_model.save(onnx_model.make_model(classifier), path)
  producer = f'{onnx_model.PRODUCER} {__version__}'
  facts = {'opset': OPSET, 'ir_version': IR_VERSION, 'producer': producer, 'precision': precision}
  if precision != 'float32':
    facts |= onnx_precision.reduce(path, precision, classifier, pictures)
    tolerance = onnx_precision.TOLERANCES[precision]
  return Artefact((FILE,), onnx_model.runner(path), tolerance, EXAMPLE, pinned('onnxruntime', 'numpy'), facts)
