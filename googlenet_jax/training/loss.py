"""The loss of a training batch: augmentation, forward pass, cross-entropy with one label or two."""

from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from googlenet_jax.data import mixing, random_keys
from googlenet_jax.model import auxiliary_classifiers


def loss_fn(
  params: Any,
  batch_stats: Any,
  batch: dict[str, jax.Array],
  keys: jax.Array,
  graphdef: nnx.GraphDef,
  config: ConfigDict,
  class_weights: np.ndarray | None = None,
) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array], jax.Array]]:
  """The loss of a batch; `jax.grad` differentiates it.

  Args:
    params: parameters of the network.
    batch_stats: its running statistics.
    batch: `image` uint8 `[B, H, W, C]`, `label` int32 `[B]`, for images of many sizes `size` int32 `[B, 2]`,
      with alternating mirroring `mirrored` bool `[B]`.
    keys: typed keys `[B]`, one per example.
    graphdef: the network.
    config: the recipe.
    class_weights: float32 `[num_classes]`, see `weights_of_classes`; None: all 1.

  Returns:
    The loss to minimise, and a tuple: the new running statistics, the mean losses by name (see `Metrics`), and the
    number of right answers. An answer is right if it is the image's own label, whatever was mixed into the image.
  """
  model = nnx.merge(graphdef, params, batch_stats)
  image, weight = mixing.training_input(batch, keys, config)
  keys = random_keys.stream(keys, random_keys.DROPOUT)
  out = model.end_points(image, train=True, keys=keys, freeze=config.freeze)
  targets = soft_targets(batch['label'], weight, out['logits'].shape[-1], config.label_smoothing)
  if class_weights is not None:
    targets = targets * class_weights  # each class's part of the loss gets its weight, also after mixing
  total = loss = optax.softmax_cross_entropy(out['logits'], targets).mean()
  losses = {'loss': loss}
  if model.auxiliary:
    parts = {name: optax.softmax_cross_entropy(out[name], targets).mean() for name in auxiliary_classifiers.AFTER}
    total = loss + auxiliary_classifiers.LOSS_WEIGHT * sum(parts.values())
    losses |= {'total': total, **parts}
  correct = (out['logits'].argmax(-1) == batch['label']).sum()
  return total, (nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), losses, correct)


def weights_of_classes(labels: np.ndarray, num_classes: int, kind: str) -> np.ndarray | None:
  """Returns the weights of the classes in the training loss.

  The weight of class c is N / (K n_c), for N training images, K classes and n_c images of the class. Over the training
  images the weights are 1 on average, so the loss is divided by the number of images. PyTorch's cross-entropy does the
  same for probabilities as targets; for numbers as targets it divides by the sum of the weights in the batch.

  Args:
    labels: int `[N]`, of the training images.
    num_classes: number of classes K.
    kind: `class_weights` of the recipe.

  Returns:
    float32 `[num_classes]`, 0 for a class without images; None for 'none'.
  """
  if kind == 'none':
    return None
  counts = np.bincount(labels, minlength=num_classes)
  return np.where(counts > 0, len(labels) / (num_classes * np.maximum(counts, 1)), 0).astype(np.float32)


def soft_targets(label: jax.Array, weight: jax.Array | None, num_classes: int, smoothing: float) -> jax.Array:
  """Returns the probabilities that the network should give.

  Args:
    label: int32 `[B]`.
    weight: float32 `[B]`, weight of the image's own label; the next image's label has the rest. None: all weight.
    num_classes: number of classes.
    smoothing: share that is spread over all classes.

  Returns:
    float32 `[B, num_classes]`; each row adds up to 1.
  """
  targets = jax.nn.one_hot(label, num_classes)
  if weight is not None:
    own = weight[:, None]
    targets = own * targets + (1 - own) * mixing.next_one(targets)
  return optax.smooth_labels(targets, smoothing)
