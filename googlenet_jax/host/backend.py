"""Starts JAX, and gives a run the same settings of JAX whatever the user's environment says."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import backend

from googlenet_jax.host import console, distributed
from googlenet_jax.host.errors import UserError, reason

# Settings on which the numbers of a run depend, or without which its programs cannot be traced or compiled.
OURS: dict[str, Any] = {
  'jax_default_prng_impl': 'threefry2x32',
  'jax_disable_jit': False,  # the training step is compiled before the clock starts
  'jax_enable_x64': False,
  'jax_legacy_prng_key': 'allow',
  'jax_no_execution': False,
  'jax_no_tracing': False,
  'jax_numpy_dtype_promotion': 'standard',
  'jax_numpy_rank_promotion': 'allow',
  'jax_threefry_partitionable': True,
  'jax_transfer_guard_device_to_device': 'allow',
  'jax_transfer_guard_device_to_host': 'allow',
  'jax_transfer_guard_host_to_device': 'allow',
}
# The same, but JAX cannot set them for one thread.
EVERYWHERE: dict[str, Any] = {
  'jax_custom_vjp3': False,  # this and the next ones with a 3 are work in progress of JAX
  'jax_error_checking_behavior_divide': 'ignore',
  'jax_error_checking_behavior_nan': 'ignore',
  'jax_error_checking_behavior_oob': 'ignore',
  'jax_random_seed_offset': 0,
  'jax_refs_to_pins': False,
  'jax_remat3': False,
  'jax_scan3': False,
}


_lock = threading.Lock()
_before: list[dict[str, Any]] = []  # settings before each block that is open now; the first ones are the user's


@contextlib.contextmanager
def our_settings() -> Iterator[None]:
  """Inside the block, or the decorated function, this thread has our settings of JAX. Other threads keep theirs."""
  with contextlib.ExitStack() as stack:
    for name, value in OURS.items():
      stack.enter_context(getattr(jax, name.removeprefix('jax_'))(value))
    yield


@contextlib.contextmanager
def our_settings_everywhere() -> Iterator[None]:
  """Inside the block all threads have our settings of JAX. The user is told of those that were others.

  Blocks of several threads may overlap: the last one that ends brings the user's settings back.
  """
  ours = {name: value for name, value in {**OURS, **EVERYWHERE}.items() if hasattr(jax.config, name)}
  with _lock:
    before = {name: getattr(jax.config, name) for name in ours}
    _before.append(before)
  values = {name: getattr(value, 'value', value) for name, value in before.items()}  # some are enums
  others = [f'{name}={value}' for name, value in values.items() if value not in (None, ours[name])]
  if others:
    console.complain(f'note: a training does not follow these settings of JAX: {", ".join(others)}')
  try:
    with _lock:
      _set(ours)
    yield
  finally:
    with _lock:
      before = _before.pop()
      if not _before:
        _set(before)


def _set(values: dict[str, Any]) -> None:
  for name, value in values.items():
    jax.config.update(name, value)


def start() -> None:
  """Starts JAX on its devices.

  Raises:
    UserError: it cannot start; the text names the platforms of this machine.
  """
  try:
    jax.devices()
    jax.device_put(0).block_until_ready()
  except Exception as error:  # an AssertionError without text is among them
    names = ('JAX_PLATFORMS', 'JAX_PLATFORM_NAME', 'JAX_DEFAULT_DEVICE', 'JAX_NUM_CPU_DEVICES')
    told = ' '.join(f'{name}={os.environ[name]}' for name in names if os.environ.get(name))
    text = reason(error)
    if told:  # JAX looks for `gpu` as `rocm` in the end, and its advice is the one below
      text = re.sub(r" \(set JAX_PLATFORMS='' .*?\)", '', text)
    if not str(error) or (told and 'not in the list of known backends' in text):
      text = 'there is no such platform'
    if 'latforms present' not in text:  # then nothing has started
      text = f'{text}. Platforms present are: {_platforms()}'
    advice = f'; {told} in the environment asks for something else: leave it out' if told else ''
    raise UserError(f'JAX cannot start: {text}{advice}') from error
  distributed.introduce()


def _platforms() -> str:
  """Returns the platforms with which JAX can start, and leaves JAX as it was before it started."""
  settings = {'jax_platforms': None, 'jax_num_cpu_devices': -1}
  before = {name: getattr(jax.config, name) for name in settings}
  try:
    for name, value in settings.items():
      jax.config.update(name, value)
    return ', '.join(backend.backends())
  except Exception as error:
    return f'none ({reason(error)})'
  finally:
    backend.clear_backends()
    for name, value in before.items():
      jax.config.update(name, value)
