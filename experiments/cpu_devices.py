"""One device for the whole CPU, or two: training steps of both by turns.

  python experiments/cpu_devices.py

Writes experiments/results/cpu_devices.md, on which `parallel.cpu_devices` rests.
"""

import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CASES = ((32, 256, 'none'), (96, 64, 'none'), (224, 16, 'none'), (32, 128, 'batch'))  # pixels, batch, norm
ROUNDS, STEPS, WARM_UP = 5, 4, 8


def worker(image_size: int, batch_size: int, norm: str, devices: int) -> None:
  """Compiles a step on so many devices; then, for every line read, prints the median seconds of a few steps."""
  import jax
  import numpy as np

  jax.config.update('jax_num_cpu_devices', devices)
  from configs import default
  from googlenet_jax import optimizers, parallel, train
  from googlenet_jax.state import create_state

  parallel.keep_freed_memory()
  parallel.use_compilation_cache()
  config = default.get_config()
  config.image_size, config.batch_size, config.model.norm = image_size, batch_size, norm
  mesh = parallel.make_mesh()
  tx = optimizers.make_optimizer(config, optimizers.learning_rate_schedule(config, 100))
  graphdef, state = create_state(config, 10, 1, tx, mesh)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch_size, 28, 28, 1), np.uint8)
  batch = parallel.shard_batch({'image': images, 'label': rng.integers(0, 10, batch_size).astype(np.int32)}, mesh)
  step = train.make_train_step(graphdef, tx, config, mesh)
  seconds = []
  for count in [WARM_UP] + [STEPS] * ROUNDS:
    if count == STEPS:
      input()
    for _ in range(count):
      begin = time.perf_counter()
      state, loss = step(state, batch)
      loss.block_until_ready()
      seconds.append(time.perf_counter() - begin)
    print(statistics.median(seconds[-count:]), flush=True)


def compare(case: tuple[int, int, str]) -> tuple[list[float], list[float]]:
  """Seconds a step, of every round, on one device and on two."""
  workers = []
  for devices in (1, 2):
    command = [sys.executable, __file__, *map(str, case), str(devices)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()  # warm, before the next one starts
    workers.append(process)
  seconds = ([], [])
  for _ in range(ROUNDS):
    for process, found in zip(workers, seconds, strict=True):
      process.stdin.write('\n')
      process.stdin.flush()
      found.append(float(process.stdout.readline()))
  for process in workers:
    process.communicate()
  return seconds


def main() -> None:
  """Prints and writes the table."""
  import jax

  cores = len(os.sched_getaffinity(0))
  lines = [
    f'Measured by `python experiments/cpu_devices.py`: jax {jax.__version__}, {cores} CPU cores, float32; medians of',
    f'{ROUNDS} rounds of {STEPS} steps after {WARM_UP} of warm-up, one device and two by turns.',
    '',
    '| image size | batch | norm | 1 device, images/s | 2 devices | ratio, median and range of the rounds |',
    '|---|---|---|---|---|---|',
  ]
  for image_size, batch_size, norm in CASES:
    one, many = compare((image_size, batch_size, norm))
    ratios = sorted(a / b for a, b in zip(one, many, strict=True))
    one, many = (batch_size / statistics.median(s) for s in (one, many))
    spread = f'{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})'
    lines.append(f'| {image_size} | {batch_size} | {norm} | {one:.0f} | {many:.0f} | {spread} |')
  text = '\n'.join(lines) + '\n'
  print(text)
  (ROOT / 'experiments' / 'results' / 'cpu_devices.md').write_text(text)


if __name__ == '__main__':
  if len(sys.argv) > 1:
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
  else:
    main()
