"""Learning-rate schedules and momentum SGD, built from Optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from googlenet_jax import recipe
from googlenet_jax.host.errors import UserError
from googlenet_jax.model.googlenet import HEADS
from googlenet_jax.recipe_checks import LARGEST


def learning_rate_schedule(config, steps_per_epoch: int) -> optax.Schedule:
  r"""The learning rate as a function of the step.

  With base rate $\eta$, epoch $e$ (whole epochs before the step), step $t$ and $T$ steps in all:

  - 'step': $\eta \cdot 0.96^{\lfloor e / 8 \rfloor}$, the paper's fall of 4 % every 8 epochs;
  - 'constant': $\eta$;
  - 'cosine': $\eta (1 + \cos(\pi t / T)) / 2$, which is 0 after the last step;
  - 'linear': $\eta (1 - t / T)$, which is 0 after the last step;
  - 'one_cycle': from $\eta / 25$ up to $\eta$ over the first 30 % of the steps, then down to $\eta / 250000$, along
    cosines (Smith and Topin 2018; PyTorch's `OneCycleLR` defaults).

  With a warm-up of $W$ steps the rate is $\eta t / W$ before step $W$. Then 'cosine' and 'linear' fall over the
  remaining steps: $t - W$ and $T - W$ take the place of $t$ and $T$. The others go on as without a warm-up.

  Args:
    config: with `learning_rate, schedule, warmup_epochs, decay_factor, decay_epochs, epochs`.
    steps_per_epoch: number of steps in an epoch.

  Returns:
    A function of the step, an int or an int32 array.

  Raises:
    UserError: there are more steps than can be counted.
    ValueError: an unknown schedule.
  """
  rate, total = config.learning_rate, config.epochs * steps_per_epoch
  if total > LARGEST:
    raise UserError(f'config.epochs={config.epochs} are {total:,} steps: at most {LARGEST:,} can be counted')
  warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)  # one step is left for the rest
  match config.schedule:
    case 'step':
      every = min(config.decay_epochs * steps_per_epoch, LARGEST)
      schedule = optax.exponential_decay(rate, every, config.decay_factor, staircase=True)
    case 'constant':
      schedule = optax.constant_schedule(rate)
    case 'cosine':
      schedule = _after(warmup, optax.cosine_decay_schedule(rate, total - warmup))
    case 'linear':
      schedule = _after(warmup, optax.linear_schedule(rate, 0.0, total - warmup))
    case 'one_cycle':
      schedule = optax.cosine_onecycle_schedule(total, rate, final_div_factor=1e4)
    case unknown:
      choices = ', '.join(recipe.KEYS['schedule'].choices)
      raise ValueError(f'schedule={unknown!r} is unknown: choose from {choices}')
  if not warmup:
    return schedule
  return lambda step: jnp.where(step < warmup, rate * step / warmup, schedule(step))


def _after(start: int, schedule: optax.Schedule) -> optax.Schedule:
  """Returns the schedule moved to begin at step `start`. Before, it has its first value."""
  return lambda step: schedule(jnp.maximum(step - start, 0))


def make_optimizer(config, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Gradient clipping, weight decay and SGD with momentum, in that order.

  $g \\leftarrow \\nabla L$, clipped to global norm `clip_norm` if that is set; $g \\leftarrow g + \\lambda w$ for
  kernels; $v \\leftarrow \\mu v + g$; $w \\leftarrow w - \\eta v$ (Nesterov: $w - \\eta (g + \\mu v)$). This is
  PyTorch's SGD, except that biases and the parameters of batch normalisation do not decay. The learning rate of all
  stages before the heads is $\\eta$ times `body_learning_rate`, as in a second parameter group of PyTorch's.

  Args:
    config: with `momentum, nesterov, weight_decay, clip_norm, body_learning_rate`.
    schedule: learning rate by step.

  Returns:
    The Optax transformation.
  """
  parts = []
  if config.clip_norm:
    parts.append(optax.clip_by_global_norm(config.clip_norm))
  if config.weight_decay:
    kernels = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=kernels))
  parts.append(optax.sgd(schedule, momentum=config.momentum or None, nesterov=config.nesterov))
  if config.body_learning_rate != 1:
    parts.append(optax.stateless(lambda updates, _: _scale_body(updates, config.body_learning_rate)))
  return optax.chain(*parts)


def _scale_body(updates: dict[str, Any], ratio: float) -> dict[str, Any]:
  scaled = {name: jax.tree.map(lambda u: u * ratio, part) for name, part in updates.items() if name not in HEADS}
  return {**updates, **scaled}


def average_decay(step: jax.Array, decay: float) -> jax.Array:
  """Returns the share that the average keeps at a step: `decay`, or less at first, when old weights are soon outdated.

  min(decay, (1 + step) / (10 + step)), as TensorFlow's `ExponentialMovingAverage(num_updates=...)`.
  """
  return jnp.minimum(decay, (1 + step) / (10 + step))
