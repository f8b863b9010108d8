"""Mutated files that others make: data sets, pictures, weights; and functions that read them. See `hostile_own.py`."""

import contextlib
import gzip
import io
import json
import os
import pathlib
import pickle
import random
import struct

import numpy as np

from experiments.mutations import as_json, mutate, mutate_zip, with_png_checksums


class Evil:
  """Unpickling it runs a program."""

  def __reduce__(self):
    return os.system, ('touch executed',)


class Reader:
  """One kind of file."""

  suffix = ''

  def __init__(self, folder: pathlib.Path):
    """Makes the seeds; `folder` is for files."""
    self.folder = folder
    self.path = folder / f'input{self.suffix}'
    self.seeds: list[bytes] = []

  def make(self, rng: random.Random) -> bytes:
    """Returns the bytes of an input."""
    return mutate(rng.choice(self.seeds), self.seeds, rng)

  def read(self, data: bytes) -> str:
    """Reads an input; returns what came out, in a word."""
    self.path.write_bytes(data)
    self.read_file()
    return 'read'

  def read_file(self) -> None:
    """Reads `self.path`."""
    raise NotImplementedError


class _Idx(Reader):
  """The original files of Fashion-MNIST."""

  suffix = '.gz'

  def __init__(self, folder):
    super().__init__(folder)
    images, labels = np.arange(5 * 9, dtype=np.uint8), np.arange(5, dtype=np.uint8)
    self.plain = [struct.pack('>HBBIII', 0, 8, 3, 5, 3, 3) + images.tobytes()]
    self.plain += [struct.pack('>HBBI', 0, 8, 1, 5) + labels.tobytes()]
    self.plain += [struct.pack('>HBBIII', 0, 8, 3, 2**31, 28, 28), struct.pack('>HBB', 0, 8, 255) + b'\1' * 1100]
    self.seeds = [gzip.compress(plain, 1, mtime=0) for plain in self.plain]
    self.bomb = gzip.compress(self.plain[0], 1, mtime=0) + gzip.compress(bytes(1 << 20), 9, mtime=0) * 200

  def make(self, rng):
    if rng.random() < 0.0002:
      return self.bomb
    if rng.random() < 0.7:
      return gzip.compress(mutate(rng.choice(self.plain), self.plain, rng), 1, mtime=0)
    return super().make(rng)

  def read_file(self):
    from googlenet_jax.data import preparing

    assert preparing.read_idx(self.path).dtype == np.uint8


class _Pictures(Reader):
  """Pictures of every kind that is read."""

  def __init__(self, folder):
    from PIL import Image

    super().__init__(folder)
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 255, (9, 7), np.uint8))
    colour = Image.fromarray(rng.integers(0, 255, (8, 11, 3), np.uint8))
    some = [grey, colour, colour.convert('P'), colour.convert('RGBA'), colour.convert('CMYK'), grey.convert('1')]
    some += [Image.fromarray(rng.integers(0, 65535, (5, 6), np.uint16)), grey.convert('F'), colour.convert('LAB')]
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {'JPEG': {'exif': exif}, 'TIFF': {'compression': 'tiff_lzw'}, 'PNG': {'exif': exif}}
    for kind in ('PNG', 'JPEG', 'GIF', 'BMP', 'PPM', 'WEBP', 'TIFF'):
      for image in some:
        for extra in ({}, options.get(kind, {})):
          data = io.BytesIO()
          with contextlib.suppress(OSError, ValueError, KeyError):  # not every format has every kind of pixels
            image.save(data, kind, **extra)
            self.seeds.append(data.getvalue())
    frames = io.BytesIO()
    grey.save(frames, 'GIF', save_all=True, append_images=[grey.rotate(90, expand=True)] * 3)
    self.seeds += [frames.getvalue(), *(b'P5 %d %d 255\n' % size + bytes(9) for size in ((3, 3), (10**9, 10**9)))]

  def make(self, rng):
    data = super().make(rng)
    return with_png_checksums(data) if data[:4] == b'\x89PNG' and rng.random() < 0.7 else data

  def read_file(self):
    from googlenet_jax.data import pictures
    from googlenet_jax.host.errors import UserError

    with contextlib.suppress(UserError):
      assert len(pictures.header(self.path)) == 3
    pixels = pictures.read(self.path, 3, 64)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert max(pixels.shape) <= 64


