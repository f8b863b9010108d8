"""Counting in compiled programs, and the model, against values worked out by hand."""

import math

import jax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from experiments import scaling_model, scaling_programs
from experiments.scaling_model import Job, all_reduce_seconds, step_seconds
from experiments.scaling_programs import Exchange
from googlenet_jax.host import sharding

# As XLA writes a scheduled program: two sums beside the backward pass or behind it, one of statistics before it.
PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: f32[4]) -> f32[4] {
  %state = f32[4]{0} parameter(0)
  ROOT %rolled = f32[4]{0} collective-permute(%state), channel_id=9, source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (image: f32[8,4,4,2]) -> f32[] {
  %image = f32[8,4,4,2]{3,2,1,0} parameter(0)
  %forward = f32[8,4,4,3]{3,2,1,0} convolution(%image, %image), metadata={op_name="jit(step)/jvp()/conv"}
  %means = (f32[3]{0:T(128)S(1)}, f32[3]{0:T(128)S(1)}) all-reduce(%forward, %forward), channel_id=1, to_apply=%add
  %first = bf16[3,3,2,5]{3,2,1,0} convolution(%image, %forward), metadata={op_name="jit(step)/transpose(jvp())/conv"}
  %all-reduce-start.1 = bf16[3,3,2,5]{3,2,1,0} all-reduce-start(%first), channel_id=2, to_apply=%add
  %second = bf16[2,7]{1,0} dot(%image, %forward), metadata={op_name="jit(step)/transpose(jvp())/dot"}
  %all-reduce-done.1 = bf16[3,3,2,5]{3,2,1,0} all-reduce-done(%all-reduce-start.1)
  %last = (bf16[2,7]{1,0}, f32[5000]{0}, f32[]) all-reduce(%second, %means, %means), channel_id=3, to_apply=%add
  %loop = f32[4]{0} while(%means), condition=%add, body=%body
  ROOT %gathered = s32[16,2]{1,0} all-gather(%image), channel_id=4, dimensions={0}
}
"""


def test_exchanges_are_counted_in_the_text_of_a_program():
  assert scaling_programs.exchanges(PROGRAM) == [
    Exchange('collective-permute', 0, 16, 0, True, (0, 0, 2)),
    Exchange('all-reduce', 0, 24, 0, False, (0, 0, 2)),
    Exchange('all-reduce', 180, 0, 0, False, (1, 1, 0)),
    Exchange('all-reduce', 28 + 20_000, 0, 4, False, (2, 0, 0)),
    Exchange('all-gather', 128, 0, 0, False, (2, 0, 0)),
  ]
  # Around a ring of 4: three quarters of the sums twice, three quarters of the gathered array, the rolled one once.
  assert scaling_programs.ring_bytes(scaling_programs.exchanges(PROGRAM), 4) == 1.5 * 20_236 + 0.75 * 128 + 16


def test_exchanges_are_counted_in_a_program_of_xla(mesh_of):
  mesh = mesh_of(2)

  def step(kernel, image):
    gradient = jax.grad(lambda kernel: (image @ kernel).sum())(kernel)
    return lax.psum(gradient, sharding.AXIS), lax.all_gather(image, sharding.AXIS)

  mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(sharding.AXIS)), out_specs=P(), check_vma=False)
  shapes = [jax.ShapeDtypeStruct(shape, 'float32') for shape in ((5, 7), (6, 5))]
  found = scaling_programs.exchanges(jax.jit(mapped).lower(*shapes).compile().as_text())
  assert sorted((each.kind, each.size) for each in found) == [('all-gather', 4 * 6 * 5), ('all-reduce', 4 * 5 * 7)]


# The model -----------------------------------------------------------------------------------------------------------


def test_a_sum_over_gpus_takes_latency_and_bytes():
  assert all_reduce_seconds(1e9, 1, 12.0) == 0
  # Small sums: the tree with protocol LL, 7 steps down and up inside a node, and log2 of the nodes between them.
  assert all_reduce_seconds(0, 8, 12.0) == pytest.approx((6.6 + 14 * 0.6) * 1e-6)
  assert all_reduce_seconds(0, 64, 12.0) == pytest.approx((6.8 + 2 * (7 * 0.6 + 3 * 5.0)) * 1e-6)
  # Large sums: a ring, whose slowest link each byte passes 2 (n - 1) / n times.
  assert all_reduce_seconds(1e12, 64, 12.0) == pytest.approx(2 * 63 / 64 * 1e12 / 12e9, rel=1e-3)
  assert all_reduce_seconds(1e12, 8, 12.0) == pytest.approx(2 * 7 / 8 * 1e12 / (18 * 20.6e9), rel=1e-3)


def test_convolutions_hide_what_is_exchanged_beside_them():
  job = Job('a job', 'a network', 256, 0.03)
  alone = all_reduce_seconds(1e6, 64, 12.0)
  exchange = lambda *convolutions: Exchange('all-reduce', 10**6, 0, 0, False, convolutions)
  assert step_seconds(job, [], 64, 12.0) == 0.03
  assert step_seconds(job, [exchange(5, 0, 5)] * 2, 64, 12.0) == pytest.approx(0.03 + 2 * alone)
  assert step_seconds(job, [exchange(5, 5, 0)], 64, 12.0) == 0.03  # beside half of the backward pass, 10 ms
  assert step_seconds(job, [exchange(0, 1, 9_999)], 64, 12.0) == pytest.approx(0.03 + alone - 0.02 / 10_000)
  assert step_seconds(job, [], 64, 12.0, share=0.125) == 0.03 / 8


def test_efficiency_falls_with_more_gpus_and_slower_networks():
  exchanges = [Exchange('all-reduce', 12 * 10**6, 0, 0, False, (9, 0, 0))]
  rows = scaling_model.efficiencies({scaling_model.JOBS[0]: exchanges})
  weak = [row['efficiency'] for row in rows if row['scaling'] == 'weak']
  fast, slow = weak[0], weak[-1]
  assert all(0 < value < 1 for row in rows for value in row['efficiency'])
  assert fast == sorted(fast, reverse=True)
  assert all(a >= b for a, b in zip(fast, slow, strict=True))
  assert math.isclose(fast[0], rows[1]['efficiency'][0])  # both batches are the same on eight GPUs
