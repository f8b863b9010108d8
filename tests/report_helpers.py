"""What the tests of the report share: a small run, and a reader of the page."""

import base64
import collections
import contextlib
import dataclasses
import html.parser
import io
import json
import re

import jax
import numpy as np
import pytest
from helpers import least_table, random_state, small_config, small_digits, write_run
from PIL import Image

from googlenet_jax import runs
from googlenet_jax.data import datasets
from googlenet_jax.data.splits import Split
from googlenet_jax.model import googlenet

SIZE = 17  # pixels: the last map has 2x2 cells
CLASSES = (
  '<script>alert(1)</script>', 'a "quoted" & \'other\'', 'שלום עולם', '日本 🦊👩‍👩‍👧', 'x' * 200, 'two\nlines',
  '</style>', '--><!--', '\u202eturned', 'plain',
)  # fmt: skip
VOID = ('br', 'img', 'link', 'meta', 'wbr')


class Page(html.parser.HTMLParser):
  """Reads a page; every element must be closed in turn."""

  def __init__(self, text):
    super().__init__()
    self.open, self.elements, self.texts = [], [], collections.defaultdict(str)
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    names = [name for name, _ in attrs]
    assert len(names) == len(set(names))
    self.elements.append((tag, dict(attrs), tuple(self.open)))
    if tag not in VOID:
      self.open.append((tag, len(self.elements) - 1))

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs), tuple(self.open)))

  def handle_endtag(self, tag):
    assert self.open.pop()[0] == tag

  def handle_data(self, data):
    for _, number in self.open:
      self.texts[number] += data

  def all(self, tag, **attributes):
    return [
      (number, attrs)
      for number, (name, attrs, _) in enumerate(self.elements)
      if name == tag and all(attrs.get(key) == value for key, value in attributes.items())
    ]

  def inside(self, number, tag):
    return [
      attrs for name, attrs, parents in self.elements if name == tag and number in [parent for _, parent in parents]
    ]


def pixels(source):
  kind, data = re.fullmatch('data:image/(png|jpeg);base64,(.*)', source).groups()
  with Image.open(io.BytesIO(base64.b64decode(data))) as image:
    assert image.format.lower() == kind
    return np.asarray(image)


@contextlib.contextmanager
def small_runs():
  """A small network, one device, and few digits whose classes and files have odd names."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(googlenet, 'TABLE', least_table())
    digits = small_digits()
    names = np.array([f'in/<b>{number} & "é"_.png' for number in range(104)])
    test = Split(digits.test.images, digits.test.labels, files=names)
    digits = dataclasses.replace(digits, class_names=CLASSES, test=test)
    patch.setattr(datasets, 'load', lambda **_: digits)
    devices = jax.devices()[:1]
    patch.setattr(jax, 'devices', lambda: devices)
    patch.setattr(jax, 'local_devices', lambda: devices)
    yield


def make_run(folder, seed=0, **changes):
  config = small_config(image_size=SIZE, **changes)
  write_run(folder, config, (7, random_state(config, seed), None, True))
  runs.write(folder, runs.Run(config, CLASSES, (8, 8, 1), {'cpu_cores': 2, 'devices': 1, 'device': 'cpu'}))
  record = {'step': 5, 'epoch': 0.5, 'loss': 2.0, 'accuracy': 0.25, 'learning_rate': 0.1, 'examples_per_second': 9.0}
  lines = [
    {**record, 'split': split, 'step': step, 'epoch': step / 10, 'accuracy': step / 20}
    for step in (5, 10, 15)
    for split in ('train', 'validation', 'test')
  ]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return folder