class _Torch(Reader):
  """PyTorch's files."""

  suffix = '.pth'

  def __init__(self, folder):
    import torch

    super().__init__(folder)
    tensors = {
      'conv1.weight': torch.ones(2, 1, 3, 3), 'logits.bias': torch.zeros(4), 'half': torch.ones(3).bfloat16(),
      'count': torch.tensor(7), 'sparse': torch.eye(2).to_sparse(), 'view': torch.arange(12.0).view(3, 4).t(),
    }  # fmt: skip
    for some in (tensors, {'x': torch.ones(2)}, [torch.ones(1)], {'state_dict': {'x': torch.ones(1)}}):
      for old in (True, False):
        data = io.BytesIO()
        torch.save(some, data, _use_new_zipfile_serialization=not old)
        self.seeds.append(data.getvalue())
    self.seeds += [pickle.dumps(Evil(), protocol=2), pickle.dumps({'x': Evil()}, protocol=2)]
    self.evil = [pickle.dumps(Evil(), protocol=2), b"cos\nsystem\n(S'touch executed'\ntR.", b'cbuiltins\neval\n.']

  def make(self, rng):
    data = rng.choice(self.seeds)
    if data[:2] != b'PK' or rng.random() < 0.3:
      return mutate(data, self.seeds, rng)

    def change(name, inside):
      if name.endswith('data.pkl') and rng.random() < 0.1:
        return rng.choice(self.evil)
      return mutate(inside, [inside, *self.evil], rng)

    return mutate_zip(data, rng, change)

  def read_file(self):
    from googlenet_jax.model import weight_files

    check_tensors(weight_files.read(self.path))


class _Safetensors(Reader):
  """Files of safetensors."""

  suffix = '.safetensors'

  def __init__(self, folder):
    super().__init__(folder)
    self.head = {
      '__metadata__': {'format': 'pt'},
      'conv1.weight': {'dtype': 'F32', 'shape': [2, 1, 3, 3], 'data_offsets': [0, 72]},
      'half': {'dtype': 'BF16', 'shape': [3], 'data_offsets': [72, 78]},
      'count': {'dtype': 'I64', 'shape': [], 'data_offsets': [78, 86]},
      'none': {'dtype': 'F32', 'shape': [0, 2**40], 'data_offsets': [86, 86]},
    }
    self.seeds = [self.file(json.dumps(self.head).encode()), struct.pack('<Q', 2**62) + b'{}', struct.pack('<Q', 2**31)]

  def file(self, head):
    return struct.pack('<Q', len(head)) + head + bytes(86)

  def make(self, rng):
    return self.file(as_json(self.head, rng)) if rng.random() < 0.6 else super().make(rng)

  def read_file(self):
    from googlenet_jax.model import weight_files

    check_tensors(weight_files.read(self.path))


def check_tensors(tensors: dict[str, np.ndarray]) -> None:
  """Checks what came out of a file of weights, and gives it to the next function."""
  from googlenet_jax.host.errors import UserError
  from googlenet_jax.model import torch_weights

  assert all(isinstance(name, str) and isinstance(array, np.ndarray) for name, array in tensors.items()), tensors
  with contextlib.suppress(UserError):  # they are no weights of a GoogLeNet
    torch_weights.describe(tensors)


READERS: dict[str, type[Reader]] = {
  'idx': _Idx,
  'pictures': _Pictures,
  'pth': _Torch,
  'safetensors': _Safetensors,
}
