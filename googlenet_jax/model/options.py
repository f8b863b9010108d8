"""What can be chosen about the network. Pure Python: checking a recipe needs no JAX."""

import dataclasses
import math
from typing import Any

# Smallest input in pixels: the map has at least two pixels before every halving (five, or three).
MIN_IMAGE_SIZE = {'article': 17, 'small': 5}
# The network from the image on. `freeze` names one of them; the paper's table in googlenet.py has the blocks' widths.
STAGES = (
  *('conv1', 'conv2_reduce', 'conv2', 'inception_3a', 'inception_3b'),
  *(f'inception_4{letter}' for letter in 'abcde'),
  *('inception_5a', 'inception_5b'),
)
AUXILIARY_POOL = 5  # pixels: side of the paper's pooling window in the auxiliary classifiers; its stride is 3


def option(
  default: Any,
  meaning: str,
  choices: tuple | None = None,
  *,
  least: float | None = None,
  below: float | None = None,
) -> Any:
  """Makes a field of `Options`.

  Args:
    default: its value in d2l's network.
    meaning: one line for the reader of a recipe.
    choices: the known values; None if there is no such list.
    least: smallest number; None for no bound.
    below: the number must be smaller than this; None for no bound.

  Returns:
    A dataclass field. Its `metadata` holds the other arguments by name.
  """
  metadata = {'meaning': meaning, 'choices': choices, 'least': least, 'below': below}
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Options:
  """The variant of the network; the defaults are d2l's network. A recipe sets the fields as `model.NAME`."""

  inception: str = option(
    'reduced', "reduced: the paper's figure 2b; naive: figure 2a, without the 1x1 reductions", ('reduced', 'naive')
  )
  head: str = option(
    'average_pool',
    'average_pool: one vector per image, as in the paper; fully_connected: the flattened last map and a hidden layer',
    ('average_pool', 'fully_connected'),
  )
  stem: str = option(
    'article',
    'article: 7x7 stride 2 and two pools, as in d2l and the paper; small: 3x3 and one pool, for 28 or 32 pixels',
    tuple(MIN_IMAGE_SIZE),
  )
  norm: str = option(
    'none',
    "none; batch: after every convolution; lrn: the paper's local response normalisation in the stem",
    ('none', 'batch', 'lrn'),
  )
  dropout: float = option(
    0.0, 'probability of zeroing a feature before the last linear layer; 0.4 in the paper', least=0, below=1
  )
  auxiliary: str = option(
    'none',
    "classifiers after 4a and 4d: none; average_pool: the paper's; adaptive_pool: torchvision's, for maps of any size",
    ('none', 'average_pool', 'adaptive_pool'),
  )
  pool: str = option(
    'padded',
    'padded: 3x3 windows with padding 1 halve the maps; torchvision: without padding, in ceil mode, and 2x2 after 4e',
    ('padded', 'torchvision'),
  )
  ch5x5_kernel: int = option(5, 'side of the kernel in the 5x5 branches; 3 in torchvision', (5, 3))
  input_mean: str = option(
    '', 'subtracted from images in [0, 1]: a number, or three such as 0.485,0.456,0.406 (grey: their mean); empty: 0'
  )
  input_std: str = option('', 'images are divided by it after that, such as 0.229,0.224,0.225; empty: 1')

  def check(self, image_size: int | None, channels: int | None = None) -> None:
    """Checks that there is a network with these options.

    Args:
      image_size: side of the square input in pixels; None where it is not known yet.
      channels: channels of the images; None where they are not known yet.

    Raises:
      ValueError: an option is unknown or out of range, or does not go with the images. The text begins with the name
        of an option or with `image_size`.
    """
    for field in dataclasses.fields(self):
      _check_value(field, getattr(self, field.name))
    for name in ('input_mean', 'input_std'):
      numbers(name, getattr(self, name), channels)
    if image_size is None:
      for name, value in (('head', 'fully_connected'), ('auxiliary', 'average_pool')):
        if getattr(self, name) == value:
          raise ValueError(f'{name}={value!r} needs image_size: its weights depend on it')
      return
    least = MIN_IMAGE_SIZE[self.stem]
    if image_size < least:
      raise ValueError(
        f'image_size={image_size} is too small for the network: with model.stem={self.stem} it needs at least {least} '
        'pixels'
      )
    middle, _ = map_sides(image_size, self.stem, self.pool)
    if self.auxiliary == 'average_pool' and middle < AUXILIARY_POOL:
      raise ValueError(
        f"auxiliary='average_pool' needs maps of {AUXILIARY_POOL} pixels in stage 4, image_size={image_size} gives "
        f"{middle}: auxiliary='adaptive_pool' takes maps of any size"
      )


D2L = Options()


def numbers(name: str, text: str, channels: int | None = None) -> tuple[float, ...]:
  """Returns the numbers in the text of `input_mean` or `input_std`.

  Args:
    name: name of the option, for errors.
    text: its value.
    channels: channels of the images. Three numbers become their mean if the images have one channel.

  Returns:
    No number, one, or one for each of three channels.

  Raises:
    ValueError: the text is something else, or a standard deviation is not above 0.
  """
  if not text:
    return ()
  try:
    values = tuple(float(part) for part in text.split(','))
  except ValueError:
    values = ()
  if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
    raise ValueError(f'{name}={text!r} must be one number, or three such as 0.485,0.456,0.406')
  if name == 'input_std' and min(values) <= 0:
    raise ValueError(f'{name}={text!r} is out of range: a standard deviation must be above 0')
  if len(values) == 3 and channels not in (None, 1, 3):
    raise ValueError(f'{name}={text!r} is for images of 3 channels, not {channels}')
  return (sum(values) / 3,) if channels == 1 and len(values) == 3 else values


def _check_value(field: dataclasses.Field, value: Any) -> None:
  choices, least, below = (field.metadata[key] for key in ('choices', 'least', 'below'))
  if choices is not None and value not in choices:
    raise ValueError(f'{field.name}={value!r} is unknown: choose from {", ".join(map(str, choices))}')
  # Written so that NaN is refused as well.
  if least is not None and not value >= least:
    raise ValueError(f'{field.name}={value} is out of range: it must be at least {least}')
  if below is not None and not value < below:
    raise ValueError(f'{field.name}={value} is out of range: it must be below {below}')


def map_sides(image_size: int, stem: str = 'article', pool: str = 'padded') -> tuple[int, int]:
  """Sides of the square maps in stages 4 and 5, in pixels: 14 and 7 for an image of 224.

  Args:
    image_size: side of the square input in pixels.
    stem: see `Options`.
    pool: see `Options`.

  Returns:
    The side in stage 4 and the side in stage 5.
  """

  def halved(side, window):
    return -(-side // 2) if pool == 'padded' else -(-(side - window) // 2) + 1

  side = image_size
  if stem == 'article':
    side = halved(-(-side // 2), 3)
  side = halved(halved(side, 3), 3)
  return side, halved(side, 2)
