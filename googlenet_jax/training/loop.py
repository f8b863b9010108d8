"""Training: the step and the loop, to be read from top to bottom."""

import collections
import concurrent.futures
import contextlib
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from googlenet_jax import recipe
from googlenet_jax.data import augment, datasets, pipeline, random_keys
from googlenet_jax.data.splits import Dataset
from googlenet_jax.host import checkpoints, console, sharding
from googlenet_jax.host.signals import StopRequest
from googlenet_jax.model import auxiliary_classifiers
from googlenet_jax.training import optimizers
from googlenet_jax.training.report import Report
from googlenet_jax.training.state import create_state, empty_metrics, items, restore


def make_train_step(graphdef: nnx.GraphDef, tx: optax.GradientTransformation, config: Any, mesh: Mesh):
  """Builds the jitted step `(state, batch) -> (state, loss)`; the state given is donated.

  The batch is cut over the devices of the mesh. Each takes the gradient of its own share's mean loss, the gradients
  are averaged, and every device makes the same update. N devices give what one gives, but for the order of floating
  point sums: batch statistics are averaged over the devices, and the keys of augmentation and dropout belong to the
  example's place in the global batch. With `micro_batches=k` a device takes every k-th example together, so that the
  micro-batches, too, hold the same examples for any number of devices.
  """

  def loss_fn(params, batch_stats, batch, keys):
    model = nnx.merge(graphdef, params, batch_stats)
    image = augment.augment(batch['image'], keys, config.image_size, config.augment, batch.get('size'))
    out = model.end_points(image, train=True, keys=random_keys.stream(keys, random_keys.DROPOUT))
    targets = optax.smooth_labels(jax.nn.one_hot(batch['label'], out['logits'].shape[-1]), config.label_smoothing)
    total = loss = optax.softmax_cross_entropy(out['logits'], targets).mean()
    losses = {'loss': loss}
    if model.auxiliary:
      parts = {name: optax.softmax_cross_entropy(out[name], targets).mean() for name in auxiliary_classifiers.AFTER}
      total = loss + auxiliary_classifiers.LOSS_WEIGHT * sum(parts.values())
      losses |= {'total': total, **parts}
    correct = (out['logits'].argmax(-1) == batch['label']).sum()
    return total, (nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), losses, correct)

  grad_fn = jax.grad(loss_fn, has_aux=True)

  def gradients(params, batch_stats, batch, keys):
    """Batch statistics, gradients, mean losses and number of right answers over this device's share."""
    k, share = config.micro_batches, keys.shape[0]
    if k == 1:
      grads, (batch_stats, losses, correct) = grad_fn(params, batch_stats, batch, keys)
      return batch_stats, grads, losses, correct

    def accumulate(carry, part):
      batch_stats, *sums = carry
      grads, (batch_stats, *values) = grad_fn(params, batch_stats, *part)
      return (batch_stats, *jax.tree.map(jnp.add, sums, [grads, *values])), None

    parts = jax.tree.map(lambda a: a.reshape(share // k, k, *a.shape[1:]).swapaxes(0, 1), (batch, keys))
    first_part = jax.tree.map(lambda a: a[0], parts)
    grads, (_, *values) = jax.eval_shape(grad_fn, params, batch_stats, *first_part)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), [grads, *values])
    zeros = jax.tree.map(lambda z: lax.pcast(z, sharding.AXIS, to='varying'), zeros)
    (batch_stats, grads, losses, correct), _ = lax.scan(accumulate, (batch_stats, *zeros), parts)
    return batch_stats, *jax.tree.map(lambda a: a / k, (grads, losses)), correct

  def step(state, batch):
    share = batch['label'].shape[0]
    positions = lax.axis_index(sharding.AXIS) * share + jnp.arange(share)
    keys = random_keys.example_keys(state.seed, state.step, positions)
    # As varying values, or shard_map would sum the gradients by itself, once in every micro-batch.
    params = jax.tree.map(lambda p: lax.pcast(p, sharding.AXIS, to='varying'), state.params)
    batch_stats, grads, losses, correct = gradients(params, state.batch_stats, batch, keys)
    losses, grads = lax.pmean((losses, grads), sharding.AXIS)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    averaged = state.averaged
    if averaged:
      move = 1 - optimizers.average_decay(state.step, config.average_decay)
      new = {'params': params, 'batch_stats': batch_stats}
      averaged = jax.tree.map(lambda old, new: old + move.astype(old.dtype) * (new - old), averaged, new)
    count = share * mesh.size
    bad = state.metrics['bad_step']
    metrics = {
      **{name: state.metrics[name] + loss * count for name, loss in losses.items()},
      'correct': state.metrics['correct'] + lax.psum(correct, sharding.AXIS),
      'count': state.metrics['count'] + count,
      'bad_step': jnp.where((bad < 0) & ~jnp.isfinite(sum(losses.values())), state.step, bad),
    }
    state = state.replace(
      step=state.step + 1,
      params=params,
      batch_stats=batch_stats,
      opt_state=opt_state,
      metrics=metrics,
      averaged=averaged,
    )
    return state, losses['loss']

  sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(sharding.AXIS)), out_specs=P())
  return jax.jit(sharded, donate_argnums=0)


