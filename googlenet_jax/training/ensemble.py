"""An ensemble: runs of one recipe that differ in the order of images and in every random choice (section 7)."""

import concurrent.futures
import json
import pathlib
from typing import Any

import jax

from googlenet_jax.data import datasets
from googlenet_jax.data.splits import Dataset
from googlenet_jax.host import checkpoints, console
from googlenet_jax.host.errors import UserError
from googlenet_jax.host.signals import StopRequest
from googlenet_jax.training import loop


def members(config: Any, workdir: pathlib.Path) -> list[tuple[Any, pathlib.Path]]:
  """Recipe and folder of every member; a single run is its own only member."""
  count = config.ensemble.members
  if count == 1:
    return [(config, workdir)]
  out = []
  for member in range(count):
    recipe = config.copy_and_resolve_references()
    recipe.ensemble.member = member
    out.append((recipe, workdir / f'member_{member}'))
  return out


def ended(recipe: Any, folder: pathlib.Path) -> bool:
  """Whether the run in a folder has ended, as long as the recipe is, and its last checkpoint is there."""
  try:
    summary = json.loads((folder / 'summary.json').read_text())
    steps, epochs = summary['steps'], summary['epochs']
  except (OSError, ValueError, KeyError, TypeError):
    return False
  kept = (folder / 'checkpoints' / f'{steps}').is_dir()
  return kept and (epochs >= recipe.epochs or 0 < recipe.max_steps <= steps)


def train_members(config: Any, workdir: pathlib.Path) -> None:
  """Trains every member; goes on with the members and steps where it stopped.

  They train one after another over all devices, or with `ensemble.side_by_side` at the same time, each on its own
  equal share of the devices. A recipe of one member is trained in `workdir` itself.

  Raises:
    UserError: as `loop.train`; side by side is asked for over several processes; a member has ended that was trained
      for another number of epochs or steps.
    SystemExit: interrupted by a signal, after saving.
  """
  runs = members(config, workdir)
  other, what = ('member_*', 'an ensemble') if len(runs) == 1 else ('checkpoints', 'a single run')
  if any(workdir.glob(other)):
    raise UserError(
      f'{workdir} holds {what}, and config.ensemble.members={len(runs)} would train another kind of run in it: '
      'give another --workdir, or the members that it has'
    )
  if len(runs) == 1:
    loop.train(config, workdir)
    return
  left = []
  for recipe, folder in runs:
    recipe.check_same(recipe, folder)
    if ended(recipe, folder):
      recipe.check_length(recipe, folder)
      console.say(f'{_name(recipe)}: has ended, in {folder}')
    else:
      left.append((recipe, folder))
  if not left:
    return
  dataset = datasets.load(**config.data)
  with StopRequest() as stop:
    if config.ensemble.side_by_side:
      _train_side_by_side(left, dataset, stop)
    else:
      if len(left) > 1:
        console.say(f'{len(left)} members to train, one after another; what each says of time is for itself')
      for recipe, folder in left:
        console.say(f'{_name(recipe)}: in {folder}')
        _train_one(recipe, folder, None, dataset, stop)
        if stop.signal:
          break
    if stop.signal and not all(ended(recipe, folder) for recipe, folder in left):
      stop.exit()


def _name(recipe: Any) -> str:
  return f'member {recipe.ensemble.member} of {recipe.ensemble.members}'


def _train_one(recipe, folder, devices, dataset, stop) -> None:
  folder.mkdir(exist_ok=True)
  with checkpoints.lock(folder):
    loop.train(recipe, folder, devices, stop, dataset)


def _train_side_by_side(runs: list[tuple[Any, pathlib.Path]], dataset: Dataset, stop: StopRequest) -> None:
  """A thread for each share of the devices; each trains some of the members, one after another."""
  if jax.process_count() > 1:
    raise UserError('config.ensemble.side_by_side is for one process: leave it out, members then use all processes')
  devices = jax.devices()
  # Of all members, not of those that are left: a run goes on with as many devices as it began with.
  count = min(runs[0][0].ensemble.members, len(devices))
  share = len(devices) // count
  failed = {}

  def work(place: int) -> None:
    for recipe, folder in runs[place::count]:
      if stop.signal:
        return
      console.prefix.set(f'{recipe.ensemble.member}: ')
      try:
        _train_one(recipe, folder, devices[place * share : (place + 1) * share], dataset, stop)
      except Exception as error:  # the others go on; told at once, for they may take hours
        console.say(f'error: {error}')
        failed[recipe.ensemble.member] = error

  shares = min(count, len(runs))
  if count == 1:
    console.say('config.ensemble.side_by_side: there is one device, so that the members train one after another')
  else:
    console.say(f'{len(runs)} members on {shares} shares of the devices, of {share} each; lines begin with the member')
  with concurrent.futures.ThreadPoolExecutor(shares) as pool:
    futures = [pool.submit(work, place) for place in range(shares)]
  for future in futures:
    future.result()
  for error in failed.values():
    if not isinstance(error, UserError | OSError):  # not of the user's making: with its traceback
      raise error
  if failed:
    raise UserError(
      f'of members {", ".join(map(str, sorted(failed)))} the training failed, see above; the same command goes on with '
      'what is left'
    )
