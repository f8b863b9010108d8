"""A few long arrays instead of hundreds of small ones, so an update of the optimizer is a few programs on the device.

A network with batch normalisation has 173 parameters and 114 statistics. Momentum and averages double or treble that. A
GPU may need longer to start a program for each than to do the arithmetic. Whether packing pays is not measured yet:
`python -m experiments.gpu --stages=best` tells.

The operations are the same for every element. Only the norm for `clip_norm` is summed in another order. Compiled, the
results differ by rounding: XLA rounds a product and a sum once where it fuses them, and it fuses other ones. A recipe
that freezes stages or has another learning rate for the body is not packed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.tree_util import PyTreeDef

from googlenet_jax.training.state import TrainState


class Packed(struct.PyTreeNode):
  """The leaves of a tree, end to end. It is a tree itself: an optimizer takes it as parameters."""

  # Kernels are one row: like kernels, and unlike biases, they have more than one axis, so they decay.
  kernels: jax.Array  # [1, N]: leaves with two axes or more
  others: jax.Array  # [M]: the other leaves
  layout: tuple[PyTreeDef, tuple[tuple[int, ...], ...]] = struct.field(pytree_node=False)  # structure, shapes


def pack(tree: Any) -> Packed:
  """Packs a tree of arrays of one dtype; `unpack` undoes it."""
  leaves, structure = jax.tree.flatten(tree)
  # One operation: jnp.concatenate would make one of every 16 arrays, and another of those.
  end_to_end = lambda chosen: lax.concatenate([leaf.ravel() for leaf in chosen], 0) if chosen else jnp.zeros(0)
  kernels = end_to_end([leaf for leaf in leaves if leaf.ndim > 1])
  others = end_to_end([leaf for leaf in leaves if leaf.ndim <= 1])
  return Packed(kernels[None], others, (structure, tuple(leaf.shape for leaf in leaves)))


def unpack(packed: Packed) -> Any:
  """Returns the tree that was packed."""
  structure, shapes = packed.layout
  rest = {True: packed.kernels[0], False: packed.others}
  place, leaves = {True: 0, False: 0}, []
  for shape in shapes:
    kind, size = len(shape) > 1, math.prod(shape)
    leaves.append(rest[kind][place[kind] : place[kind] + size].reshape(shape))
    place[kind] += size
  return jax.tree.unflatten(structure, leaves)


def pack_state(state: TrainState) -> TrainState:
  """Packs parameters, batch statistics, their averages, and what the optimizer keeps for each parameter."""
  params = jax.tree.structure(state.params)
  like_params = lambda tree: jax.tree.structure(tree) == params
  return state.replace(
    params=pack(state.params),
    batch_stats=pack(state.batch_stats),
    opt_state=jax.tree.map(
      lambda tree: pack(tree) if like_params(tree) else tree, state.opt_state, is_leaf=like_params
    ),
    averaged={name: pack(tree) for name, tree in state.averaged.items()},
  )


def unpack_state(state: TrainState) -> TrainState:
  """Undoes `pack_state`."""
  is_packed = lambda node: isinstance(node, Packed)
  return jax.tree.map(lambda node: unpack(node) if is_packed(node) else node, state, is_leaf=is_packed)
