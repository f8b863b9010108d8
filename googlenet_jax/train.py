"""Training: the step and the loop, to be read from top to bottom."""

import collections
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from googlenet_jax import augment, checkpoints, datasets, input_pipeline, optimizers, parallel
from googlenet_jax import config as config_lib
from googlenet_jax.report import Report
from googlenet_jax.signals import StopRequest
from googlenet_jax.state import create_state, empty_metrics, items, restore

DROPOUT_STREAM = 2  # folded into an example's key; augment.py uses 0 and 1


def make_train_step(graphdef: nnx.GraphDef, tx: optax.GradientTransformation, config: Any, mesh: Mesh):
  """Builds the jitted step `(state, batch) -> (state, loss)`; the state given is donated.

  The batch is cut over the devices of the mesh. Each takes the gradient of its own share's mean loss, the gradients
  are averaged, and every device makes the same update. N devices give what one gives, but for the order of floating
  point sums: batch statistics are averaged over the devices, and the keys of augmentation and dropout belong to the
  example's place in the global batch. With `micro_batches=k` a device takes every k-th example together, so that the
  micro-batches, too, hold the same examples for any number of devices.
  """

  def loss_fn(params, batch_stats, image, label, keys):
    model = nnx.merge(graphdef, params, batch_stats)
    logits = model(image, train=True, keys=keys)
    targets = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), config.label_smoothing)
    loss = optax.softmax_cross_entropy(logits, targets).mean()
    correct = (logits.argmax(-1) == label).sum()
    return loss, (nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), correct)

  def step(state, batch):
    share = batch['label'].shape[0]
    positions = lax.axis_index(parallel.AXIS) * share + jnp.arange(share)
    keys = augment.example_keys(config.seed, state.step, positions)
    image = augment.prepare(batch['image'], config.image_size, config.augment.padding)
    image = augment.augment(image, keys, config.augment.shift, config.augment.flip)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, DROPOUT_STREAM)

    # As varying values, or shard_map would sum the gradients by itself, once in every micro-batch.
    params = jax.tree.map(lambda p: lax.pcast(p, parallel.AXIS, to='varying'), state.params)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    k = config.micro_batches
    if k == 1:
      (loss, (batch_stats, correct)), grads = grad_fn(params, state.batch_stats, image, batch['label'], keys)
    else:
      parts = jax.tree.map(
        lambda a: a.reshape(share // k, k, *a.shape[1:]).swapaxes(0, 1), (image, batch['label'], keys)
      )

      def accumulate(carry, part):
        batch_stats, *sums = carry
        (loss, (batch_stats, correct)), grads = grad_fn(params, batch_stats, *part)
        return (batch_stats, *jax.tree.map(jnp.add, tuple(sums), (loss, correct, grads))), None

      zeros = (jnp.zeros(()), jnp.zeros((), jnp.int32))
      zeros = jax.tree.map(lambda z: lax.pcast(z, parallel.AXIS, to='varying'), zeros)
      first = (state.batch_stats, *zeros, jax.tree.map(jnp.zeros_like, params))
      (batch_stats, loss, correct, grads), _ = lax.scan(accumulate, first, parts)
      loss, grads = jax.tree.map(lambda a: a / k, (loss, grads))

    loss, grads = lax.pmean((loss, grads), parallel.AXIS)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    count = share * mesh.size
    bad = state.metrics['bad_step']
    metrics = {
      'loss': state.metrics['loss'] + loss * count,
      'correct': state.metrics['correct'] + lax.psum(correct, parallel.AXIS),
      'count': state.metrics['count'] + count,
      'bad_step': jnp.where((bad < 0) & ~jnp.isfinite(loss), state.step, bad),
    }
    state = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      batch_stats=batch_stats,
      opt_state=opt_state,
      metrics=metrics,
    )
    return state, loss

  sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(parallel.AXIS)), out_specs=P())
  return jax.jit(sharded, donate_argnums=0)


def train(config: Any, workdir: pathlib.Path) -> None:
  """Trains, or goes on training, the recipe `config` in `workdir`; ends with the two lines of the article.

  Raises:
    UserError: something that the user can mend.
    SystemExit: interrupted by a signal, after saving.
  """
  config_lib.check_same(config, workdir)
  # The data and the devices ------------------------------------------------------------------------------------------
  mesh = parallel.make_mesh()
  parallel.check_divides(config.batch_size, mesh, config.micro_batches)
  dataset = datasets.load(**config.data)
  steps_per_epoch = input_pipeline.steps_per_epoch(len(dataset.train), config.batch_size)
  last_step = config.epochs * steps_per_epoch
  if config.max_steps:
    last_step = min(last_step, config.max_steps)

  # The network and its state, new or where it stopped ----------------------------------------------------------------
  schedule = optimizers.learning_rate_schedule(config, steps_per_epoch)
  tx = optimizers.make_optimizer(config, schedule)
  graphdef, state = create_state(config, len(dataset.class_names), dataset.image_shape[-1], tx, mesh)
  saved = checkpoints.Checkpoints(workdir)
  restored = restore(saved, state)
  meta = {'train_seconds': 0.0, 'train_examples': 0, 'compile_seconds': 0.0, 'epoch_metrics': None}  # of the whole run
  if restored is not None:
    state, meta = restored
  step = int(state.step)
  report = Report(config, workdir, dataset, mesh, graphdef, state, meta, schedule, steps_per_epoch, last_step)
  report.introduce(step)

  # Compile, so that speed is that of training alone ------------------------------------------------------------------
  batches = input_pipeline.train_batches(dataset.train, config.batch_size, config.seed, step, mesh)
  if step < last_step:
    batch = next(batches)
    begin = time.perf_counter()
    train_step = make_train_step(graphdef, tx, config, mesh).lower(state, batch).compile()
    meta['compile_seconds'] += time.perf_counter() - begin

  # The loop ----------------------------------------------------------------------------------------------------------
  pending = collections.deque()  # losses of steps under way
  ahead = parallel.steps_ahead()
  with StopRequest() as stop:
    report.watch.start()
    while step < last_step:
      state, loss = train_step(state, batch)
      step += 1
      report.progress.step()
      pending.append(loss)
      if len(pending) > ahead:
        pending.popleft().block_until_ready()
      if step < last_step:
        batch = next(batches)
      end_of_epoch = step % steps_per_epoch == 0 or step == last_step
      save_now = config.checkpoint_every_steps and step % config.checkpoint_every_steps == 0
      stop_now = stop.signal  # read once: a signal that comes from here on is answered after the next step
      if not (end_of_epoch or save_now or stop_now or step % config.log_every_steps == 0):
        continue

      report.log_training(step, jax.device_get(state.metrics), saved)
      accuracy = report.evaluate(step, state) if end_of_epoch else None
      if step % steps_per_epoch == 0:
        report.begin_epoch()
        state = state.replace(metrics=parallel.replicate(empty_metrics(), mesh))
      if end_of_epoch or save_now or stop_now:
        saved.save(step, items(state), report.meta(), accuracy)
      if stop_now and step < last_step:
        saved.close()
        report.close()
        stop.exit(step, last_step)
      report.watch.start()

    saved.close()
    report.finish(step, state)
