"""A model of efficiency on many GPUs: the time of a step on one, and of the exchanges between them.

Nothing here is measured on more than one GPU. The model shows which of the terms matters, and from how many GPUs on.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

from experiments import tables
from experiments.scaling_programs import Exchange
from experiments.tables import table
from googlenet_jax.evaluation import drawing

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
GPUS_A_NODE = 8
BACKWARD = 2 / 3  # share of a step: each convolution has one product forward and two backward
PICTURE = tables.ROOT / 'docs' / 'pictures' / 'scaling.png'

# How NCCL itself estimates the time of a sum over all GPUs, to choose an algorithm: microseconds by protocol (LL,
# LL128, Simple), from src/graph/tuning.cc and topo.h in NVIDIA/nccl at commit b647562. Left out: NVLink SHARP, which
# would be faster, and corrections of the tree's bandwidth, which would be slower.
BASE = {'ring': (6.6, 14.0, 8.4), 'tree': (6.8, 14.0, 0.0)}
NVLINK = {'ring': (0.6, 1.9, 3.4), 'tree': (0.6, 1.25, 28.0)}  # a step between two GPUs of a node
NETWORK = {'ring': (2.7, 4.0, 14.0), 'tree': (5.0, 8.5, 28.0)}  # a step between two nodes
NETWORK_OVERHEAD = (1.0, 1.0, 3.0)  # the least for each step of a ring across nodes
RING_SHARE = (1 / 4, 0.92, 1.0)  # share of the bandwidth that a protocol reaches
TREE_SHARE = (0.92 / 3.8, 0.92 * 120 / 128, 0.92)
NVLINK_BANDWIDTH = 18 * 20.6  # GB/s of the 18 links of an H100 or H200, in each direction


class Cluster(NamedTuple):
  """Nodes of eight GPUs with NVLink, and the network between them."""

  name: str
  bandwidth: float  # GB/s of a node, in each direction: 12 for each 100 Gb/s, as NCCL counts


CLUSTERS = (Cluster('8 x 400 Gb/s a node', 384.0), Cluster('100 Gb/s a node', 12.0), Cluster('25 Gb/s a node', 3.0))


class Job(NamedTuple):
  """A training whose speed on one GPU was measured."""

  name: str
  network: str  # in overlap.json
  images: int  # in a step on one GPU
  seconds: float  # a step on one H200, from results/gpu/speed.md


JOBS = (
  Job("d2l's network, 224 px, 256 images a GPU", "d2l's network, 224 px", 256, 256 / 17_657),
  Job('batch normalisation, 32 px, 256 images a GPU', 'batch normalisation, 32 px', 256, 256 / 33_344),
)


def all_reduce_seconds(size: float, gpus: int, bandwidth: float) -> float:
  """Estimates the time to add arrays of all GPUs, by the fastest of NCCL's rings and trees.

  Args:
    size: bytes on each GPU.
    gpus: number of GPUs, a multiple of 8 or fewer than 8.
    bandwidth: what the network of a node carries, in GB/s.
  """
  if gpus == 1:
    return 0.0
  nodes = -(-gpus // GPUS_A_NODE)
  bus = NVLINK_BANDWIDTH if nodes == 1 else min(NVLINK_BANDWIDTH, bandwidth)
  steps, between = 2 * (gpus - 1), 2 * nodes if nodes > 1 else 0
  times = []
  for protocol in range(3):
    inside = NVLINK['ring'][protocol]
    if nodes > 1:
      inside = max(inside, NETWORK_OVERHEAD[protocol])
    latency = BASE['ring'][protocol] + (steps - between) * inside + between * NETWORK['ring'][protocol]
    times.append((latency, bus * RING_SHARE[protocol] * gpus / steps))
    inside, outside = NVLINK['tree'][protocol], NETWORK['tree'][protocol]
    latency = BASE['tree'][protocol] + 2 * ((gpus // nodes - 1) * inside + int(math.log2(nodes)) * outside)
    times.append((latency, bus * TREE_SHARE[protocol] / 2))
  return min(1e-6 * latency + size / (1e9 * speed) for latency, speed in times)


def step_seconds(job: Job, found: list[Exchange], gpus: int, bandwidth: float, share: float = 1.0) -> float:
  """Estimates the time of a step: what one GPU computes, and the exchanges that nothing hides.

  An exchange is hidden by the backward convolutions beside it, each of which takes an equal part of the backward pass.

  Args:
    job: the training.
    found: its exchanges.
    gpus: number of GPUs.
    bandwidth: what the network of a node carries, in GB/s.
    share: part of the job's images that each GPU has; its computing is that much shorter.
  """
  computing = share * job.seconds
  waiting = 0.0
  for each in found:
    hidden = BACKWARD * computing * each.convolutions[1] / max(1, sum(each.convolutions))
    waiting += max(0.0, all_reduce_seconds(each.size, gpus, bandwidth) - hidden)
  return computing + waiting


def efficiencies(jobs: dict[Job, list[Exchange]]) -> list[dict[str, Any]]:
  """Efficiency by job, cluster, scaling and number of GPUs; 1 would be N times as fast as one GPU.

  Weak scaling keeps the images of a GPU. Strong scaling keeps the batch, which is that of eight GPUs.
  """
  rows = []
  for job, found in jobs.items():
    for cluster in CLUSTERS:
      for kind in ('weak', 'strong'):
        shares = [8 / gpus if kind == 'strong' else 1.0 for gpus in GPUS]
        times = [step_seconds(job, found, gpus, cluster.bandwidth, s) for gpus, s in zip(GPUS, shares, strict=True)]
        values = [share * job.seconds / time for share, time in zip(shares, times, strict=True)]
        rows.append({'job': job.name, 'cluster': cluster.name, 'scaling': kind, 'efficiency': values})
  return rows


def stage_model(output: pathlib.Path) -> None:
  """Writes model.json, model.md and the picture."""
  path = output / 'overlap.json'
  if not path.exists():
    print(f'model: {path} is missing: run --stage=overlap first')
    return
  records = {r['network']: r for r in json.loads(path.read_text()) if r['platform'] == 'cuda'}
  jobs = {job: [Exchange(**each) for each in records[job.network]['exchanges']] for job in JOBS}
  rows = efficiencies(jobs)
  (output / 'model.json').write_text(json.dumps(rows) + '\n')
  head = ['', 'between nodes', 'scaling', *(f'{gpus}' for gpus in GPUS)]
  lines = [[r['job'], r['cluster'], r['scaling'], *(f'{v:.2f}' for v in r['efficiency'])] for r in rows]
  parts = [
    '# Efficiency on many GPUs, by the model\n',
    tables.written_by() + '\n',
    table(head, lines),
    table(['milliseconds of a step, weak scaling', 'between nodes', 'computing', *map(str, GPUS)], time_lines(jobs)),
    table(['sum over all GPUs, microseconds', 'between nodes', *map(str, GPUS)], all_reduce_lines()),
  ]
  tables.publish('\n'.join(parts), output / 'model.md')
  drawing.save(PICTURE, draw, rows)


def time_lines(jobs: dict[Job, list[Exchange]]) -> list[list[str]]:
  """What a step waits for exchanges, in milliseconds."""
  lines = []
  for job, found in jobs.items():
    for cluster in CLUSTERS:
      waits = [1e3 * (step_seconds(job, found, gpus, cluster.bandwidth) - job.seconds) for gpus in GPUS]
      lines.append([job.name, cluster.name, f'{1e3 * job.seconds:.2f}', *(f'+{wait:.2f}' for wait in waits)])
  return lines


def all_reduce_lines() -> list[list[str]]:
  """Times of a small and of a large sum."""
  names = {4_000: '4 kB, a layer of batch normalisation', 12_000_000: '12 MB, all gradients in bfloat16'}
  lines = []
  for size, name in names.items():
    for cluster in CLUSTERS:
      times = [1e6 * all_reduce_seconds(size, gpus, cluster.bandwidth) for gpus in GPUS]
      lines.append([name, cluster.name, *(f'{time:,.0f}' for time in times)])
  return lines


def draw(rows: list[dict[str, Any]]) -> drawing.Figure:
  """Draws efficiency against the number of GPUs: weak scaling on the left, strong scaling on the right."""
  figure = drawing.new_figure(4.2, 'Efficiency on many GPUs: a model, not a measurement')
  colours = dict(zip([c.name for c in CLUSTERS], (drawing.TRAIN, drawing.VALIDATION, drawing.TEST), strict=True))
  styles = dict(zip([job.name for job in JOBS], ('-', '--'), strict=True))
  for place, kind in zip(figure.subplots(1, 2, sharey=True), ('weak', 'strong'), strict=True):
    for row in rows:
      if row['scaling'] == kind:
        place.plot(GPUS, row['efficiency'], styles[row['job']], color=colours[row['cluster']], marker='.')
    title = 'the batch grows: 256 images a GPU' if kind == 'weak' else 'the batch stays: 2,048 images'
    place.set_title(title, fontsize=drawing.NORMAL)
    place.set_xscale('log', base=2)
    place.set_xticks(GPUS, [f'{gpus}' for gpus in GPUS])
    place.set_ylim(0, 1.02)
    place.grid(alpha=0.3)
    efficiency = 'images/s of N GPUs / (N x images/s of one)'
    drawing.label_axes(place, 'N: GPUs, 8 in a node', efficiency if kind == 'weak' else '')
  plain = lambda style, colour, name: place.plot([], [], style, color=colour, label=name)
  for name, colour in colours.items():
    plain('-', colour, name)
  for name, style in styles.items():
    plain(style, drawing.LEARNING_RATE, name.rpartition(', ')[0])
  figure.legend(loc='outside lower center', ncols=3, fontsize=drawing.SMALL)
  return figure
