"""`--mode=export`: a folder with a trained network that other programs run. It needs nothing of this package."""

import importlib
import json
import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from googlenet_jax import loading, runs
from googlenet_jax.classifier import Classifier
from googlenet_jax.data import datasets
from googlenet_jax.data.splits import SPLITS, Split
from googlenet_jax.exporting import card as cards
from googlenet_jax.exporting import onnx_precision, place, readme
from googlenet_jax.exporting import sample as samples
from googlenet_jax.exporting.artefact import Artefact, Pictures
from googlenet_jax.exporting.formats import FORMATS, PRECISIONS
from googlenet_jax.host import console
from googlenet_jax.host.errors import MEMORY_OF_OTHERS, UserError, expanded, one_line, plain_troubles


def export_run(
  workdir: pathlib.Path,
  to: str,
  step: int | str | None = None,
  output: pathlib.Path | None = None,
  precision: str = 'float32',
  paths: Sequence[str] = (),
  data: Mapping[str, str] | None = None,
) -> None:
  """Writes a folder with the network, checks that it answers as ours does, and prints where it is.

  An older export in the same place is replaced. If anything fails, it stays, and nothing new is left.

  Args:
    workdir: folder of a run or an ensemble, or a file of PyTorch's weights.
    to: one of FORMATS.
    step: step of the checkpoint, 'best', or None for the newest.
    output: the folder; by default `export/TO` in the workdir.
    precision: one of PRECISIONS; the last two are for ONNX.
    paths: pictures to check on, as for `predict`. By default images of the run's test split.
    data: where the run's images are now, as for `loading.load`.

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
  goal = expanded(output) if output else (workdir if workdir.is_dir() else workdir.with_suffix('')) / 'export' / name
  with plain_troubles(MEMORY_OF_OTHERS, goal):
    goal = pathlib.Path(os.path.realpath(goal))
    place.check(goal)
    write = _writer(to)
    classifier = loading.load(workdir, step, data=data)
    pictures = _pictures(classifier, workdir, precision, paths)
    with place.filled(goal) as folder:
      at = f', step {max(classifier.steps)}' if classifier.steps else ''
      console.say(f'{one_line(workdir)}{at}: writing {to} and running it ...')
      expected = samples.ours(classifier, pictures.sample)
      artefact = write(classifier, folder)
      check = _check(artefact, pictures, expected, to)
      if precision != 'float32':
        artefact = onnx_precision.reduced(artefact, folder, precision, classifier, pictures)
        check = _check(artefact, pictures, expected, f'{to} in {precision}')
      _describe(folder, cards.make(classifier, workdir, to, artefact, check, pictures), artefact, pictures, expected)
  _say(goal, artefact, check)


def _writer(to: str) -> Any:
  """Returns the `write` of a format."""
  for package in FORMATS[to].packages:
    try:
      importlib.import_module(package)
    except ImportError as error:
      raise UserError(f"--to={to} needs the package {package}: pip install -e '.[{to}]'") from error
  return importlib.import_module(f'googlenet_jax.exporting.{FORMATS[to].module}').write


def _pictures(classifier: Classifier, workdir: pathlib.Path, precision: str, paths: Sequence[str]) -> Pictures:
  """Finds the images to check on. Only a lower precision needs the splits beside named pictures."""
  test = calibration = None
  if precision != 'float32' and not workdir.is_dir():
    raise UserError(
      f'--precision={precision} is measured on the test images of a run, and {workdir} is a file of weights: leave '
      'the flag out'
    )
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


def _check(artefact: Artefact, pictures: Pictures, expected: np.ndarray, what: str) -> dict[str, Any]:
  """Compares the answers with ours; returns the card's entry `check`."""
  found = samples.answers(artefact.run, pictures.sample)
  difference, accepted = samples.difference(found, expected), artefact.tolerance
  if not difference <= (np.finfo(np.float32).max if accepted is None else accepted):  # NaN is refused too
    raise UserError(
      f'nothing is kept: the answers of {what} differ from ours by up to {difference:.2g}'
      + (f', and {accepted:g} is accepted' if accepted else '')
    )
  return {
    'images': len(pictures.sample),
    'largest_difference': difference,
    'accepted': accepted,
    'largest_difference_in_sample': samples.difference(found[: samples.COUNT], expected[: samples.COUNT]),
    'compared_with': 'the probabilities of googlenet_jax, computed in float32',
  }


def _describe(
  folder: pathlib.Path, card: dict[str, Any], artefact: Artefact, pictures: Pictures, expected: np.ndarray
) -> None:
  """Writes what is the same for all formats."""
  count = samples.COUNT
  np.savez(folder / cards.SAMPLE, images=np.stack(pictures.sample[:count]), probabilities=expected[:count])
  (folder / cards.EXAMPLE).write_text(artefact.example)
  (folder / cards.README).write_text(readme.text(card, artefact), encoding='utf-8')
  card['files'] = {path.name: place.facts(path) for path in sorted(folder.iterdir()) if path.name != place.LOCK}
  (folder / cards.CARD).write_text(json.dumps(card, indent=2) + '\n')


def _say(goal: pathlib.Path, artefact: Artefact, check: dict[str, Any]) -> None:
  sizes = ', '.join(f'{name} ({(goal / name).stat().st_size / 1e6:.2f} MB)' for name in artefact.files)
  accepted = f' (accepted: {check["accepted"]:g})' if check['accepted'] else ''
  console.say(
    f'largest difference from our probabilities: {check["largest_difference"]:.1e} over {check["images"]} real images'
    f'{accepted}'
  )
  console.say(
    f'written to {one_line(goal)}: {sizes}, README.md, card.json, example.py, and sample.npz, which holds '
    f'{samples.COUNT} of these images'
  )
  console.say(f'try it: python {shlex.quote(one_line(goal / cards.EXAMPLE))}; README.md says how elsewhere')
