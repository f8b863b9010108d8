"""The network as ONNX operators, written from the network's own layers. Maps are `[N, C, H, W]`, as ONNX wants them.

A stage's output has the name of the stage in our network, such as `inception_3a`, `head` and `logits`. Dropout and
auxiliary classifiers are for training, and left out.
"""

import numpy as np

from googlenet_jax.exporting.onnx_graph import FLOAT, HALF, Graph
from googlenet_jax.model import googlenet
from googlenet_jax.model.googlenet import GoogLeNet, Inception
from googlenet_jax.model.layers import Conv, Linear

PROBABILITIES = 'probabilities'  # the output of the file, or of a member
PADDED = {'kernel_shape': [3, 3], 'pads': [1, 1, 1, 1]}  # the window of every pool but torchvision's between stages


def add_network(graph: Graph, network: GoogLeNet, x: str, half: bool = False) -> str:
  """Adds a network to a graph.

  Args:
    graph: is added to.
    network: with its weights.
    x: name of prepared images, float32 `[N, C, image_size, image_size]`.
    half: whether weights and maps are float16; input and probabilities are float32 nevertheless.

  Returns:
    Name of the probabilities, float32 `[N, num_classes]`.
  """
  options, pools = network.options, iter(range(1, 6))

  def halve(x, window=3):
    own = {'kernel_shape': [window, window], 'ceil_mode': 1} if options.pool == 'torchvision' else PADDED
    return graph.add('MaxPool', f'pool{next(pools)}', x, strides=[2, 2], **own)

  if half:
    graph = graph.in_half()
    x = graph.add('Cast', 'half', x, to=HALF)
  x = _add_conv(graph, 'conv1', network.conv1, x)
  if options.stem == 'article':
    x = halve(x)
  if options.norm == 'lrn':
    x = _add_response_norm(graph, 'norm1', x)
  x = _add_conv(graph, 'conv2_reduce', network.conv2_reduce, x)
  x = _add_conv(graph, 'conv2', network.conv2, x)
  if options.norm == 'lrn':
    x = _add_response_norm(graph, 'norm2', x)
  x = halve(x)
  for name in googlenet.TABLE:
    x = _add_inception(graph, name, getattr(network, name), x)
    if name in googlenet.POOL_AFTER:
      x = halve(x, googlenet.POOL_AFTER[name])
  if network.hidden is None:
    x = graph.add('Flatten', 'head', graph.add('GlobalAveragePool', 'average_pool', x))
  else:
    x = graph.add('Flatten', 'flatten', x)
    x = graph.add('Relu', 'head', _add_linear(graph, 'hidden', network.hidden, x))
  x = _add_linear(graph, 'logits', network.logits, x)
  if half:
    x = graph.add('Cast', 'logits/float', x, to=FLOAT)
  return graph.add('Softmax', PROBABILITIES, x, axis=1)


def _add_inception(graph: Graph, name: str, block: Inception, x: str) -> str:
  """Adds the four branches of a block, and joins them."""
  own = graph.within(name)
  conv = lambda branch, x: _add_conv(own, branch, getattr(block, branch), x)
  naive = block.pool_proj is None
  branch1 = conv('ch1x1', x)
  branch2 = conv('ch3x3', x if naive else conv('ch3x3_reduce', x))
  branch3 = conv('ch5x5', x if naive else conv('ch5x5_reduce', x))
  branch4 = own.add('MaxPool', 'pool', x, strides=[1, 1], **PADDED)
  if not naive:
    branch4 = conv('pool_proj', branch4)
  return graph.add('Concat', name, branch1, branch2, branch3, branch4, axis=1)


def _add_conv(graph: Graph, name: str, layer: Conv, x: str) -> str:
  """Adds a convolution and its ReLU."""
  kernel, bias = folded(layer)
  own, side = graph.within(name), kernel.shape[-1]
  weights = own.weight('kernel', kernel), own.weight('bias', bias)
  shape = {'kernel_shape': [side, side], 'pads': [side // 2] * 4, 'strides': [layer.stride] * 2}
  return graph.add('Relu', name, own.add('Conv', 'conv', x, *weights, **shape))


def folded(layer: Conv) -> tuple[np.ndarray, np.ndarray]:
  """Returns kernel `[out, in, k, k]` and bias `[out]` of a convolution, with its batch normalisation inside them."""
  kernel = np.asarray(layer.kernel[...], np.float64)
  if layer.norm is None:
    bias = np.asarray(layer.bias[...])
  else:
    norm = {name: np.asarray(getattr(layer.norm, name)[...], np.float64) for name in ('scale', 'bias', 'mean', 'var')}
    factor = norm['scale'] / np.sqrt(norm['var'] + layer.norm.epsilon)
    kernel, bias = kernel * factor, norm['bias'] - norm['mean'] * factor
  return kernel.transpose(3, 2, 0, 1).astype(np.float32), bias.astype(np.float32)


def _add_response_norm(graph: Graph, name: str, x: str) -> str:
  """Adds the local response normalisation of `normalisation.local_response_norm`."""
  norm = lambda graph, name, x: graph.add('LRN', name, x, size=5, alpha=1e-4, beta=0.75, bias=1.0)
  if graph.dtype != np.float16:
    return norm(graph, name, x)
  own = graph.within(name)  # in float32: it squares, and float16 ends at the square of 256
  x = norm(own, 'LRN', own.add('Cast', 'float', x, to=FLOAT))
  return graph.add('Cast', name, x, to=HALF)


def _add_linear(graph: Graph, name: str, layer: Linear, x: str) -> str:
  own = graph.within(name)
  return graph.add('Gemm', name, x, own.weight('kernel', layer.kernel[...]), own.weight('bias', layer.bias[...]))
