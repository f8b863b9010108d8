"""Reads `evaluation.json`, which an evaluation of the test images leaves in the workdir."""

import pathlib
from typing import Any

import numpy as np

from googlenet_jax.host import files

FILE = 'evaluation.json'
ROW = {'models': int, 'crops': int, 'top1_error': float, 'top5_error': float}  # what a row of its table must hold


def read(workdir: pathlib.Path, num_classes: int) -> dict[str, Any]:
  """Returns the content; empty if nobody evaluated the run, or if the file is damaged or about other classes.

  Rows of `table` that are damaged are left out.

  Args:
    workdir: folder of a run or an ensemble.
    num_classes: number of classes of the run.
  """
  found = files.read_json(workdir / FILE)
  try:
    matrix = np.array(found['confusion_matrix'])
    whole = matrix.shape == (num_classes, num_classes) and matrix.dtype.kind == 'i' and matrix.min() >= 0
    whole &= found['split'] == 'test' and 0 <= found['accuracy'] <= 1 and found['examples'] == matrix.sum()
    whole &= all(type(found[key]) is kind for key, kind in {'step': int, 'models': int, 'loss': float}.items())
  except (KeyError, TypeError, ValueError):
    return {}
  rows = found.get('table')
  return found | {'table': [row for row in rows if _is_row(row)] if isinstance(rows, list) else []} if whole else {}


def _is_row(row: Any) -> bool:
  return (
    isinstance(row, dict)
    and all(type(row.get(key)) is kind for key, kind in ROW.items())
    and 0 <= row['top1_error'] <= 1
  )
