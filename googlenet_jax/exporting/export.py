"""`--mode=export`: a folder with a trained network that other programs run. It needs nothing of this package."""

import contextlib
import importlib
import json
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from googlenet_jax import loading, runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import datasets
from googlenet_jax.data.splits import SPLITS, Split
from googlenet_jax.exporting import card as cards
from googlenet_jax.exporting import sample as samples
from googlenet_jax.exporting.artefact import Artefact, Pictures
from googlenet_jax.host import console
from googlenet_jax.host.errors import MEMORY_OF_OTHERS, UserError, expanded, one_line, plain_troubles, reason

# Format: module that writes it, and packages that it needs beside those of every run.
FORMATS = {
  'stablehlo': ('stablehlo', ()),
  'onnx': ('onnx_files', ('onnx', 'onnxruntime')),
  'torch': ('torch_files', ('torch', 'safetensors')),
}
PRECISIONS = ('float32', 'float16', 'int8')
TEMPORARY = '.export_'  # begins the name of a folder that is being written
LEFT_SECONDS = 3600.0  # after which such a folder was left by a kill
SEEN = ('__pycache__', '.DS_Store')  # what programs leave in a folder that they looked at


def export_run(
  workdir: pathlib.Path,
  to: str,
  step: int | str | None = None,
  output: pathlib.Path | None = None,
  precision: str = 'float32',
  paths: Sequence[str] = (),
) -> None:
  """Writes a folder with the network, checks that it answers as ours does, and prints where it is.

  An older export in the same place is replaced. If anything fails, it stays, and nothing new is left.

  Args:
    workdir: folder of a run or an ensemble, or a file of PyTorch's weights.
    to: one of FORMATS.
    step: step of the checkpoint, 'best', or None for the newest.
    output: the folder; by default `export/TO` in the workdir.
    precision: 'float32'; for ONNX also 'float16' and 'int8'.
    paths: pictures to check on, as for `predict`. By default images of the run's test split.

  Raises:
    UserError: there is no such run, its images are not here, the folder cannot be written or holds other things, a
      package is missing, or the answers differ.
  """
  if to not in FORMATS:
    raise UserError(f'--to={to}: choose from {", ".join(FORMATS)}')
  if precision not in PRECISIONS or (precision != 'float32' and to != 'onnx'):
    raise UserError(f'--precision={precision}: choose from {", ".join(PRECISIONS)}; the last two are for --to=onnx')
  workdir = expanded(workdir)
  name = to if precision == 'float32' else f'{to}_{precision}'
  place = expanded(output) if output else (workdir if workdir.is_dir() else workdir.with_suffix('')) / 'export' / name
  with plain_troubles(MEMORY_OF_OTHERS, place):
    place = pathlib.Path(os.path.realpath(place))
    _check_place(place)
    write = _writer(to)
    classifier = loading.load(workdir, step)
    pictures = _pictures(classifier, workdir, precision, paths)
    options = {'precision': precision} if precision != 'float32' else {}
    with _folder(place) as folder:
      at = f', step {max(classifier.steps)}' if classifier.steps else ''
      console.say(f'{one_line(workdir)}{at}: writing {to} and running it ...')
      artefact = write(classifier, folder, pictures, **options)
      check = _fill(folder, classifier, workdir, to, artefact, pictures)
  _say(place, artefact, check)


def _writer(to: str) -> Any:
  """Returns the `write` of a format."""
  module, packages = FORMATS[to]
  for package in packages:
    try:
      importlib.import_module(package)
    except ImportError as error:
      raise UserError(f"--to={to} needs the package {package}: pip install -e '.[{to}]'") from error
  return importlib.import_module(f'googlenet_jax.exporting.{module}').write


def _pictures(classifier: Classifier, workdir: pathlib.Path, precision: str, paths: Sequence[str]) -> Pictures:
  """Finds the images to check on. Only a lower precision needs the splits beside named pictures."""
  test = calibration = None
  if workdir.is_dir() and (precision != 'float32' or not paths):
    test, calibration = _splits(classifier, workdir, precision)
  if paths:
    images, names = samples.of_paths(paths, classifier)
  elif test is not None:
    images, names = samples.of_split(test)
  else:
    raise UserError(
      f'{workdir} is a file of weights, and an export is checked on real images: name at least {samples.COUNT} '
      'pictures, or a folder of them, after the flags'
    )
  return Pictures(*samples.choose(images, names), test, calibration)


def _splits(classifier: Classifier, workdir: pathlib.Path, precision: str) -> tuple[Split, Split | None]:
  """Loads the test split, and for a lower precision the images that it is calibrated on."""
  calibrated = precision != 'float32'
  used = SPLITS if calibrated else ('test',)
  try:
    dataset = datasets.load(**classifier.recipe.data, **runs.data_of(runs.members(workdir)), used=used)
  except UserError as error:
    advice = '' if calibrated else f'; or name at least {samples.COUNT} pictures, or a folder of them, after the flags'
    raise UserError(f'{error}{advice}') from error
  return dataset.test, (dataset.validation or dataset.train) if calibrated else None


