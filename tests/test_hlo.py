"""What `experiments/hlo.py` reads from compiled programs and traces."""

import collections
import types

import jax
import jax.numpy as jnp

from experiments import hlo, profile_step
from googlenet_jax.model import layers


def test_instructions_have_kinds_and_origins():
  x, kernel3 = jnp.ones((2, 16, 16, 8)), jnp.ones((3, 3, 8, 4))
  kernels, patched = [jnp.ones((8, 8)), jnp.ones((8, 4))], jnp.ones((3, 3, 8, 4))

  def loss(x, kernels, kernel3, patched):
    y, z = layers.pointwise(x, *kernels)
    small = layers.conv(layers.max_pool(y, 2)[:, :6, :6], patched)  # a product on a map of 6 pixels
    return layers.conv(layers.max_pool(y, 1), kernel3).sum() ** 2 + (z**2).sum() + (small**2).sum()

  before = jax.config.jax_traceback_in_locations_limit
  jax.config.update('jax_traceback_in_locations_limit', 10)  # conftest.py sets 0
  try:
    text = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, kernels, kernel3, patched).compile().as_text()
  finally:
    jax.config.update('jax_traceback_in_locations_limit', before)
  instructions = hlo.parse(text).values()
  kinds = collections.Counter(hlo.kind(instruction, {kernel3.size}) for instruction in instructions)
  for direction in ('forward', 'input gradient', 'kernel gradient'):
    assert kinds[f'1x1 product: {direction}'] == (2 if direction == 'forward' else 1)
    assert kinds[f'convolution, larger kernel: {direction}'] >= 1
  assert kinds['max-pool: forward'] >= 1
  assert kinds['max-pool: backward'] >= 1
  assert any('layers.max_pool' in instruction.functions for instruction in instructions)


def test_calls_of_cudnn_are_convolutions():
  text = 'custom_call_target="__cudnn$conv{}"'
  make = lambda call: hlo.Instruction('f32[7,7,1,64]', 'custom-call', 'jit(step)', (), text.format(call))
  kinds = [hlo.kind(make(call), set()) for call in ('Forward', 'BackwardInput', 'BackwardFilter')]
  directions = ('forward', 'input gradient', 'kernel gradient')
  assert kinds == [f'convolution, larger kernel: {direction}' for direction in directions]


def test_a_loop_counts_as_what_is_inside():
  def loop(x):
    return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=5)[0]

  instructions = hlo.parse(jax.jit(loop).lower(jnp.ones((8, 8))).compile().as_text())
  assert any(' dot(' in instruction.text for instruction in instructions.values())
  assert not any(instruction.op == 'while' for instruction in instructions.values())


def trace(**lines):
  """A trace of one GPU: events (kernel, instruction or None, nanoseconds) by name of the line."""
  simple = types.SimpleNamespace
  made = [
    simple(
      name=line.replace('_', ' '),
      events=[simple(name=k, stats=[('hlo_op', op)] if op else [], duration_ns=ns) for k, op, ns in events],
    )
    for line, events in lines.items()
  ]
  return simple(planes=[simple(name='/host:CPU', lines=made), simple(name='/device:GPU:0', lines=made)])


def test_the_trace_of_a_gpu_is_read_by_stream_and_instruction():
  text = """HloModule jit_step

FileNames
1 "/somewhere/googlenet_jax/model/gpu_layers.py"

FunctionNames
1 "max_pool"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

ENTRY %main.1 (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %pool.2 = f32[4]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(step)/transpose(jvp())/add" stack_frame_id=1}
  ROOT %conv.3 = f32[64]{0} custom-call(%pool.2), custom_call_target="__cudnn$convForward", window={size=1x1}
}
"""
  events = [('kernel_a', 'pool.2', 3_000_000), ('kernel_a', 'pool.2', 1_000_000), ('kernel_b', 'conv.3', 2_000_000)]
  data = trace(Stream_7=[*events, ('memcpy', None, 1_000_000)], XLA_Ops=events)
  found = hlo.profile(data, text, steps=2, kernel_sizes={64})
  assert found['dearest'][0] == ('pool.2', 2.0, 'max-pool: backward', 'gpu_layers.max_pool, backward', 'f32[4]')
  assert found['kinds'] == {'max-pool: backward': 2.0, '1x1 product: kernel gradient': 1.0, 'other': 0.5}
  assert found['launches'] == 2
  assert 'Ours: 4 ms and 2 instructions' in profile_step.jax_section({'wall': 4.0, **found})
