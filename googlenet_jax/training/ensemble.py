"""Trains a recipe: one network, or an ensemble (section 7 of the paper). Members differ in their random choices."""

import concurrent.futures
import os
import pathlib
import signal

import jax
from ml_collections import ConfigDict

from googlenet_jax import recipe, recipe_checks, runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import datasets
from googlenet_jax.data.splits import Dataset
from googlenet_jax.host import backend, cache, console, distributed, files, processes
from googlenet_jax.host.errors import UserError, expanded, plain_troubles
from googlenet_jax.host.signals import StopRequest
from googlenet_jax.loading import load
from googlenet_jax.training import finetune, loop


def train(config: ConfigDict | str | os.PathLike, workdir: str | os.PathLike) -> Classifier:
  """Trains a recipe in a folder, or continues what stopped there.

  Args:
    config: the recipe, or the path of a recipe file.
    workdir: folder of the run; made if it is missing.

  Returns:
    The trained classifier.

  Raises:
    UserError: something that the user can correct.
    SystemExit: interrupted by a signal, after saving.
    KeyboardInterrupt: the same, in a notebook whose kernel is interrupted.
  """
  config = config if isinstance(config, ConfigDict) else recipe.read(str(config))
  workdir = expanded(workdir)
  config = finetune.with_network_of_source(config, workdir)
  recipe_checks.validate(config)
  cache.use_compilation_cache()
  with backend.our_settings_everywhere(), distributed.together(distributed.place()):
    recipe_checks.check_alike(config)
    if not trains_apart(config):
      distributed.join()
    backend.start()
    train_in(config, workdir)
    return load(workdir)


def trains_apart(config: ConfigDict) -> bool:
  """Returns whether members of an ensemble train at the same time, so each process trains some of them alone."""
  return config.ensemble.side_by_side and config.ensemble.members > 1


