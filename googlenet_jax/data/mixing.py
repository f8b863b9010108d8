"""Mixes training images with each other: CutMix and mixup, on the device and inside the jitted step.

Each image is mixed with the next image of its batch, or of its micro-batch. Batches are shuffled, so the next image is
as random as any other. The targets of the loss are mixed by the same weights.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from googlenet_jax.data import augment, random_keys


def training_input(
  batch: dict[str, jax.Array], keys: jax.Array, config: ConfigDict
) -> tuple[jax.Array, jax.Array | None]:
  """Turns a batch into the network's input in training: augments each image, then mixes it with the next one.

  Args:
    batch: `image` uint8 `[B, H, W, C]`; for images of many sizes `size` int32 `[B, 2]`; with alternating mirroring
      `mirrored` bool `[B]`.
    keys: typed keys `[B]`.
    config: the recipe.

  Returns:
    float32 `[B, image_size, image_size, C]` in [0, 1], and the weight of each image's own label, see `mix`.
  """
  image = augment.augment(
    batch['image'], keys, config.image_size, config.augment, batch.get('size'), batch.get('mirrored')
  )
  return mix(image, keys, config.augment)


def mix(image: jax.Array, keys: jax.Array, options: ConfigDict) -> tuple[jax.Array, jax.Array | None]:
  """Mixes each image with the next one, as the recipe says. The last image is mixed with the first.

  Args:
    image: float32 `[B, H, W, C]`.
    keys: typed keys `[B]`.
    options: `augment` part of a recipe; `cutmix` or `mixup` is read.

  Returns:
    float32 `[B, H, W, C]`, and float32 `[B]` in [0, 1]: the weight of the image's own label. The label of the next
    image has the rest. The weight is None if the recipe mixes nothing.
  """
  if options.cutmix:
    return cutmix(image, options.cutmix, random_keys.stream(keys, random_keys.CUTMIX))
  if options.mixup:
    return mixup(image, options.mixup, random_keys.stream(keys, random_keys.MIXUP))
  return image, None


def next_one(values: jax.Array) -> jax.Array:
  """Returns, for each place along axis 0, the value at the next place; for the last place, the first value."""
  return jnp.roll(values, -1, axis=0)


def cutmix(image: jax.Array, probability: float, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Puts a rectangle of the next image into an image, at the same place.

  The share of the rectangle's area is uniform in [0, 1], its shape is that of the image, and its centre is uniform. The
  part outside the image is cut off. The weight is the share of the pixels that are left.

  Source: Yun et al., "CutMix: regularization strategy to train strong classifiers with localizable features", 2019,
  arXiv:1905.04899, with alpha = 1.

  Args:
    image: float32 `[B, H, W, C]`.
    probability: chance that an image gets a rectangle, in [0, 1].
    keys: typed keys `[B]`.

  Returns:
    float32 `[B, H, W, C]`, and the weight of each image's own label, float32 `[B]`.
  """
  height, width = image.shape[1:3]

  def box(key):
    use, area, row, column = jax.random.uniform(key, (4,))
    side = jnp.sqrt(area)  # the rectangle's, as a share of the image's side
    rows = jnp.abs(jnp.arange(height) + 0.5 - row * height) < side * height / 2
    columns = jnp.abs(jnp.arange(width) + 0.5 - column * width) < side * width / 2
    return (use < probability) & rows[:, None] & columns

  inside = jax.vmap(box)(keys)  # [B, H, W]
  weight = 1 - inside.sum((1, 2)) / (height * width)
  return jnp.where(inside[..., None], next_one(image), image), weight


def mixup(image: jax.Array, alpha: float, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Blends each image with the next one. The weight is drawn from Beta(alpha, alpha), once for each image.

  Source: Zhang et al., "mixup: beyond empirical risk minimization", 2017, arXiv:1710.09412. The source draws one weight
  for a whole batch.

  Args:
    image: float32 `[B, H, W, C]`.
    alpha: above 0. A small alpha leaves most images nearly as they are, or replaces them; 1 is uniform.
    keys: typed keys `[B]`.

  Returns:
    float32 `[B, H, W, C]`, and the weight of each image's own label, float32 `[B]`.
  """
  weight = jax.vmap(lambda key: symmetric_beta(key, alpha))(keys)
  own = weight[:, None, None, None]
  return own * image + (1 - own) * next_one(image), weight


def symmetric_beta(key: jax.Array, alpha: float) -> jax.Array:
  r"""Draws a number from Beta(alpha, alpha), without drawing again.

  `jax.random.beta` draws until a number is accepted, which is a loop that several devices would run in step. For equal
  parameters there is a formula: if $T$ has Student's distribution with $2\alpha$ degrees of freedom, then
  $1/2 + T / (2 \sqrt{2\alpha + T^2})$ has the wanted one, and Bailey (1994, "Polar generation of random variates with
  the t-distribution") draws $T$ from two uniform numbers.

  Args:
    key: typed key.
    alpha: above 0.

  Returns:
    float32 scalar in [0, 1].
  """
  radius, angle = jax.random.uniform(key, (2,))
  power = radius ** (1 / alpha)
  cosine = jnp.cos(2 * jnp.pi * angle)
  # T^2 / (2 alpha) = cosine^2 (1 - power) / power. Multiplied by power, nothing can overflow for a small alpha.
  half = cosine * jnp.sqrt((1 - power) / (power + cosine**2 * (1 - power))) / 2
  return jnp.clip(0.5 + half, 0, 1)
