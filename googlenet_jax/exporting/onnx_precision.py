"""Smaller ONNX files: float16 and int8, with the accuracy that they cost.

Only the networks become smaller. The preparation of images and softmax stay in float32.

onnxruntime's converter to float16 does not serve. It rounds every value of a node to float16 and back also where the
node itself is kept in float32, so the preparation loses its exactness; and it leaves nodes in an order that ONNX's
checker refuses. Our own graph needs only casts before and after a network. For int8, onnxruntime's quantiser is used.
"""

import contextlib
import logging
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from googlenet_jax.classifier import Classifier
from googlenet_jax.data.splits import Split, pictures
from googlenet_jax.exporting import onnx_files, onnx_preparing
from googlenet_jax.exporting.artefact import Artefact, Pictures
from googlenet_jax.host import console, progress
from googlenet_jax.host.errors import UserError

BATCH = 64  # images that onnxruntime sees at once
CALIBRATION = 256  # images that say which range each map needs
LARGE_FALL = 0.01  # a larger fall of the accuracy gets a warning
MOST_FALL = 0.05  # more is refused: a file that bad is of no use, and calibration images are the likely reason
# A broken file can have the accuracy of a poor network. So it must say the same as float32 for this share of the
# images. The rest is for near ties, of which a network of a thousand classes has many.
LEAST_SAME = 0.8
# Largest difference of a probability that is accepted. In int8 near ties turn, so the two checks above must do.
TOLERANCES = {'float16': 0.05, 'int8': None}


def reduced(
  artefact: Artefact, folder: pathlib.Path, precision: str, classifier: Classifier, images: Pictures
) -> Artefact:
  """Replaces a file in float32 by one of lower precision, and prints what that costs.

  Args:
    artefact: the file in float32.
    folder: where it is.
    precision: 'float16' or 'int8'.
    classifier: what the file was made of.
    images: with the splits.

  Returns:
    The file of lower precision. Its facts have accuracies, bytes, and how it was made.

  Raises:
    UserError: there is no test split, or the answers to it are too different.
  """
  if images.test is None or images.calibration is None:
    raise UserError(
      f'--precision={precision} is measured on the test images of a run, and there are none: leave the flag out'
    )
  path = folder / onnx_files.FILE
  before, bytes_before = answers(artefact.run, images.test, 'float32'), path.stat().st_size
  if precision == 'float16':
    how = "weights and maps; LRN and softmax in float32; written by this program, because onnxruntime's converter "
    how += 'rounds the preparation of images as well'
    onnx_files.save(onnx_files.make_model(classifier, half=True), path)
  else:
    how = f'static quantisation by onnxruntime, calibrated on {min(CALIBRATION, len(images.calibration))} images, '
    how += 'weights with 7 bits and a scale per channel'
    with progress.waiting('calibrating int8'):
      quantise(path, images.calibration)
  run = onnx_files.runner(path)
  found = _compared(before, answers(run, images.test, precision), images.test.labels, precision)
  console.say(f'{path.name}: {path.stat().st_size / 1e6:.1f} MB, {bytes_before / 1e6:.1f} MB in float32')
  facts = artefact.facts | {'precision': precision, 'made': how, 'bytes_in_float32': bytes_before} | found
  return artefact._replace(run=run, tolerance=TOLERANCES[precision], facts=facts)


def _compared(before: np.ndarray, after: np.ndarray, labels: np.ndarray, precision: str) -> dict[str, Any]:
  """Compares the classes that two files say, prints that, and returns entries of the card.

  Raises:
    UserError: they differ too much.
  """
  old, new = (float((said == labels).mean()) for said in (before, after))
  same, count = float((before == after).mean()), len(labels)
  cost = f'accuracy {old:.4f} in float32, {new:.4f} in {precision}; the same class for {100 * same:.1f} % of the images'
  console.say(f'{cost} ({count:,} test images)')
  if same < LEAST_SAME or old - new > MOST_FALL:
    raise UserError(
      f'nothing is kept: {precision} costs too much ({cost}): at least {100 * LEAST_SAME:.0f} % the same, and at most '
      f'{100 * MOST_FALL:.0f} points of accuracy, are asked for'
    )
  if old - new > LARGE_FALL:
    console.complain(f'warning: {precision} costs {100 * (old - new):.1f} points of accuracy: compare with float32')
  return {
    'accuracy': {'split': 'test', 'images': count, 'float32': round(old, 6), precision: round(new, 6)},
    'same_class': {'share': round(same, 6), 'accepted': LEAST_SAME},
    'limits': [f'The network computes in {precision}: {cost}, over {count:,} test images, by onnxruntime on a CPU.'],
  }


def quantise(path: pathlib.Path, split: Split) -> None:
  """Replaces a file in float32 by one whose networks are int8: onnxruntime's static quantisation.

  Weights have a scale for each channel and seven bits. On a CPU without VNNI, sums of products of eight bits can
  overflow, and the answers would depend on the machine.

  Args:
    path: the file.
    split: CALIBRATION of its images say which range each map needs.
  """
  import onnx
  from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

  class Reader(CalibrationDataReader):
    """Gives one batch at each call, and None at the end."""

    def __init__(self):
      places = np.linspace(0, len(split) - 1, min(CALIBRATION, len(split))).astype(int)
      self._batches = (found for found, _ in batches(split, places))

    def get_next(self):
      found = next(self._batches, None)
      return None if found is None else {'images': found}

  before, prefix = onnx.load(path), f'{onnx_preparing.PART}/'
  kept = [n.name for n in before.graph.node if n.name.startswith(prefix) or n.op_type in ('Softmax', 'Mean')]
  with tempfile.TemporaryDirectory() as folder, _quiet():
    made = pathlib.Path(folder) / 'int8.onnx'
    quantize_static(
      path,
      made,
      Reader(),
      quant_format=QuantFormat.QDQ,
      per_channel=True,
      reduce_range=True,
      activation_type=QuantType.QUInt8,
      weight_type=QuantType.QInt8,
      nodes_to_exclude=kept,
    )
    model = onnx.load(made)
  del model.metadata_props[:]  # the quantiser adds notes to itself
  model.metadata_props.extend(before.metadata_props)
  onnx_files.save(model, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Hides what the quantiser logs: advice to simplify the graph, which has nothing to simplify."""
  before = logging.root.manager.disable
  logging.disable(logging.WARNING)
  try:
    yield
  finally:
    logging.disable(before)


def batches(split: Split, indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields images of one size each time, uint8 `[n, H, W, C]`, and their indices."""
  for start in range(0, len(indices), BATCH):
    part = indices[start : start + BATCH]
    by_size = {}
    for index, image in zip(part, pictures(split.batch(part)), strict=True):
      by_size.setdefault(image.shape, []).append((index, image))
    for found in by_size.values():
      own, images = zip(*found, strict=True)
      yield np.stack(images), np.array(own)


def answers(run: Callable[[np.ndarray], np.ndarray], split: Split, what: str) -> np.ndarray:
  """Returns the class that a file says for each image of a split, int64 `[len(split)]`.

  Args:
    run: uint8 `[N, H, W, C]` to probabilities `[N, num_classes]`.
    split: images.
    what: the file in words, for the line that says how far the work is.
  """
  found, done = np.empty(len(split), np.int64), 0
  status = lambda: f'{done:,} of {len(split):,} images'
  with progress.waiting(f'measuring the accuracy in {what}', status=status):
    for images, indices in batches(split, np.arange(len(split))):
      found[indices] = run(images).argmax(-1)
      done += len(images)
  return found
