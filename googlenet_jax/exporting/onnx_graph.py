"""Collects the nodes and weights of an ONNX graph, and makes a model of them."""

import copy
import dataclasses
from typing import Any

import numpy as np

# The oldest operators that the network and its quantised form need: opset 13 gave DequantizeLinear an axis, for one
# scale per channel. Older programs read older versions only: these two are read since onnxruntime 1.6 (2020).
OPSET, IR_VERSION = 13, 7
NUMBERS = {'float32': 'FLOAT', 'uint8': 'UINT8'}  # types of inputs and outputs, and ONNX's names of them


@dataclasses.dataclass(frozen=True)
class Value:
  """An input or output of a graph."""

  name: str
  dtype: str  # a key of NUMBERS
  shape: tuple[int | str, ...]  # a text names a length that differs from call to call


class Graph:
  """The nodes of a graph, in the order of computing, and its weights.

  A node computes one value, which has the name of the node.
  """

  def __init__(self):
    """Makes an empty graph."""
    self.nodes: list[tuple[str, str, tuple[str, ...], dict[str, Any]]] = []  # operator, name, inputs, attributes
    self.weights: dict[str, np.ndarray] = {}
    self._prefix = ''

  def within(self, part: str) -> 'Graph':
    """Returns this graph with `part/` before the names that are added; an empty part changes nothing."""
    other = copy.copy(self)
    other._prefix = f'{self._prefix}{part}/' if part else self._prefix
    return other

  def add(self, operator: str, name: str, *inputs: str, **attributes: Any) -> str:
    """Adds a node, and returns the name of its value."""
    self.nodes.append((operator, self._prefix + name, inputs, attributes))
    return self._prefix + name

  def weight(self, name: str, values: Any, dtype: Any = np.float32) -> str:
    """Adds a constant array, and returns its name."""
    self.weights[self._prefix + name] = np.asarray(values, dtype)
    return self._prefix + name

  @property
  def nbytes(self) -> int:
    """Bytes of the weights: nearly the size of the file."""
    return sum(array.nbytes for array in self.weights.values())

  def model(self, name: str, text: str, inputs: list[Value], outputs: list[Value]) -> Any:
    """Makes the `onnx.ModelProto`.

    Args:
      name: name of the graph.
      text: what the graph computes, for a reader.
      inputs: its inputs.
      outputs: its outputs; each is the value of a node.
    """
    from onnx import TensorProto, helper, numpy_helper

    def described(value):
      return helper.make_tensor_value_info(value.name, getattr(TensorProto, NUMBERS[value.dtype]), value.shape)

    graph = helper.make_graph(
      [helper.make_node(op, inputs, [name], name, **attributes) for op, name, inputs, attributes in self.nodes],
      name,
      [*map(described, inputs)],
      [*map(described, outputs)],
      [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
      doc_string=text,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION)
