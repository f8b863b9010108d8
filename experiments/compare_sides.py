"""The two sides of experiments/compare_pytorch.py, started by it: one framework in a process."""

import copy
import pathlib
import sys
import time
from types import SimpleNamespace

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from experiments import worker

MOMENTUM = 0.9
EVALUATION_BATCH = 256


class JaxSide:
  """The package's own training step."""

  def __init__(self, options: SimpleNamespace):
    """Makes the network and takes the weights that PyTorch drew."""
    from configs import default
    from googlenet_jax.host import sharding

    config = default.get_config()
    config.image_size, config.batch_size = options.image_size, options.batch_size
    config.learning_rate, config.momentum, config.schedule = options.learning_rate, MOMENTUM, 'constant'
    sharding.use_compilation_cache()  # this and the next as main.py does
    sharding.use_cpu_cores(config)
    import jax

    from googlenet_jax.evaluation import evaluate
    from googlenet_jax.model import torch_weights
    from googlenet_jax.training import loop, optimizers
    from googlenet_jax.training.state import create_state

    # All devices that main.py makes of a CPU, one GPU: PyTorch gets no more.
    self.mesh = sharding.make_mesh(None if jax.default_backend() == 'cpu' else jax.devices()[:1])
    self.shard, self.ahead = sharding.shard_batch, sharding.steps_ahead()
    tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, steps_per_epoch=1))
    self.graphdef, state = create_state(config, num_classes=10, channels=1, tx=tx, mesh=self.mesh)
    tensors = torch_weights.read(options.folder / 'weights.safetensors')
    params = torch_weights.from_torch(tensors, state.params, state.batch_stats).params
    self.state = state.replace(params=sharding.replicate(params, self.mesh))
    self.step = loop.make_train_step(self.graphdef, tx, config, self.mesh)
    self.eval_step = evaluate.make_eval_step(self.graphdef, config, self.mesh)

  def train(self, batches):
    """Trains on `(images, labels)`; returns the losses."""
    losses = []
    for images, labels in batches:
      batch = self.shard({'image': images, 'label': labels}, self.mesh)
      self.state, loss = self.step(self.state, batch)
      losses.append(loss)
      if len(losses) > self.ahead:
        losses[-1 - self.ahead].block_until_ready()
    return [float(loss) for loss in losses]

  def predict(self, images):
    """The classes of uint8 images."""
    batch = self.shard({'image': images, 'label': np.zeros(len(images), np.int32)}, self.mesh)
    return np.asarray(self.eval_step((self.state.params, self.state.batch_stats), batch)).argmax(-1)

  def start(self, images, labels):
    """Logits, and the gradient in PyTorch's names and axes, at the present weights in full float32 precision."""
    import jax
    import optax
    from flax import nnx

    from googlenet_jax.model import torch_weights

    @jax.jit
    def gradient(params):
      def loss(params):
        logits = nnx.merge(self.graphdef, params, {})(images.astype(np.float32) / 255, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

      return jax.grad(loss, has_aux=True)(params)

    with jax.default_matmul_precision('highest'):
      gradients, logits = gradient(self.state.params)
    return {'float32': (np.asarray(logits), torch_weights.to_torch(gradients, {}))}

  def device_memory(self):
    """Peak bytes on a GPU, else None."""
    stats = self.mesh.devices.flat[0].memory_stats()
    return stats and stats.get('peak_bytes_in_use')

  def describe(self):
    """Versions and device."""
    import flax
    import jax

    device = self.mesh.devices.flat[0].device_kind
    return f'jax {jax.__version__}, flax {flax.__version__}', device


class TorchSide:
  """The twin, eager or compiled."""

  def __init__(self, options: SimpleNamespace):
    """Makes the network; draws its weights, or reads those that another process drew."""
    import torch

    from experiments import pytorch_twin

    self.torch, self.twin = torch, pytorch_twin
    self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.manual_seed(options.seed)
    model = pytorch_twin.GoogLeNet()
    weights = options.folder / 'weights.safetensors'
    if weights.exists():
      from safetensors.torch import load_file

      model.load_state_dict(load_file(weights))
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True  # as JAX does by default
    self.module = model.to(self.device, memory_format=torch.channels_last)
    self.model = torch.compile(self.module) if options.side == 'pytorch_compiled' else self.module
    self.optimizer = torch.optim.SGD(self.module.parameters(), lr=options.learning_rate, momentum=MOMENTUM)

  def save(self, path):
    """Writes the weights for the other processes."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in self.module.state_dict().items()}, path)

  def prepared(self, images):
    """uint8 `[B, H, W, 1]` as float32 `[B, 1, H, W]` in [0, 1], on the device."""
    image = self.torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
    return image.float().div(255).contiguous(memory_format=self.torch.channels_last)

  def train(self, batches):
    """Trains on `(images, labels)`; returns the losses."""
    losses = []
    for images, labels in batches:
      label = self.torch.from_numpy(labels).to(self.device).long()
      losses.append(self.twin.train_step(self.model, self.optimizer, self.prepared(images), label))
    return [loss.item() for loss in losses]

  def predict(self, images):
    """The classes of uint8 images."""
    with self.torch.inference_mode():
      return self.model(self.prepared(images)).argmax(-1).cpu().numpy()

  def start(self, images, labels):
    """Logits and gradient at the present weights, in full precision; the same again in float64."""
    torch = self.torch
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    label = torch.from_numpy(labels).to(self.device).long()
    found = {}
    for name, dtype in (('float32', torch.float32), ('float64', torch.float64)):
      module = copy.deepcopy(self.module).to(dtype)
      logits = module(self.prepared(images).to(dtype))
      names, parameters = zip(*module.named_parameters(), strict=True)
      gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, label), parameters)
      gradients = (gradient.cpu().numpy() for gradient in gradients)
      found[name] = logits.detach().cpu().numpy(), dict(zip(names, gradients, strict=True))
    return found

  def device_memory(self):
    """Peak bytes on a GPU, else None."""
    return self.torch.cuda.max_memory_allocated() if self.device.type == 'cuda' else None

  def describe(self):
    """Versions and device."""
    device = self.torch.cuda.get_device_name() if self.device.type == 'cuda' else 'cpu'
    return f'torch {self.torch.__version__}', device


def enlarged(images: np.ndarray, image_size: int) -> np.ndarray:
  """uint8 `[B, 28, 28, 1]` to `[B, image_size, image_size, 1]`: whole factor, then zeros on all sides."""
  factor = image_size // images.shape[1]
  images = images.repeat(factor, 1).repeat(factor, 2)
  before = (image_size - images.shape[1]) // 2
  after = image_size - images.shape[1] - before
  return np.pad(images, ((0, 0), (before, after), (before, after), (0, 0)))


def peak_memory() -> int:
  """Most bytes that this process has held in memory."""
  if sys.platform == 'linux':  # where ru_maxrss may be that of the process that started this one
    lines = pathlib.Path('/proc/self/status').read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM:'))
  import resource

  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def main() -> None:
  """Answers the parent's requests; `make` comes first."""
  side = data = options = None
  taken = 0

  def make(**given):
    nonlocal side, data, options, taken
    options = SimpleNamespace(**given)
    options.folder, taken = pathlib.Path(options.folder), options.first_step
    side = (JaxSide if options.side == 'jax' else TorchSide)(options)
    data = {path.stem: np.load(path, mmap_mode='r') for path in options.folder.glob('*.npy')}

  def batch(step):
    indices = data['order'][step]
    return enlarged(data['train_images'][indices], options.image_size), data['train_labels'][indices]

  def train(steps):
    nonlocal taken
    begin = time.perf_counter()
    losses = side.train(batch(step) for step in range(taken, taken + steps))
    taken += steps
    return losses, time.perf_counter() - begin

  def evaluate():
    begin = time.perf_counter()
    labels, predictions = data['test_labels'], []
    for first in range(0, len(labels), EVALUATION_BATCH):
      indices = np.arange(first, first + EVALUATION_BATCH)
      indices[indices >= len(labels)] = 0  # the last batch is filled up
      predictions.append(side.predict(enlarged(data['test_images'][indices], options.image_size)))
    predictions = np.concatenate(predictions)[: len(labels)]
    seconds = time.perf_counter() - begin
    np.save(options.folder / f'{options.side}.predictions', predictions)
    return float((predictions == labels).mean()), seconds

  def start():
    for precision, (logits, gradients) in side.start(*batch(taken)).items():
      np.savez(options.folder / f'{options.side}_{precision}.npz', logits=logits, **gradients)

  def memory():
    return peak_memory(), side.device_memory()

  def save():
    side.save(options.folder / 'weights.safetensors')

  functions = {'make': make, 'save': save, 'train': train, 'evaluate': evaluate, 'start': start, 'memory': memory}
  worker.serve(functions | {'describe': lambda: side.describe()})


if __name__ == '__main__':
  main()
