"""Collects the nodes and weights of an ONNX graph, and makes a model of them."""

import copy
from typing import Any, NamedTuple

import numpy as np

# The oldest operators that the network and its quantised form need: opset 13 gave DequantizeLinear an axis, for one
# scale per channel. Older programs read older versions only: these two are read since onnxruntime 1.6 (2020).
OPSET, IR_VERSION = 13, 7
FLOAT, HALF, UINT8 = 1, 10, 2  # ONNX's numbers for float32, float16 and uint8


class Value(NamedTuple):
  """An input or output of a graph."""

  name: str
  dtype: int  # FLOAT or UINT8
  shape: tuple[int | str, ...]  # a text names a length that differs from call to call


class Graph:
  """The nodes of a graph, in the order of computing, and its weights.

  A node computes one value, which has the name of the node.
  """

  def __init__(self):
    """Makes an empty graph."""
    self.nodes: list[tuple[str, str, tuple[str, ...], dict[str, Any]]] = []  # operator, name, inputs, attributes
    self.weights: dict[str, np.ndarray] = {}
    self.dtype = np.float32  # weights that are added get it
    self._prefix = ''

  def within(self, part: str) -> 'Graph':
    """Returns this graph with `part/` before the names that are added; an empty part changes nothing."""
    other = copy.copy(self)
    other._prefix = f'{self._prefix}{part}/' if part else self._prefix
    return other

  def in_half(self) -> 'Graph':
    """Returns this graph with float16 as the type of the weights that are added."""
    other = copy.copy(self)
    other.dtype = np.float16
    return other

  def add(self, operator: str, name: str, *inputs: str, **attributes: Any) -> str:
    """Adds a node, and returns the name of its value."""
    self.nodes.append((operator, self._prefix + name, inputs, attributes))
    return self._prefix + name

  def weight(self, name: str, values: Any, dtype: Any = None) -> str:
    """Adds a constant array, by default of the type `dtype` of the graph, and returns its name."""
    with np.errstate(over='ignore'):  # what is too large for float16 becomes infinite, and the check refuses it
      self.weights[self._prefix + name] = np.asarray(values, dtype or self.dtype)
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
    from onnx import helper, numpy_helper

    graph = helper.make_graph(
      [helper.make_node(op, inputs, [name], name, **attributes) for op, name, inputs, attributes in self.nodes],
      name,
      [helper.make_tensor_value_info(*value) for value in inputs],
      [helper.make_tensor_value_info(*value) for value in outputs],
      [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
      doc_string=text,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION)
