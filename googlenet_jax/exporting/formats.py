"""The formats of an export, by their names in flags. It imports nothing heavy: `main.py` reads it when it starts."""

from typing import NamedTuple


class Format(NamedTuple):
  """A format, and what makes it."""

  module: str  # a module of this package with `write(classifier, folder) -> Artefact`
  packages: tuple[str, ...]  # that writing needs beside those of every run
  what: str  # for a reader
  runs_on: str


FORMATS = {
  'stablehlo': Format('stablehlo', (), 'StableHLO, written by jax.export', 'JAX'),
  'onnx': Format('onnx_files', ('onnx', 'onnxruntime'), 'ONNX', 'ONNX Runtime, and other programs that read ONNX'),
  'torch': Format('torch_files', ('torch', 'safetensors'), 'weights, and the network as a Python file', 'PyTorch'),
}
PRECISIONS = ('float32', 'float16', 'int8')  # the last two are for ONNX only
