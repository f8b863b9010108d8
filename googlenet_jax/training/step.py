"""The training step: forward, backward, update, on every device at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from googlenet_jax.data import augment, random_keys
from googlenet_jax.host import sharding
from googlenet_jax.training import optimizers
from googlenet_jax.training.loss import loss_fn
from googlenet_jax.training.metrics import Metrics
from googlenet_jax.training.state import TrainState, partition


def gradients(grad_fn, params, batch_stats, batch, keys, parts: int):
  """Computes the gradient of a batch, at once or in micro-batches one after another.

  Micro-batch i holds every example whose position is i modulo `parts`. Each device has an equal share of it.

  Args:
    grad_fn: `jax.grad(loss_fn, has_aux=True)` with the network and the recipe filled in.
    params: as for `loss_fn`.
    batch_stats: as for `loss_fn`.
    batch: as for `loss_fn`.
    keys: typed keys, one per example.
    parts: number of micro-batches.

  Returns:
    Running statistics, mean gradients, mean losses, number of right answers.
  """
  if parts == 1:
    grads, (batch_stats, losses, correct) = grad_fn(params, batch_stats, batch, keys)
    return batch_stats, grads, losses, correct

  def accumulate(carry, part):
    batch_stats, *sums = carry
    grads, (batch_stats, *values) = grad_fn(params, batch_stats, *part)
    return (batch_stats, *jax.tree.map(jnp.add, sums, [grads, *values])), None

  split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), (batch, keys))
  grads, (_, *values) = jax.eval_shape(grad_fn, params, batch_stats, *jax.tree.map(lambda a: a[0], split))
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), [grads, *values])
  (batch_stats, grads, losses, correct), _ = lax.scan(accumulate, (batch_stats, *zeros), split)
  return batch_stats, *jax.tree.map(lambda a: a / parts, (grads, losses)), correct


def update(
  state: TrainState, batch_stats: Any, grads: Any, tx: optax.GradientTransformation, config: ConfigDict
) -> TrainState:
  """Returns the state after one update of the optimizer, with averaged weights where the recipe has them."""
  trained, frozen = partition(state.params, config.freeze)
  updates, opt_state = tx.update(grads, state.opt_state, trained)
  params = optax.apply_updates(trained, updates)
  if frozen:
    params = {**params, **frozen}
  averaged = state.averaged
  if averaged:
    move = 1 - optimizers.average_decay(state.step, config.average_decay)
    new = {'params': params, 'batch_stats': batch_stats}
    averaged = jax.tree.map(lambda old, new: old + move.astype(old.dtype) * (new - old), averaged, new)
  return state.replace(
    step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, averaged=averaged
  )


def unless_nonfinite(old: TrainState, new: TrainState, grads: Any, metrics: Metrics) -> tuple[TrainState, Metrics]:
  """Returns the state and metrics of an update; if its loss or gradient is not finite, only the step counts.

  The optimizer counts the step too: its learning rate is that of the step.
  """
  good = jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((metrics.losses, grads))]))
  keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(good, new, old))
  metrics = keep(metrics, jax.tree.map(jnp.zeros_like, metrics))
  kept = old.replace(step=new.step, opt_state=optax.tree_utils.tree_set(old.opt_state, count=new.step))
  return keep(new, kept), metrics.replace(skipped=1 - good.astype(jnp.int32))


def _make_step(
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  config: ConfigDict,
  steps_per_epoch: int,
  class_weights: np.ndarray | None,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns the step `(state, batch) -> (state, metrics)`."""
  loss = functools.partial(loss_fn, graphdef=graphdef, config=config, class_weights=class_weights)

  def step(state, batch):
    count = batch['label'].shape[0]
    keys = random_keys.example_keys(state.seed, state.step, jnp.arange(count))
    batch = augment.with_mirrored(batch, state.seed, state.step // steps_per_epoch, config.augment)
    trained, frozen = partition(state.params, config.freeze)
    grad_fn = jax.grad(lambda trained, *others: loss({**trained, **frozen}, *others), has_aux=True)
    batch_stats, grads, losses, correct = gradients(
      grad_fn, trained, state.batch_stats, batch, keys, config.micro_batches
    )
    metrics = Metrics(jax.tree.map(lambda loss: loss * count, losses), correct, jnp.int32(count))
    new = update(state, batch_stats, grads, tx, config)
    return unless_nonfinite(state, new, grads, metrics) if config.skip_nonfinite else (new, metrics)

  return step


def make_train_step(
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  config: ConfigDict,
  mesh: Mesh,
  steps_per_epoch: int,
  class_weights: np.ndarray | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Builds the jitted step `(state, batch) -> (state, metrics)`; the state given is donated.

  The step is written for the whole batch. The batch is cut over the devices of the mesh, and XLA adds what the devices
  have to exchange: batch statistics, gradients and losses. N devices compute what one computes, except for the order of
  floating point sums. The same step in the idiom of `pmap` (`shard_map`, with means over the axis by hand) was as fast,
  as exact, and longer. Only with micro-batches on several CPU devices it exchanged less: it added the gradients of all
  micro-batches before the exchange. In programs for a GPU XLA does that by itself (docs/scaling.md).
  """
  step = _make_step(graphdef, tx, config, steps_per_epoch, class_weights)
  whole, cut = sharding.whole(mesh), sharding.cut(mesh)
  return jax.jit(step, in_shardings=(whole, cut), out_shardings=whole, donate_argnums=0)


def make_train_steps(
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  config: ConfigDict,
  mesh: Mesh,
  steps_per_epoch: int,
  class_weights: np.ndarray | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Builds several steps in one call: `(state, data, indices) -> (state, metrics)`; the state given is donated.

  The data set lies on the devices, and each step gathers its batch there. The host starts one program for all steps.
  On a CPU the results for grey images are those of `make_train_step`, bit for bit. For coloured ones XLA takes another
  form of the first layer's gradient inside a loop, which rounds differently.

  On one H200 several steps in a call more than doubled the speed of `configs/fashion_best.py`. To hold all parameters
  in a few long arrays as well, for fewer programs in the update, made no difference.

  Args:
    graphdef: the network.
    tx: the optimizer.
    config: the recipe.
    mesh: devices that share a batch.
    steps_per_epoch: for random choices that depend on the epoch.
    class_weights: see `loss.weights_of_classes`.

  Returns:
    Jitted function. `data` is the whole training set, a dict of arrays `[N, ..]`, whole on every device. `indices` is
    int32 `[steps, B]`, cut along B. Metrics have a leading axis `[steps]`.
  """
  step = _make_step(graphdef, tx, config, steps_per_epoch, class_weights)
  whole, cut, cut_steps = sharding.whole(mesh), sharding.cut(mesh), sharding.cut_steps(mesh)

  def steps(state, data, indices):
    def take_one(state, index):
      gathered = {name: array.at[index].get(mode='promise_in_bounds') for name, array in data.items()}
      batch = {**gathered, 'index': index}
      return step(state, lax.with_sharding_constraint(batch, cut))

    return lax.scan(take_one, state, indices)

  return jax.jit(steps, in_shardings=(whole, whole, cut_steps), out_shardings=whole, donate_argnums=0)
