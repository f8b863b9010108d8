"""The PyTorch side of an experiment: the twin of our network with PyTorch's fast options.

These are channels_last, fused SGD, autocast for bfloat16, TF32 for float32 on a GPU, and `inference_mode`. Images
arrive as uint8 and are resized on the device, as ours are. What is compiled includes the loss.
"""

import itertools
import os
import sys
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from experiments import hlo, pytorch_twin, worker
from googlenet_jax.exporting import torch_network


class Prepared(torch.nn.Module):
  """The twin after the preparation of the images."""

  def __init__(self, image_size: int, dtype: str, device: str):
    super().__init__()
    self.image_size, self.dtype, self.device = image_size, dtype, device
    self.network = torch_network.GoogLeNet().to(memory_format=torch.channels_last)

  def forward(self, image, label=None):
    """Takes uint8 `[B, 1, H, W]`; returns the mean cross-entropy, or without labels log-probabilities `[B, 10]`."""
    x = F.interpolate(image.float() / 255, (self.image_size, self.image_size), mode='bilinear', align_corners=False)
    with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == 'bfloat16'):
      logits = self.network(x).float()
    return logits.log_softmax(-1) if label is None else F.cross_entropy(logits, label)


class TorchSide(worker.Side):
  """PyTorch's network and its steps."""

  def __init__(self, device: str = 'auto'):
    """Chooses the device ('auto', 'cpu' or 'gpu') and sets options for the whole process."""
    there = torch.cuda.is_available()
    if device == 'gpu' and not there:
      raise RuntimeError('PyTorch finds no GPU')
    self.device = 'cuda' if there and device != 'cpu' else 'cpu'
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision('high')
    if os.environ.get(worker.TINY):
      torch_network.TABLE = worker.tiny_table(torch_network.TABLE)

  def describe(self) -> dict[str, Any]:
    """Versions."""
    return {'versions': {'torch': torch.__version__}}

  def make(
    self,
    mode: str,
    image_size: int,
    batch_size: int,
    dtype: str = 'float32',
    compile_mode: str | None = None,
    learning_rate: float = 0.01,
    input_size: int = 28,
    weights: str | None = None,
    seed: int = 0,
  ) -> dict[str, Any]:
    """Builds; the first step compiles. See `JaxSide.make`.

    Args:
      mode: 'training' or 'inference'.
      image_size: pixels that the network sees.
      batch_size: images in a step.
      dtype: 'float32' or 'bfloat16'.
      compile_mode: `mode` of torch.compile; None for eager.
      learning_rate: a constant one.
      input_size: side of the images in a batch, in pixels.
      weights: safetensors file to start from.
      seed: seed of the initial weights.
    """
    torch.manual_seed(seed)
    self.image_size, self._inference = image_size, mode == 'inference'
    self.module = Prepared(image_size, dtype, self.device).to(self.device)
    if weights:
      from safetensors.torch import load_file

      self.module.network.load_state_dict(load_file(weights))
    how = {'backend': 'aot_eager'} if os.environ.get(worker.TINY) else {'mode': compile_mode}  # C++ takes minutes
    self.model = torch.compile(self.module, **how) if compile_mode else self.module
    self._optimizer = torch.optim.SGD(self.module.parameters(), lr=learning_rate, momentum=0.9, fused=True)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (batch_size, input_size, input_size, 1), np.uint8)
    self.batches = itertools.repeat(self.put(noise, rng.integers(0, 10, batch_size)))
    runs_on = '1 device' if self.device == 'cuda' else f'{torch.get_num_threads()} threads'
    return {'multiply_adds': None, 'runs_on': runs_on}

  def step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """One step: the loss of training, or log-probabilities."""
    if self._inference:
      return self._log_probabilities(batch)
    return pytorch_twin.update(self.model, self._optimizer, *batch)

  @torch.inference_mode()
  def _log_probabilities(self, batch):
    return self.model(batch[0])

  def loss_of(self, result: torch.Tensor) -> float:
    """The mean loss of a training step."""
    return result.item()

  def predict(self, batch: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    """Classes `[B]`."""
    return self._log_probabilities(batch).argmax(-1).cpu().numpy()

  def put(self, images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch on the device; the view of `[B, H, W, 1]` as `[B, 1, H, W]` is channels_last."""
    image = torch.from_numpy(images).permute(0, 3, 1, 2)
    return image.to(self.device), torch.from_numpy(labels).to(self.device).long()

  def wait(self) -> None:
    """Returns when the device is done."""
    if self.device == 'cuda':
      torch.cuda.synchronize()

  def multiply(self, size: int, dtype: str):
    """A function that multiplies two matrices."""
    a = torch.randn(size, size, device=self.device, dtype=getattr(torch, dtype))

    def multiply():
      a @ a
      self.wait()

    return multiply

  def profile(self, steps: int, before: int) -> dict[str, Any]:
    """Where the time of a step goes.

    Returns:
      `wall`, milliseconds of a step without the profiler; `dearest`, rows of (operator or kernel, ms a step, calls a
      step); `launches`, calls in a step.
    """
    wall = 1e3 * self.run(steps, before)
    kinds = torch.profiler.ProfilerActivity
    activity, own = (kinds.CPU, 'self_cpu_time_total')
    if self.device == 'cuda':
      activity, own = kinds.CUDA, 'self_device_time_total'
    with torch.profiler.profile(activities=[activity]) as profile:
      self.run(steps, before=0)
    rows = [(e.key, getattr(e, own) / 1e3 / steps, e.count / steps) for e in profile.key_averages()]
    dearest = sorted(rows, key=lambda row: -row[1])[: hlo.DEAREST]
    return {'wall': wall, 'dearest': dearest, 'launches': sum(row[2] for row in rows)}

  def save(self, path: str) -> None:
    """Writes the weights as safetensors."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in self.module.network.state_dict().items()}, path)

  def device_memory(self) -> int | None:
    """Peak bytes on the GPU."""
    return torch.cuda.max_memory_allocated() if self.device == 'cuda' else None


if __name__ == '__main__':
  worker.serve(TorchSide(*sys.argv[1:]))
