"""The training state: what changes from step to step, made anew or read from a checkpoint."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from googlenet_jax.data.random_keys import sampling_seed
from googlenet_jax.host import checkpoints, sharding
from googlenet_jax.model.googlenet import make_network, split, stages_up_to


class TrainState(struct.PyTreeNode):
  """All that changes while training. A run restored from it continues bit for bit on a CPU."""

  step: jax.Array  # int32, steps taken
  params: Any
  batch_stats: Any  # running means and variances; empty without batch normalisation
  opt_state: optax.OptState  # for the parameters that are trained
  averaged: Any  # params and batch_stats, averaged over the steps; empty without averaging
  seed: jax.Array  # int32, seed of augmentation and dropout: an argument, so all members run the same program


def initial_seed(config: ConfigDict) -> int:
  """Returns the seed of the initial weights: by default the same for every member of an ensemble, as in the paper."""
  same = config.ensemble.initial_weights == 'same'
  return config.seed if same else sampling_seed(config.seed, config.ensemble.member)


def create_state(
  config: ConfigDict, num_classes: int, channels: int, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
  """Makes the network and its first state, whole on every device of the mesh; the same for the same seed."""
  model = make_network(config, num_classes, channels, nnx.Rngs(initial_seed(config)))
  graphdef, params, batch_stats = split(model)

  @jax.jit  # one program; `jnp.copy` by itself would compile one for each shape
  def rest(params, batch_stats):
    averaged = {'params': params, 'batch_stats': batch_stats} if config.average_decay else {}
    return tx.init(partition(params, config.freeze)[0]), jax.tree.map(jnp.copy, averaged)

  opt_state, averaged = rest(params, batch_stats)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    averaged=averaged,
    seed=jnp.int32(sampling_seed(config.seed, config.ensemble.member)),
  )
  return graphdef, sharding.replicate(state, mesh)


def partition(params: Any, freeze: str) -> tuple[Any, Any]:
  """Splits parameters into those that are trained and those that are frozen.

  Args:
    params: parameters by stage; without frozen stages any tree.
    freeze: see `GoogLeNet.end_points`.

  Returns:
    Both parts. Together, `{**trained, **frozen}`, they are `params`. Without frozen stages `params` and an empty dict.
  """
  if not freeze:
    return params, {}
  frozen = {name: params[name] for name in stages_up_to(freeze) if name in params}
  return {name: part for name, part in params.items() if name not in frozen}, frozen


def networks(state: TrainState) -> list[tuple[Any, Any]]:
  """Returns `(params, batch_stats)` that predict: the averaged ones first, if there are any, then the raw ones."""
  averaged = [(state.averaged['params'], state.averaged['batch_stats'])] if state.averaged else []
  return [*averaged, (state.params, state.batch_stats)]


def with_statistics(state: TrainState, batch_stats: list[Any], mesh: Mesh) -> TrainState:
  """Returns the state with other batch statistics, one tree for each of `networks`."""
  *averaged, raw = sharding.replicate(batch_stats, mesh)
  if averaged:
    state = state.replace(averaged={**state.averaged, 'batch_stats': averaged[0]})
  return state.replace(batch_stats=raw)


def abstract(state: Any) -> Any:
  """Returns shapes, dtypes and shardings of a state, which are enough to restore one."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


# What a checkpoint holds, in two items: prediction reads the first and need not know the optimizer.
ITEMS = {'network': ('step', 'params', 'batch_stats', 'averaged'), 'training': ('opt_state', 'seed')}


def items(state: TrainState) -> dict[str, Any]:
  """Returns a state as the items of a checkpoint."""
  return {item: {field: getattr(state, field) for field in fields} for item, fields in ITEMS.items()}


def restore(saved: checkpoints.Checkpoints, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
  """Reads the newest whole checkpoint back, with its `meta`; None if there is no checkpoint.

  Raises:
    UserError: there are checkpoints and every one is damaged.
  """
  restored = saved.restore_whole(items(abstract(state)))
  if restored is None:
    return None
  found, meta = restored
  return state.replace(**{field: value for tree in found.values() for field, value in tree.items()}), meta
