"""PyTorch's side of experiments/benchmark.py, started by it: the twin of our network, as fast as PyTorch's options go.

channels_last, fused SGD, autocast for bfloat16, TF32 for float32 on a GPU, `inference_mode`; images arrive as uint8
and are resized on the device, as ours.
"""

import itertools
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from experiments import worker

WARM_UP = 4  # steps: cuDNN tries its algorithms


def make_network(image_size: int, dtype: str, device: str):
  """The twin behind the preparation of the images: uint8 `[B, 1, 28, 28]` to float32 logits."""
  import torch
  from torch.nn import functional as F

  from experiments import pytorch_twin

  class Prepared(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.network = pytorch_twin.GoogLeNet().to(memory_format=torch.channels_last)

    def forward(self, image):
      x = image.float() / 255
      x = F.interpolate(x, (image_size, image_size), mode='bilinear', align_corners=False)
      with torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'):
        return self.network(x).float()

  torch.manual_seed(0)
  return Prepared().to(device)


def random_batch(batch_size: int, device: str):
  """Images of noise and labels on the device."""
  import torch

  rng = np.random.default_rng(0)
  image = torch.from_numpy(rng.integers(0, 256, (batch_size, 28, 28, 1), np.uint8))
  image = image.permute(0, 3, 1, 2)  # which is channels_last
  return image.to(device), torch.from_numpy(rng.integers(0, 10, batch_size)).to(device)


def loader(batch_size: int, device: str):
  """Endless epochs of Fashion-MNIST by a DataLoader that takes whole batches out of an array in memory.

  The documented way to load a batch by one index operation; one example at a time, with or without workers, is slower
  for images that lie in memory.
  """
  import torch
  from torch.utils import data

  images, labels = worker.training_images()
  images, labels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2), torch.from_numpy(labels).long()
  dataset = data.TensorDataset(images, labels)
  batches = data.BatchSampler(data.RandomSampler(dataset), batch_size, drop_last=True)
  epoch = data.DataLoader(dataset, sampler=batches, batch_size=None, pin_memory=device == 'cuda')
  while True:
    for image, label in epoch:
      yield image.to(device, non_blocking=True), label.to(device, non_blocking=True)


class Case:
  """One network at one size: what is timed."""

  multiply_adds = None  # ours counts them

  def __init__(self, mode: str, image_size: int, batch_size: int, dtype: str, compiled: bool, device: str):
    """Compiles and warms up; `mode` is 'training', 'inference' or 'epochs'."""
    import torch
    from torch.nn import functional as F

    from experiments import pytorch_twin

    network = make_network(image_size, dtype, device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)
    if compiled:
      network = torch.compile(network, mode='max-autotune' if device == 'cuda' else 'default')
    if mode == 'inference':
      network.eval()

      @torch.inference_mode()
      def step(image, label):
        logits = network(image)
        losses = F.cross_entropy(logits, label, reduction='none')
        return logits.argmax(-1), losses, logits.softmax(-1).amax(-1)

    else:

      def step(image, label):
        return pytorch_twin.train_step(network, optimizer, image, label)

    self._step = step
    self._wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    self._batches = itertools.repeat(random_batch(batch_size, device))
    self.run(WARM_UP)
    self.whole_epochs = mode == 'epochs'
    if self.whole_epochs:
      self._batches = loader(batch_size, device)

  def run(self, steps: int) -> float:
    """Seconds a step."""
    begin = time.perf_counter()
    for image, label in itertools.islice(self._batches, steps):
      self._step(image, label)
    self._wait()
    return (time.perf_counter() - begin) / steps


def product(size: int, dtype: str, repeats: int, device: str) -> float:
  """Floating point operations a second of a square matrix product, median."""
  import torch

  a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
  seconds = []
  for _ in range(repeats + 1):
    begin = time.perf_counter()
    a @ a
    if device == 'cuda':
      torch.cuda.synchronize()
    seconds.append(time.perf_counter() - begin)
  return 2 * size**3 / float(np.median(seconds[1:]))


def describe(device: str):
  """Version and device; also sets what holds for the whole process."""
  try:
    import torch
  except ImportError as error:
    raise RuntimeError('PyTorch is not installed: pip install torch') from error
  if device == 'cuda':
    if not torch.cuda.is_available():
      raise RuntimeError('PyTorch sees no GPU')
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision('high')
  return {'versions': {'torch': torch.__version__}}


def main() -> None:
  """Answers the parent's requests."""
  worker.serve_cases(Case, describe=describe, product=product)


if __name__ == '__main__':
  main()
