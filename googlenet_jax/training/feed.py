"""How the training step gets its batches, and how many steps one call of the devices takes.

Where a data set is small and a step is not too long, the data set lies on the devices and a call takes several steps,
which then wait neither for the host nor for images. Otherwise the host prepares and sends the batch of each step.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from googlenet_jax.data import pipeline
from googlenet_jax.data.splits import Split
from googlenet_jax.host import console, sharding
from googlenet_jax.training.plan import Plan
from googlenet_jax.training.state import TrainState

MOST_STEPS = 10  # in a call, where the recipe does not say
# Multiply-adds of a call on each device, at most. A signal is answered after three calls. They take about two seconds
# on a GPU that does 4e12 multiply-adds a second, and a fraction of one on a large GPU.
CALL_WORK = 2.5e12
# A data set may take this much memory on each device: Fashion-MNIST takes 47 MB.
RESIDENT_BYTES = 2**30
WAITS = 1.2  # decoding is the bottleneck if it could not be this much faster than training


class BetweenStepsError(Exception):
  """Something failed between two steps; the cause says what. What was trained so far is fine, and must be saved."""


@contextlib.contextmanager
def between_steps() -> Iterator[None]:
  """Raises what fails inside the block, or the decorated function, as BetweenStepsError."""
  try:
    yield
  except Exception as error:
    raise BetweenStepsError from error


def is_small(split: Split) -> bool:
  """Returns whether a data set is in memory and small enough to lie on every device."""
  return split.in_memory and split.images.nbytes <= RESIDENT_BYTES


def decoding_speed(split: Split, batch_size: int) -> dict[str, float]:
  """Returns how many images a second the host could decode since the last call, for a log point.

  Empty for a data set in memory. The training step runs at the same time, on the same processor if that is a CPU.
  """
  one = None if split.in_memory else split.images.pace.take()
  return {} if one is None else {'decoded_per_second': one * pipeline.ahead(split, batch_size)[0]}


def bottleneck(record: dict[str, Any]) -> str:
  """Says whether training waits for decoding; empty for a data set in memory."""
  speed = record.get('decoded_per_second')
  if speed is None:
    return ''
  waits = speed < WAITS * record['examples_per_second']
  return f'decoding {"is the bottleneck" if waits else "keeps up"} (at most {speed:.0f} images/s)'


def most_steps(config: ConfigDict, split: Split, multiply_adds: int, mesh: Mesh) -> int:
  """Returns the most steps that a call may take; `steps_per_call` of the recipe decides if it is set.

  Args:
    config: the recipe.
    split: training images.
    multiply_adds: in the network, for one image.
    mesh: devices that share a batch.
  """
  if not is_small(split):
    return 1
  if config.steps_per_call:
    return config.steps_per_call
  if mesh.devices.flat[0].platform == 'cpu':
    return 1
  forward = multiply_adds * config.batch_size / mesh.size
  step = 3 * forward  # the backward pass costs two forward passes
  return min(MOST_STEPS, max(1, int(CALL_WORK / step)))


def call_ends(first_step: int, last_step: int, most: int, every: Sequence[int]) -> Iterator[int]:
  """Yields the number of steps taken after each call.

  Calls take `most` steps or one, because each length is a program of its own. No call goes beyond a multiple of a
  number in `every`, where the loop has something to do.

  Args:
    first_step: steps taken before the first call.
    last_step: steps taken after the last call.
    most: steps in a long call.
    every: numbers of steps; 0 stands for none.
  """
  step = first_step
  while step < last_step:
    stop = min([last_step, *((step // n + 1) * n for n in every if n)])
    step += most if stop - step >= most else 1
    yield step


def best_length(last_step: int, most: int, every: Sequence[int]) -> int:
  """Returns the number of steps in a long call, at most `most`, that makes the fewest calls.

  Args:
    last_step: steps in all.
    most: largest length.
    every: see `call_ends`.
  """
  some = min(last_step, 20 * max(every))  # about the same afterwards
  return min(range(1, most + 1), key=lambda length: (sum(1 for _ in call_ends(0, some, length, every)), length))


def calls(
  plan: Plan, state: TrainState, one_step: Callable[..., Any], several_steps: Callable[..., Any]
) -> Iterator[tuple[int, Callable[..., Any], tuple[Any, ...]]]:
  """Compiles the training step for a state, and returns the calls that train from there to the last step.

  Args:
    plan: what does not change.
    state: where training stands.
    one_step: from `step.make_train_step`.
    several_steps: from `step.make_train_steps`.

  Returns:
    Iterator over the steps taken after a call, the compiled function, and its arguments after the state. It raises
    BetweenStepsError if the images of a later step cannot be had.
  """
  config = plan.config
  every = (plan.steps_per_epoch, config.log_every_steps, config.checkpoint_every_steps)
  most = most_steps(config, plan.dataset.train, plan.classifier.multiply_adds, plan.mesh)
  length = best_length(plan.last_step, most, every)
  if length == 1:
    return _guarded(_streamed(plan, state, one_step))
  return _guarded(_resident(plan, state, several_steps, length, every))


def _guarded(calls):
  with between_steps():
    yield from calls


def _streamed(plan, state, one_step):
  first = int(state.step)
  batches = pipeline.train_batches(plan.dataset.train, plan.config.batch_size, int(state.seed), first, plan.mesh)
  batch = next(batches)
  compiled = one_step.lower(state, batch).compile()
  steps = range(first + 1, plan.last_step + 1)
  return ((step, compiled, (batch,)) for step, batch in zip(steps, itertools.chain([batch], batches), strict=False))


def _resident(plan, state, several_steps, length, every):
  first, seed, split, batch_size = int(state.step), int(state.seed), plan.dataset.train, plan.config.batch_size
  data = sharding.replicate(split.batch(np.s_[:]), plan.mesh)
  megabytes = sum(array.nbytes for array in data.values()) / 1e6
  console.say(f'{length} steps a call; the training images are in the memory of each device ({megabytes:.2g} MB)')

  def spans():
    return itertools.pairwise([first, *call_ends(first, plan.last_step, length, every)])

  def indices(begin, end):
    batches = [pipeline.train_indices(step, len(split), batch_size, seed) for step in range(begin, end)]
    share = pipeline.my_share(np.stack(batches))
    return jax.make_array_from_process_local_data(sharding.cut_steps(plan.mesh), share)

  compiled = {}
  for begin, end in spans():
    if end - begin not in compiled:
      compiled[end - begin] = several_steps.lower(state, data, indices(begin, end)).compile()
  return ((end, compiled[end - begin], (data, indices(begin, end))) for begin, end in spans())