def train_in(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Trains a checked recipe in a folder that no other run may use meanwhile; see `train`."""
  if config.data.source_dir:  # the run can then be evaluated from any folder
    config = config.copy_and_resolve_references()
    config.data.source_dir = str(expanded(config.data.source_dir, 'config.data.source_dir').absolute())
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'--workdir={workdir} cannot be made: {error.strerror}') from error
  with plain_troubles(loop.MEMORY, workdir), files.lock(workdir), StopRequest() as stop:
    train_members(config, workdir, stop)


def members(config: ConfigDict, workdir: pathlib.Path) -> list[tuple[ConfigDict, pathlib.Path]]:
  """Returns recipe and folder of every member; a single run is its only member."""
  count = config.ensemble.members
  if count == 1:
    return [(config, workdir)]
  out = []
  for member in range(count):
    own = config.copy_and_resolve_references()
    own.ensemble.member = member
    out.append((own, workdir / f'member_{member}'))
  return out


def train_members(config: ConfigDict, workdir: pathlib.Path, stop: StopRequest) -> None:
  """Trains every member, and continues with the members and steps where training stopped.

  Members train in turn over all devices of all processes. With `ensemble.side_by_side` they train at the same time:
  each process takes some of them, and gives each its own equal share of its devices. A recipe of one member is trained
  in `workdir` itself.

  Raises:
    UserError: as `loop.train`; a member has ended after another number of epochs or steps.
    SystemExit: interrupted by a signal, after saving.
  """
  all_members = members(config, workdir)
  single = len(all_members) == 1
  other, what = ('member_*', 'an ensemble') if single else ('checkpoints', 'a single run')
  if any(workdir.glob(other)):
    raise UserError(
      f'{workdir} holds {what}, and config.ensemble.members={len(all_members)} would train another kind of run there: '
      'give another --workdir, or the number of members that it has'
    )
  left = all_members if single else not_ended(all_members)
  if not left:
    return
  if single:
    loop.train(config, workdir, stop)
  else:
    dataset = datasets.load(**config.data, **runs.data_of([folder for _, folder in all_members]))
    (_train_side_by_side if config.ensemble.side_by_side else _train_in_turn)(left, dataset, stop)
  if _stops(stop) and not all(runs.ended(own, folder) for own, folder in left):
    stop.exit()


def not_ended(all_members: list[tuple[ConfigDict, pathlib.Path]]) -> list[tuple[ConfigDict, pathlib.Path]]:
  """Returns the members whose training has not ended.

  Raises:
    UserError: another recipe trained a member, or it ended after another number of epochs or steps.
  """
  left = []
  for config, folder in all_members:
    runs.check_resumable(config, folder)
    if not runs.ended(config, folder):
      left.append((config, folder))
      continue
    before, now = recipe.flatten(runs.read(folder).config), recipe.flatten(config)
    differing = [name for name in recipe.LENGTH if before[name] != now[name]]
    if differing:
      text = '; '.join(f'{name}: {before[name]} there, {now[name]} now' for name in differing)
      raise UserError(
        f'{folder} has ended as a run of another length ({text}), and members are trained alike: give the same values, '
        'or another --workdir'
      )
    console.say(f'{_name(config)}: has ended, in {folder}')
  numbers = processes.of_first([config.ensemble.member for config, _ in left])  # others may see the folders later
  return [all_members[number] for number in numbers]


def _name(config: ConfigDict) -> str:
  return f'member {config.ensemble.member} of {config.ensemble.members}'


def _train_one(config, folder, stop, dataset, devices=None) -> None:
  folder.mkdir(exist_ok=True)
  with files.lock(folder):
    loop.train(config, folder, stop, devices, dataset)


def _stops(stop: StopRequest) -> bool:
  """Returns whether a signal came to any process. All processes call this."""
  number = max(processes.gather(int(stop.signal or 0)))
  if number and not stop.signal:
    stop.signal = signal.Signals(number)
  return number > 0


def _train_in_turn(left: list[tuple[ConfigDict, pathlib.Path]], dataset: Dataset, stop: StopRequest) -> None:
  if len(left) > 1:
    console.say(f'training {len(left)} members in turn; times are per member')
  for config, folder in left:
    console.say(f'{_name(config)}: in {folder}')
    _train_one(config, folder, stop, dataset)
    if _stops(stop):
      break


def _train_side_by_side(left: list[tuple[ConfigDict, pathlib.Path]], dataset: Dataset, stop: StopRequest) -> None:
  """Trains every member in one process; see `train_members`."""
  place, many = processes.index(), processes.count()
  if jax.process_count() > 1:  # Orbax cannot save a run of one process then
    raise UserError(
      'config.ensemble.side_by_side: JAX has connected these processes by itself, as on Cloud TPU, and then members '
      'train in turn: leave it out'
    )
  if many > 1:
    console.say(f'training {len(left)} members on {many} processes; lines begin with the member')
  with processes.alone():  # each process prints what its members say
    failed = _train_on_shares(left[place::many], -(-left[0][0].ensemble.members // many), dataset, stop, many == 1)
  with stop.holding():  # a signal that comes now is passed on to the others, whose members are not saved yet
    everywhere = sorted(sum(processes.gather([*failed]), []))  # waits for them
  for error in failed.values():
    if not isinstance(error, UserError | OSError):  # not a mistake of the user: show the traceback
      raise error
  if everywhere:
    raise UserError(
      f'training failed for members {", ".join(map(str, everywhere))}, see above; the same command continues with what '
      'is left'
    )


def _train_on_shares(
  left: list[tuple[ConfigDict, pathlib.Path]], most: int, dataset: Dataset, stop: StopRequest, says: bool
) -> dict[int, Exception]:
  """Gives each share of the devices of this process a thread, which trains some of the members in turn.

  Args:
    left: members of this process that are left to train; there may be none.
    most: members that a process has at most. They all count, not only those that are left: a resumed run must have as
      many devices as before.
    dataset: the data set.
    stop: when its signal comes, all members are saved.
    says: whether to say what the shares are.

  Returns:
    What went wrong, by member.
  """
  devices = jax.devices()
  count = min(most, len(devices))
  share, shares = len(devices) // count, min(count, len(left))
  failed = {}

  def work(place: int) -> None:
    for config, folder in left[place::count]:
      if stop.signal:
        return
      console.prefix.set(f'{config.ensemble.member}: ')
      try:
        _train_one(config, folder, stop, dataset, devices[place * share : (place + 1) * share])
      except Exception as error:  # the others continue; this is shown now, because they may take hours
        console.say(f'error: {error}')
        failed[config.ensemble.member] = error

  if says and count == 1:
    console.say('config.ensemble.side_by_side: there is one device, so members train in turn')
  elif says:
    console.say(f'training {len(left)} members on {shares} shares of {share} devices; lines begin with the member')
  with concurrent.futures.ThreadPoolExecutor(max(shares, 1)) as pool:  # waits: after a signal the members end
    for future in [pool.submit(work, place) for place in range(shares)]:
      future.result()
  return failed