def _fill(
  folder: pathlib.Path, classifier: Classifier, workdir: pathlib.Path, to: str, artefact: Artefact, pictures: Pictures
) -> dict[str, Any]:
  """Compares the answers, and writes what is the same for all formats; returns the card's entry `check`."""
  expected = samples.ours(classifier, pictures.sample)
  found = samples.answers(artefact.run, pictures.sample)
  difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else float('inf')
  if not difference <= artefact.tolerance:  # NaN is refused too
    raise UserError(
      f'nothing is kept: the answers of {to} differ from ours by up to {difference:.2g}, and {artefact.tolerance:g} is '
      'accepted'
    )
  count = samples.COUNT
  check = {
    'images': len(pictures.sample),
    'largest_difference': difference,
    'accepted': artefact.tolerance,
    'compared_with': 'the probabilities of googlenet_jax, computed in float32',
  }
  np.savez(folder / cards.SAMPLE, images=np.stack(pictures.sample[:count]), probabilities=expected[:count])
  card = cards.make(classifier, workdir, to, artefact, check, pictures.names[:count])
  (folder / cards.EXAMPLE).write_text(artefact.example)
  (folder / cards.README).write_text(cards.readme(card, to, artefact), encoding='utf-8')
  card['files'] = cards.files_of(folder)
  (folder / cards.CARD).write_text(json.dumps(card, indent=2) + '\n')
  return check


def _say(place: pathlib.Path, artefact: Artefact, check: dict[str, Any]) -> None:
  sizes = ', '.join(f'{name} ({(place / name).stat().st_size / 1e6:.2f} MB)' for name in artefact.files)
  console.say(
    f'largest difference from our probabilities: {check["largest_difference"]:.1e} over {check["images"]} real images '
    f'(accepted: {check["accepted"]:g})'
  )
  console.say(
    f'written to {one_line(place)}: {sizes}, README.md, card.json, example.py, and sample.npz, which holds '
    f'{samples.COUNT} of these images'
  )
  console.say(f'try it anywhere: pip install {" ".join(artefact.needs)}; python {one_line(place / cards.EXAMPLE)}')


# The folder ----------------------------------------------------------------------------------------------------------


def _check_place(place: pathlib.Path) -> None:
  """Refuses a place that cannot be replaced, or holds what is no export.

  Raises:
    UserError: says which.
  """
  if not os.path.lexists(place):
    return
  if not place.is_dir():
    raise UserError(f'{place} is a file: give a folder by --output')
  if os.path.ismount(place):
    raise UserError(f'{place} is a mount point, which cannot be replaced: give a folder in it, such as {place}/export')
  there = {path.name for path in place.iterdir()} - set(SEEN)
  try:
    own = {cards.CARD, *json.loads((place / cards.CARD).read_text(encoding='utf-8'))['files']}
  except (OSError, ValueError, TypeError, KeyError):
    own = set()
  if others := sorted(there - own):
    more = f' and {len(others) - 3} more' if others[3:] else ''
    raise UserError(
      f'{place} holds {", ".join(others[:3])}{more}, which is no export: give another folder by --output, or empty it'
    )


@contextlib.contextmanager
def _folder(place: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a folder to fill beside `place`, which then replaces it whole. After a failure nothing of it is left."""
  parent = place.parent
  made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
  try:
    parent.mkdir(parents=True, exist_ok=True)
    _remove_left(parent)
    folder = parent / f'{TEMPORARY}{secrets.token_hex(6)}'
    folder.mkdir()
  except OSError as error:
    raise UserError(f'{place} cannot be written ({reason(error)}): give another folder by --output') from error
  try:
    yield folder
    _check_place(place)  # somebody may have written there meanwhile
    _replace(folder, place)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # somebody may use them by now
      for empty in made:
        empty.rmdir()
    raise


def _replace(folder: pathlib.Path, place: pathlib.Path) -> None:
  old = folder.with_name(f'{folder.name}_old')
  before = place.exists()
  if before:
    place.rename(old)
  try:
    folder.rename(place)
  except BaseException:
    if before:
      old.rename(place)
    raise
  shutil.rmtree(old, ignore_errors=True)


def _remove_left(parent: pathlib.Path) -> None:
  """Removes folders that killed programs were writing."""
  for path in parent.glob(f'{TEMPORARY}*'):
    with contextlib.suppress(FileNotFoundError):  # just renamed
      if time.time() - path.stat().st_mtime > LEFT_SECONDS:
        shutil.rmtree(path, ignore_errors=True)
