"""The loss of a training batch: augmentation, forward pass, cross-entropy."""

from typing import Any

import jax
import optax
from flax import nnx
from ml_collections import ConfigDict

from googlenet_jax.data import augment, random_keys
from googlenet_jax.model import auxiliary_classifiers


def loss_fn(
  params: Any,
  batch_stats: Any,
  batch: dict[str, jax.Array],
  keys: jax.Array,
  graphdef: nnx.GraphDef,
  config: ConfigDict,
) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array], jax.Array]]:
  """The loss of a batch; `jax.grad` differentiates it.

  Args:
    params: parameters of the network.
    batch_stats: its running statistics.
    batch: `image` uint8 `[B, H, W, C]`, `label` int32 `[B]`, for images of many sizes `size` int32 `[B, 2]`.
    keys: typed keys `[B]`, one per example.
    graphdef: the network.
    config: the recipe.

  Returns:
    The loss to minimise, and a tuple: the new running statistics, the mean losses by name (see `Metrics`), and the
    number of right answers.
  """
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