def train(
  config: Any,
  workdir: pathlib.Path,
  devices: Sequence[jax.Device] | None = None,
  stop: StopRequest | None = None,
  dataset: Dataset | None = None,
) -> None:
  """Trains, or goes on training, the recipe `config` in `workdir`; ends with the two lines of the article.

  Args:
    config: the recipe.
    workdir: folder of the run.
    devices: to train on, while others train elsewhere; all by default.
    stop: a request that others answer too: when it comes, the run is saved and this returns. By default signals are
      caught here, and end the program.
    dataset: of the recipe, where it is already loaded.

  Raises:
    UserError: something that the user can mend.
    SystemExit: interrupted by a signal, after saving.
  """
  recipe.check_same(config, workdir)
  # The data and the devices ------------------------------------------------------------------------------------------
  mesh = sharding.make_mesh(devices)
  sharding.check_divides(config.batch_size, mesh, config.micro_batches)
  dataset = dataset or datasets.load(**config.data)
  steps_per_epoch = pipeline.steps_per_epoch(len(dataset.train), config.batch_size)
  last_step = config.epochs * steps_per_epoch
  if config.max_steps:
    last_step = min(last_step, config.max_steps)

  # The network and its state, new or where it stopped ----------------------------------------------------------------
  schedule = optimizers.learning_rate_schedule(config, steps_per_epoch)
  tx = optimizers.make_optimizer(config, schedule)
  graphdef, state = create_state(config, len(dataset.class_names), dataset.image_shape[-1], tx, mesh)
  saved = checkpoints.Checkpoints(workdir, shared=devices is not None)
  restored = restore(saved, state)
  meta = {'train_seconds': 0.0, 'train_examples': 0, 'compile_seconds': 0.0, 'epoch_metrics': None}  # of the whole run
  if restored is not None:
    state, meta = restored
  step = int(state.step)
  report = Report(config, workdir, dataset, mesh, graphdef, state, meta, schedule, steps_per_epoch, last_step)
  report.introduce(step)

  # Compile, so that speed is that of training alone ------------------------------------------------------------------
  batches = pipeline.train_batches(dataset.train, config.batch_size, recipe.sampling_seed(config), step, mesh)
  if step < last_step:
    batch = next(batches)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # a picture is drawn while XLA compiles
      samples = pool.submit(report.draw_samples, batch) if step == 0 else None
      begin = time.perf_counter()
      train_step = make_train_step(graphdef, tx, config, mesh).lower(state, batch).compile()
      meta['compile_seconds'] += time.perf_counter() - begin
      if samples is not None:
        samples.result()

  # The loop ----------------------------------------------------------------------------------------------------------
  pending = collections.deque()  # losses of steps under way
  ahead = sharding.steps_ahead()
  shared = stop is not None
  with contextlib.nullcontext(stop) if shared else StopRequest() as stop:
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
        state = state.replace(metrics=sharding.replicate(empty_metrics(config.model.auxiliary), mesh))
      if end_of_epoch or save_now or stop_now:
        saved.save(step, items(state), report.meta(), accuracy)
      if stop_now and step < last_step:
        saved.close()
        report.close()
        console.say(f'stopped at step {step} of {last_step}, saved')
        if shared:
          return
        stop.exit()
      report.watch.start()

    saved.close()
    report.finish(step, state)
