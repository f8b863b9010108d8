"""The training state: made, and read back from a checkpoint."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh

from googlenet_jax.host import checkpoints, console, sharding
from googlenet_jax.host.errors import UserError
from googlenet_jax.model import auxiliary_classifiers, googlenet
from googlenet_jax.model.options import Options
from googlenet_jax.recipe import initial_seed, sampling_seed


class TrainState(struct.PyTreeNode):
  """All that changes while training; restoring it and the step gives the same run, bit for bit on a CPU."""

  step: jax.Array  # int32, steps taken
  params: Any
  batch_stats: Any  # running means and variances; empty without batch normalisation
  opt_state: optax.OptState
  metrics: dict[str, jax.Array]  # sums since the epoch began, on the device
  averaged: Any  # params and batch_stats, averaged over the steps; empty without
  seed: jax.Array  # int32, of augmentation and dropout: an argument, so that every member runs the same program


def empty_metrics(auxiliary: str = 'none') -> dict[str, jax.Array]:
  """Sums over no examples; `bad_step` is the first step whose loss was not finite, -1 for none.

  `loss` is that of the logits. With auxiliary classifiers there are also theirs, `aux_4a` and `aux_4d`, and the `total`
  that is minimised.
  """
  parts = () if auxiliary == 'none' else ('total', *auxiliary_classifiers.AFTER)
  return {
    'loss': jnp.zeros((), jnp.float32),
    **{name: jnp.zeros((), jnp.float32) for name in parts},
    'correct': jnp.zeros((), jnp.int32),
    'count': jnp.zeros((), jnp.int32),
    'bad_step': jnp.full((), -1, jnp.int32),
  }


def create_state(
  config: Any, num_classes: int, channels: int, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
  """Makes the network and its first state, the same for a seed, whole on every device of the mesh."""
  model = googlenet.GoogLeNet(
    num_classes,
    channels,
    Options(**config.model),
    image_size=config.image_size,
    dtype=jnp.dtype(config.dtype),
    axis_name=sharding.AXIS,
    rngs=nnx.Rngs(initial_seed(config)),
  )
  graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  params, batch_stats = nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)
  opt_state = jax.jit(tx.init)(params)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    metrics=empty_metrics(config.model.auxiliary),
    averaged=jax.tree.map(jnp.copy, {'params': params, 'batch_stats': batch_stats}) if config.average_decay else {},
    seed=jnp.int32(sampling_seed(config)),
  )
  return graphdef, sharding.replicate(state, mesh)


def for_prediction(state: TrainState) -> tuple[Any, Any]:
  """`params` and `batch_stats` that predict: the averaged ones where there are any."""
  chosen = state.averaged or {'params': state.params, 'batch_stats': state.batch_stats}
  return chosen['params'], chosen['batch_stats']


def abstract(state: TrainState) -> TrainState:
  """Shapes, dtypes and shardings of a state: enough to compile for it, or to read one back into."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


# What a checkpoint holds, in two items: evaluation reads the first and need not know the optimizer.
ITEMS = {'network': ('step', 'params', 'batch_stats', 'averaged'), 'training': ('opt_state', 'metrics', 'seed')}


def items(state: TrainState) -> dict[str, Any]:
  """A state as the items of a checkpoint."""
  return {item: {field: getattr(state, field) for field in fields} for item, fields in ITEMS.items()}


def restore(
  saved: checkpoints.Checkpoints, state: TrainState, step: int | None = None, only: str | None = None
) -> tuple[TrainState, dict[str, Any]] | None:
  """Reads a checkpoint back, with what was saved beside it.

  Damaged checkpoints newer than the one read are deleted, unless `saved` is to read only: Orbax saves no step that it
  has, nor one before, and the run would find them damaged for ever.

  Args:
    saved: the checkpoints of a run.
    state: of the same shapes; gives what is not read.
    step: which checkpoint; None for the newest that is whole.
    only: the item to read; None for all.

  Returns:
    The state and its `meta`, or None where there is no checkpoint at all.

  Raises:
    UserError: no checkpoint of that step, or there are checkpoints and every one is damaged.
  """
  steps = saved.steps()
  if step is not None:
    if step not in steps:
      raise UserError(f'there is no checkpoint of step {step} in {saved.directory}: there are {steps or "none"}')
    steps = [step]
  wanted = {item: tree for item, tree in items(abstract(state)).items() if only in (None, item)}
  damaged = {}
  for step in steps:
    try:
      found, meta = saved.restore(wanted, step)
    except checkpoints.DamagedError as error:
      damaged[step] = error
      continue
    for bad, error in damaged.items():
      console.say(f'warning: {error}' + ('' if saved.read_only else f'; deleted, step {step} is whole'))
      if not saved.read_only:
        saved.delete(bad)
    return state.replace(**{field: value for tree in found.values() for field, value in tree.items()}), meta
  for error in damaged.values():
    console.say(f'warning: {error}')
  if steps:
    raise UserError(f'every checkpoint tried in {saved.directory} is damaged: move that folder away to start anew')
  return None
