"""GoogLeNet (Inception v1) in plain PyTorch, with the preparation of images. It needs PyTorch alone.

  classifier = load('folder')                 # the folder that `--mode=export --to=torch` of googlenet_jax wrote
  probabilities = classifier(images)          # uint8 [N, H, W, C], any size -> float32 [N, num_classes]
  logits = classifier.networks[0](prepared)   # the network alone, on [N, C, S, S] in [0, 1]: to train on, for example

Source: Szegedy et al., "Going deeper with convolutions", 2015, arXiv:1409.4842, table 1 and figure 2. The layers, their
names and their initial weights are those of googlenet_jax. Maps are `[N, C, H, W]`.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

# Channels of 1x1, 3x3 reduction, 3x3, 5x5 reduction, 5x5, pool projection: table 1 of the paper.
TABLE = {
  'inception_3a': (64, 96, 128, 16, 32, 32),
  'inception_3b': (128, 128, 192, 32, 96, 64),
  'inception_4a': (192, 96, 208, 16, 48, 64),
  'inception_4b': (160, 112, 224, 24, 64, 64),
  'inception_4c': (128, 128, 256, 24, 64, 64),
  'inception_4d': (112, 144, 288, 32, 64, 64),
  'inception_4e': (256, 160, 320, 32, 128, 128),
  'inception_5a': (256, 160, 320, 32, 128, 128),
  'inception_5b': (384, 192, 384, 48, 128, 128),
}
POOL_AFTER = {'inception_3b': 3, 'inception_4e': 2}  # stride 2; torchvision's windows, the paper's are all 3x3
AUXILIARY_AFTER = {'inception_4a': 'aux_4a', 'inception_4d': 'aux_4d'}


# The network ---------------------------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
  """Convolution, optional batch normalisation, ReLU."""

  def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, norm: str = 'none'):
    batch = norm == 'batch'
    super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=not batch)
    self.norm = nn.BatchNorm2d(out_channels, eps=1e-3) if batch else None

  def forward(self, x):
    """`[N, in_channels, H, W]` to `[N, out_channels, ceil(H / stride), ceil(W / stride)]`."""
    x = super().forward(x)
    return F.relu(x if self.norm is None else self.norm(x))


class Inception(nn.Module):
  """The four branches of figure 2b; `naive=True` is figure 2a, without the 1x1 reductions."""

  def __init__(self, in_channels: int, widths: Sequence[int], naive: bool, ch5x5_kernel: int, norm: str):
    super().__init__()
    ch1x1, ch3x3_reduce, ch3x3, ch5x5_reduce, ch5x5, pool_proj = widths
    self.ch1x1 = Conv(in_channels, ch1x1, 1, norm=norm)
    self.ch3x3_reduce = nn.Identity() if naive else Conv(in_channels, ch3x3_reduce, 1, norm=norm)
    self.ch3x3 = Conv(in_channels if naive else ch3x3_reduce, ch3x3, 3, norm=norm)
    self.ch5x5_reduce = nn.Identity() if naive else Conv(in_channels, ch5x5_reduce, 1, norm=norm)
    self.ch5x5 = Conv(in_channels if naive else ch5x5_reduce, ch5x5, ch5x5_kernel, norm=norm)
    self.pool_proj = nn.Identity() if naive else Conv(in_channels, pool_proj, 1, norm=norm)
    self.out_channels = ch1x1 + ch3x3 + ch5x5 + (in_channels if naive else pool_proj)

  def forward(self, x):
    """The branches side by side on channels."""
    branch1 = self.ch1x1(x)
    branch2 = self.ch3x3(self.ch3x3_reduce(x))
    branch3 = self.ch5x5(self.ch5x5_reduce(x))
    branch4 = self.pool_proj(F.max_pool2d(x, 3, 1, padding=1))
    return torch.cat((branch1, branch2, branch3, branch4), dim=1)


class AuxiliaryClassifier(nn.Module):
  """A small classifier on an inner map, which helps to train the layers before it (section 5 of the paper)."""

  def __init__(self, in_channels: int, num_classes: int, pool: str, side: int, norm: str):
    super().__init__()
    self.pool = pool
    pooled = 4 if pool == 'adaptive_pool' else (side - 5) // 3 + 1
    self.conv = Conv(in_channels, 128, 1, norm=norm)
    self.fc1 = nn.Linear(pooled * pooled * 128, 1024)
    self.fc2 = nn.Linear(1024, num_classes)

  def forward(self, x):
    """Logits."""
    x = F.adaptive_avg_pool2d(x, 4) if self.pool == 'adaptive_pool' else F.avg_pool2d(x, 5, 3)
    x = F.relu(self.fc1(self.conv(x).flatten(1)))
    return self.fc2(F.dropout(x, 0.7, self.training))


class GoogLeNet(nn.Module):
  """The network: `[N, channels, H, W]` in [0, 1] to logits `[N, num_classes]`.

  The defaults are the network of Dive into Deep Learning. With auxiliary classifiers and in training, it returns a
  tuple: the logits, and the logits of each auxiliary classifier.
  """

  def __init__(
    self,
    num_classes: int = 10,
    channels: int = 1,
    *,
    inception: str = 'reduced',  # or naive
    head: str = 'average_pool',  # or fully_connected
    stem: str = 'article',  # 7x7 and two pools; or small: 3x3 and one pool
    norm: str = 'none',  # or batch, or lrn
    dropout: float = 0.0,
    auxiliary: str = 'none',  # or average_pool, or adaptive_pool
    pool: str = 'padded',  # or torchvision
    ch5x5_kernel: int = 5,
    input_mean: Sequence[float] = (),  # one number, or one for each channel; empty: 0
    input_std: Sequence[float] = (),  # the same; empty: 1
    image_size: int = 224,  # read for the fully connected head and for auxiliary='average_pool'
    table: Mapping[str, Sequence[int]] | None = None,  # default: TABLE
  ):
    super().__init__()
    table = TABLE if table is None else table
    self.stem, self.lrn, self.dropout, self.pool = stem, norm == 'lrn', dropout, pool
    for name, values in (('mean', input_mean), ('std', input_std)):
      self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1) if values else None, persistent=False)
    self.conv1 = Conv(channels, 64, 3, 1, norm) if stem == 'small' else Conv(channels, 64, 7, 2, norm)
    self.conv2_reduce = Conv(64, 64, 1, norm=norm)
    self.conv2 = Conv(64, 192, 3, norm=norm)
    middle, last = self._map_sides(image_size)
    self.blocks, features = tuple(table), 192
    for name, widths in table.items():
      block = Inception(features, widths, inception == 'naive', ch5x5_kernel, norm)
      setattr(self, name, block)
      features = block.out_channels
    self.auxiliary_after = AUXILIARY_AFTER if auxiliary != 'none' else {}
    for block, name in self.auxiliary_after.items():
      width = getattr(self, block).out_channels
      setattr(self, name, AuxiliaryClassifier(width, num_classes, auxiliary, middle, norm))
    self.hidden = nn.Linear(last * last * features, 1024) if head == 'fully_connected' else None
    self.logits = nn.Linear(features if self.hidden is None else 1024, num_classes)
    for module in self.modules():
      if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
          nn.init.zeros_(module.bias)

  def _map_sides(self, side: int) -> tuple[int, int]:
    """Sides of the maps in stages 4 and 5, in pixels: 14 and 7 for an image of 224."""
    empty = torch.empty(1, 1, side, side, device='meta')
    x = empty if self.stem == 'small' else self._halve(empty[..., ::2, ::2])
    x = self._halve(self._halve(x))
    return x.shape[-1], self._halve(x, 2).shape[-1]

  def _halve(self, x, window=3):
    if self.pool == 'torchvision':
      return F.max_pool2d(x, window, 2, ceil_mode=True)
    return F.max_pool2d(x, 3, 2, padding=1)

  def forward(self, x):
    """Returns the logits; comments give the shapes at 224 pixels."""
    x = x if self.mean is None else x - self.mean
    x = x if self.std is None else x / self.std
    x = self.conv1(x)  # [N, 64, 112, 112]
    if self.stem == 'article':
      x = self._halve(x)  # [N, 64, 56, 56]
    if self.lrn:
      x = F.local_response_norm(x, 5)
    x = self.conv2(self.conv2_reduce(x))  # [N, 192, 56, 56]
    if self.lrn:
      x = F.local_response_norm(x, 5)
    x = self._halve(x)  # [N, 192, 28, 28]
    auxiliary = []
    for name in self.blocks:
      x = getattr(self, name)(x)  # 3: [N, ., 28, 28]  4: [N, ., 14, 14]  5: [N, ., 7, 7]
      if self.training and name in self.auxiliary_after:
        auxiliary.append(getattr(self, self.auxiliary_after[name])(x))
      if name in POOL_AFTER:
        x = self._halve(x, POOL_AFTER[name])
    x = x.mean((2, 3)) if self.hidden is None else F.relu(self.hidden(x.flatten(1)))  # [N, 1024]
    logits = self.logits(F.dropout(x, self.dropout, self.training))  # [N, num_classes]
    return (logits, *auxiliary) if auxiliary else logits


# The preparation of images -------------------------------------------------------------------------------------------


def sampling_matrix(start: float, extent: float, size: int, out: int, device: torch.device | str = 'cpu'):
  """Returns the matrix `[out, size]` that resizes the stretch `[start, start + extent)` of a line of pixels.

  It is bilinear, with half-pixel centres, and with wider kernels where it shrinks (antialiasing), as in PIL.
  """
  start, extent = (torch.tensor(value, dtype=torch.float32, device=device) for value in (start, extent))
  scale = extent / out
  left = start + torch.arange(out, dtype=torch.float32, device=device)[:, None] * scale
  pixel = torch.arange(size, dtype=torch.float32, device=device)
  t = (pixel + 0.5 - (left + scale / 2)) / scale.clamp(min=1)
  weights = (1 - t.abs()).clamp(min=0)
  return weights / weights.sum(-1, keepdim=True)


def prepare(images, image_size: int, padding: int = 0, resize: float = 1.0):
  """Prepares images as in training: scales to [0, 1], resizes, cuts out the middle, pads with zeros.

  Args:
    images: uint8 `[N, H, W, C]`.
    image_size: side S of the result in pixels.
    padding: pixels of zeros on each side, included in `image_size`.
    resize: the shorter side becomes `resize` times the side of the result.

  Returns:
    float32 `[N, C, S, S]`.
  """
  side = image_size - 2 * padding
  x = images.permute(0, 3, 1, 2).float() / 255
  short, least = round(resize * side), min(x.shape[2:])
  matrices = []
  for size in x.shape[2:]:
    length = (2 * short * size + least) // (2 * least)  # after resizing; halves are rounded up
    ratio, offset = size / length, (length - side) // 2
    matrices.append(sampling_matrix(offset * ratio, side * ratio, size, side, x.device))
  rows, columns = matrices
  return F.pad(rows @ x @ columns.T, (padding,) * 4)


class Classifier(nn.Module):
  """One network, or an ensemble whose probabilities are averaged, with the preparation of images."""

  def __init__(self, networks: Sequence[nn.Module], image_size: int, padding: int = 0, resize: float = 1.0):
    super().__init__()
    self.networks = nn.ModuleList(networks)
    self.preparation = {'image_size': image_size, 'padding': padding, 'resize': resize}

  def forward(self, images):
    """Returns probabilities, float32 `[N, num_classes]`, for images uint8 `[N, H, W, C]` of any size."""
    if images.dtype != torch.uint8 or images.ndim != 4:
      raise ValueError(f'images must be torch.uint8 [N, H, W, C], and are {images.dtype} {list(images.shape)}')
    x = prepare(images, **self.preparation)
    return torch.stack([network(x).softmax(-1) for network in self.networks]).mean(0)


def load(folder: str | pathlib.Path, suffix: str = '.pth') -> Classifier:
  """Reads what `--mode=export --to=torch` wrote: the options from card.json, and the weights; ready to predict.

  Args:
    folder: the folder.
    suffix: '.pth', or '.safetensors', which needs the package safetensors.
  """
  card = json.loads((pathlib.Path(folder) / 'card.json').read_text(encoding='utf-8'))
  return assemble(folder, card['artefact'], suffix)


def assemble(folder: str | pathlib.Path, facts: Mapping, suffix: str = '.pth') -> Classifier:
  """Makes the classifier of a folder from the part `artefact` of its card; see `load`."""
  networks = []
  for name in facts['weights']:
    path = pathlib.Path(folder) / f'{name}{suffix}'
    if suffix == '.safetensors':
      from safetensors.torch import load_file

      weights = load_file(path)
    else:
      weights = torch.load(path, map_location='cpu', weights_only=True)
    network = GoogLeNet(**facts['network'])
    network.load_state_dict(weights)
    networks.append(network)
  return Classifier(networks, **facts['preparation']).eval()
