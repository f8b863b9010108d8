"""What the compiled training step exchanges between devices, and when: counted in the text of the program.

Nothing runs. XLA compiles for virtual devices of a CPU, and for GPUs and TPUs that are only described: for those it
needs the plugins of JAX (jax-cuda12-plugin and jax-cuda12-pjrt, libtpu), and no accelerator.
"""

import importlib.util
import json
import math
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from experiments import hlo, tables
from experiments.worker import ROOT
from googlenet_jax import recipe
from googlenet_jax.host import sharding
from googlenet_jax.training import optimizers
from googlenet_jax.training.state import create_state
from googlenet_jax.training.step import make_train_step

STEPS_PER_EPOCH = 100
KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')
BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}
MOST_CHANNELS = 2048  # a longer vector holds several kernels, flattened
MEGABYTE = 1e6

PLUGINS = {'cuda': 'jax_plugins.xla_cuda12', 'tpu': 'libtpu'}
OPTIONS = {
  'cpu': {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True},  # machine code is not used
  'cuda': {'xla_gpu_autotune_level': 0},  # tuning needs a GPU
  'tpu': None,
}
SHARE = {'cpu': 4, 'cuda': 256, 'tpu': 256}  # images on each device
# An H100 with 18 NVLinks, as far as XLA wants to know it. xla/backends/gpu/target_config/specs in openxla/xla has more.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation" cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32 threads_per_block_limit: 1024
  threads_per_core_limit: 2048 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 84942979072 pcie_bandwidth: 34359738368
  device_address_bits: 64 ecc_enabled: true device_interconnect_info { active_links: 18 }
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3" dnn_version_info { major: 9 minor: 10 }
"""


class Network(NamedTuple):
  """A network and its training, as compiled here."""

  config: str  # recipe in configs/
  keys: dict[str, Any] = {}  # keys that differ
  channels: int = 1
  num_classes: int = 10

  def recipe(self, batch_size: int, dtype: str) -> ConfigDict:
    """Returns the recipe with a batch for all devices together."""
    config = recipe.read(str(ROOT / 'configs' / f'{self.config}.py'))
    config.update_from_flattened_dict({**self.keys, 'batch_size': batch_size, 'dtype': dtype})
    return config


DEVICES = (1, 2, 4, 8, 16, 32, 64)
D2L = {"d2l's network, 32 px": Network('default', {'image_size': 32})}  # bytes are the same for any size of image
BATCH_NORM = {'batch normalisation, 32 px': Network('fashion_best')}
PAPER = {"the paper's network, 224 px": Network('paper', {'ensemble.members': 1}, channels=3, num_classes=1000)}
LARGE = {
  "d2l's network, 224 px": Network('default'),
  "d2l's network, 224 px, 4 micro-batches": Network('default', {'micro_batches': 4}),
}


class Exchange(NamedTuple):
  """One collective operation of a step."""

  kind: str  # one of KINDS
  kernels: int  # bytes of convolution kernels and matrices on one device
  vectors: int  # bytes of channels: batch statistics, biases, scales, and their gradients
  scalars: int  # bytes of losses and counts
  in_loop: bool
  convolutions: tuple[int, int, int]  # those of the backward pass: before it begins, while it runs, after it has ended

  @property
  def size(self) -> int:
    """Bytes on one device."""
    return self.kernels + self.vectors + self.scalars


def described_devices(platform: str, topology: str) -> list[Any]:
  """Returns devices to compile for that need not be there.

  Args:
    platform: 'cuda' or 'tpu'.
    topology: partitions x hosts x GPUs such as '1x1x8', or a slice such as 'v5e:4x2'.
  """
  options = {'topology': topology, 'target_config': H100} if platform == 'cuda' else {}
  return topologies.get_topology_desc(platform=platform, topology_name=topology, **options).devices


def lower_step(network: Network, devices: Sequence[Any], batch_size: int, dtype: str) -> tuple[Any, dict[str, int]]:
  """Traces and lowers the training step that main.py runs.

  Returns:
    The lowered step, and the numbers of values in kernels, vectors of parameters, and batch statistics.
  """
  config = network.recipe(batch_size, dtype)
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, STEPS_PER_EPOCH))
  here = sharding.make_mesh(jax.devices()[:1])
  graphdef, state = create_state(config, network.num_classes, network.channels, tx, here)
  mesh = Mesh(np.array(devices), (sharding.AXIS,), axis_types=(AxisType.Auto,))
  shape = lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
  state = jax.tree.map(lambda a: shape(a, sharding.whole(mesh)), state)
  side = config.image_size - 2 * config.augment.padding
  batch = {
    'image': jax.ShapeDtypeStruct((batch_size, side, side, network.channels), jnp.uint8),
    'label': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    'index': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  }
  batch = {name: shape(a, sharding.cut(mesh)) for name, a in batch.items()}
  params = jax.tree.leaves(state.params)
  values = {
    'kernels': sum(a.size for a in params if a.ndim > 1),
    'vectors': sum(a.size for a in params if a.ndim == 1),
    'statistics': sum(a.size for a in jax.tree.leaves(state.batch_stats)),
  }
  return make_train_step(graphdef, tx, config, mesh, STEPS_PER_EPOCH).lower(state, batch), values


def exchanges(text: str) -> list[Exchange]:
  """Finds every collective operation of a compiled program; one in a loop is counted once.

  An asynchronous operation is two instructions, `-start` and `-done`. Its result is that of `-done`. Instructions
  between them may run at the same time. What a loop contains stands before the rest, as in the text.
  """
  place = {match[1]: match.start() for match in re.finditer(r'^\s*(?:ROOT )?%([\w.\-]+) = ', text, re.MULTILINE)}
  instructions, entry = hlo.parse(text), text.index('\nENTRY ')
  backward = [place[name] for name, instruction in instructions.items() if _backward_convolution(instruction)]
  found = []
  for name, instruction in sorted(instructions.items(), key=lambda item: place[item[0]]):
    kind = instruction.op.removesuffix('-done')
    if kind not in KINDS:
      continue
    begin = end = place[name]
    if kind != instruction.op:
      begin = place[re.search(rf'{instruction.op}\([^%]*%([\w.\-]+)', instruction.text)[1]]
    before, done = (sum(at < limit for at in backward) for limit in (begin, end))
    convolutions = before, done - before, len(backward) - done
    found.append(Exchange(kind, *_sizes(instruction.shape), end < entry, convolutions))
  return found


def _sizes(shape: str) -> tuple[int, int, int]:
  """Bytes of kernels, of vectors, and of scalars in a shape or a tuple of shapes."""
  sizes = [0, 0, 0]
  for dtype, dimensions in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shape):
    lengths = [int(n) for n in dimensions.split(',') if n]
    count = math.prod(lengths)
    kind = 2 if not lengths else 0 if len(lengths) > 1 or count > MOST_CHANNELS else 1
    sizes[kind] += count * BYTES[dtype]
  return tuple(sizes)


def _backward_convolution(instruction: hlo.Instruction) -> bool:
  """Whether an instruction is a convolution or a matrix product of the backward pass."""
  product = any(call in instruction.text for call in (' convolution(', ' dot(', '__cudnn$conv', '__cublas'))
  return product and instruction.direction == 'backward'


def ring_bytes(found: Sequence[Exchange], devices: int) -> float:
  """Bytes that each device sends in a step if every collective operation goes around a ring.

  With n devices, the sum of S bytes sends 2 S (n - 1) / n from each device: every device adds up one n-th, and passes
  its sum on. To gather a result of S bytes sends S (n - 1) / n.
  """
  share = (devices - 1) / devices
  factors = {'all-reduce': 2 * share, 'all-gather': share, 'all-to-all': share, 'reduce-scatter': devices - 1}
  return sum(factors.get(each.kind, 1) * each.size for each in found)


def available(platform: str) -> bool:
  """Returns whether XLA can compile for a platform here."""
  try:
    return platform == 'cpu' or importlib.util.find_spec(PLUGINS[platform]) is not None
  except ModuleNotFoundError:
    return False


def compile_one(name: str, network: Network, platform: str, count: int) -> dict[str, Any]:
  """Compiles a step for `count` devices, and returns what it exchanges, as JSON values."""
  if platform == 'cpu':
    devices = jax.devices()[:count]
  else:
    topology = f'1x{-(-count // 8)}x{min(count, 8)}' if platform == 'cuda' else {8: 'v5e:4x2'}[count]
    devices = described_devices(platform, topology)
  begin, dtype = time.monotonic(), 'float32' if platform == 'cpu' else 'bfloat16'
  lowered, values = lower_step(network, devices, SHARE[platform] * count, dtype)
  found = exchanges(lowered.compile(OPTIONS[platform]).as_text())
  print(f'{name}, {platform}, {count} devices: {len(found)} exchanges, {time.monotonic() - begin:.0f} s', flush=True)
  record = {'network': name, 'platform': platform, 'devices': count, 'dtype': dtype, 'values': values}
  return {**record, 'ring_bytes': ring_bytes(found, count), 'exchanges': [each._asdict() for each in found]}


def exchanges_of(record: dict[str, Any]) -> list[Exchange]:
  """Returns the exchanges of a record."""
  return [Exchange(**each) for each in record['exchanges']]


def write(title: str, records: list[dict], head: list[str], lines: list[list[str]], path: pathlib.Path) -> None:
  """Writes the records as JSON, and a page with a table beside them."""
  parts = [f'# {title}\n', tables.written_by('jax', 'jaxlib') + '\n', tables.table(head, lines)]
  tables.publish('\n'.join(parts), path.with_suffix('.md'))
  path.with_suffix('.json').write_text(json.dumps(records) + '\n')


def stage_bytes(output: pathlib.Path) -> None:
  """Counts the bytes of a step for 1 to 64 devices; writes bytes.md and bytes.json."""
  first, *others = (D2L | BATCH_NORM | PAPER).items()
  cases = [(first, 'cpu', n) for n in DEVICES] + [(item, 'cpu', n) for item in others for n in (1, 8, 64)]
  cases += [(item, 'cuda', 64) for item in (first, *others) if available('cuda')]
  records = [compile_one(*item, platform, n) for item, platform, n in cases]
  head = ['network', 'program for', 'exchanges', 'kernels, MB', 'vectors, MB', 'scalars, bytes', 'parameters, MB']
  lines = []
  for record in records:
    found, values = exchanges_of(record), record['values']
    sums = [sum(getattr(each, field) for each in found) for field in ('kernels', 'vectors', 'scalars')]
    parameters = (4 if record['dtype'] == 'float32' else 2) * (values['kernels'] + values['vectors'])
    *megabytes, ring = [f'{size / MEGABYTE:.3f}' for size in (*sums[:2], parameters, record['ring_bytes'])]
    where = f'{record["devices"]} {"CPU" if record["platform"] == "cpu" else "GPU"}s, {record["dtype"]}'
    lines.append([record['network'], where, str(len(found)), *megabytes[:2], str(sums[2]), megabytes[2], ring])
  write('Bytes exchanged in a step', records, [*head, 'sent by a device, MB'], lines, output / 'bytes')


def stage_overlap(output: pathlib.Path) -> None:
  """Looks for exchanges beside the backward pass in the programs for eight devices."""
  cases = {'cuda': LARGE | BATCH_NORM | PAPER, 'tpu': D2L | BATCH_NORM}
  records = [
    compile_one(*item, platform, 8)
    for platform, networks in cases.items()
    for item in networks.items()
    if available(platform)
  ]
  if not records:
    print('overlap: neither jax-cuda12-plugin nor libtpu is here, see --help')
    return
  write_overlap(records, output)


def write_overlap(records: list[dict[str, Any]], output: pathlib.Path) -> None:
  """Writes overlap.md and overlap.json."""
  head = ['network', 'program for eight', 'exchanges of kernels', 'MB', 'beside backward convolutions, MB']
  head += ['after the last one, MB', 'exchanges of vectors', 'beside backward convolutions']
  lines = []
  for record in records:
    found = exchanges_of(record)
    large, small = [each for each in found if each.kernels], [each for each in found if each.vectors > each.kernels]
    size = lambda part: f'{sum(each.size for each in part) / MEGABYTE:.2f}'
    beside, late = [e for e in large if e.convolutions[1]], [e for e in large if not sum(e.convolutions[1:])]
    where = 'H100' if record['platform'] == 'cuda' else 'TPU v5e'
    waits = [str(len(small)), str(sum(e.convolutions[1] > 0 for e in small))]
    lines.append([record['network'], where, str(len(large)), size(large), size(beside), size(late), *waits])
  write('Exchanges beside the backward pass', records, head, lines, output / 'overlap')
