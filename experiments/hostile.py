"""Mutated files for every reader of the program, and functions that read them; `experiments/fuzz.py` runs them."""

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

LETTERS = 'aZ \n\t\0\x1b$\\{_^é日\u202e\ud800\udcff\u0301😀/-'  # of class names


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


class _RunJson(Reader):
  """`run.json`, with the recipe and the class names."""

  def __init__(self, folder):
    from googlenet_jax import recipe, runs

    super().__init__(folder)
    self.path = folder / runs.FILE
    runs.write(folder, runs.Run(recipe.default(), ('shirt', 'é日本', '$x$'), (28, 28, 1)))
    self.seed = json.loads(self.path.read_text())

  def make(self, rng):
    return as_json(self.seed, rng)

  def read_file(self):
    from googlenet_jax import recipe, recipe_checks, runs

    run = runs.read(self.folder)
    assert all(isinstance(name, str) for name in run.classes), run.classes
    assert all(type(side) is int and side > 0 for side in run.image_shape), run.image_shape
    assert recipe.flatten(run.config).keys() == recipe.KEYS.keys()
    recipe_checks.validate(run.config, trains=False)
    runs.check_agrees(recipe.default(), self.folder)


class _ClassNames(Reader):
  """The names of classes, as they are drawn, printed and written."""

  def __init__(self, folder):
    from googlenet_jax.evaluation import drawing

    super().__init__(folder)
    drawing.fit('日é', 100, 8)  # matplotlib looks for fonts once, with another program

  def make(self, rng):
    text = ''.join(rng.choices(LETTERS, k=rng.randint(0, 60)))
    return text.encode('utf-8', 'surrogatepass')

  def read(self, data):
    from googlenet_jax.data import dividing
    from googlenet_jax.evaluation import drawing
    from googlenet_jax.host import files
    from googlenet_jax.host.errors import one_line

    name = data.decode('utf-8', 'surrogatepass')
    lines = drawing.fit(name, 100, drawing.SMALL, 2).split('\n')
    assert len(lines) <= 2
    assert all(line.isprintable() or '\u00a0' in line for line in lines), lines
    assert one_line(name).isprintable()
    files.csv_text([[name, 1]])
    if '\ud800' not in name and '\0' not in name:  # no file system has such a name
      dividing.write(self.folder, [(f'{name}/1.png', name, 'test')])
      ((_, found, _),) = dividing.read(self.folder / dividing.FILE)
      assert found == name, (found, name)
    return 'read'


class _Metrics(Reader):
  """`metrics.jsonl`, as a resumed run and an evaluation read it."""

  def __init__(self, folder):
    from googlenet_jax import runs

    super().__init__(folder)
    self.path = folder / runs.METRICS
    record = {'epoch': 1.0, 'loss': 0.5, 'accuracy': 0.5, 'learning_rate': 0.1, 'examples_per_second': 9.0}
    self.records = [{'step': n, 'split': split, **record} for n in (3, 6) for split in ('train', 'validation', 'test')]

  def make(self, rng):
    lines = [as_json(record, rng) if rng.random() < 0.4 else json.dumps(record).encode() for record in self.records]
    data = rng.choice((b'\n', b'\n', b'\r\n', b'')).join(lines)
    return mutate(data, [data], rng) if rng.random() < 0.4 else data

  def read_file(self):
    from googlenet_jax import runs

    for record in runs.records(self.folder):
      for key, kind in runs.RECORD.items():
        assert type(record[key]) in ((int, float) if kind is float else (kind,)), record
      json.dumps(record)
    for step, accuracy in runs.validation_accuracies(self.folder).items():
      assert type(step) is int
      assert 0 <= accuracy <= 1, accuracy


class _SplitCsv(Reader):
  """`split.csv`."""

  def __init__(self, folder):
    from googlenet_jax.data import dividing

    super().__init__(folder)
    rows = [(f'{name}/{n}.png', name, split) for name in 'ab' for n, split in enumerate(('train', 'test', 'skipped'))]
    self.seeds = [dividing.to_text(rows).encode(), dividing.to_text([('é,"x"\n/1', 'é', 'validation')]).encode()]
    self.seeds.append(b'file,class,split\n' + b'"' + b'x' * 200_000 + b'",a,test\n')

  def read_file(self):
    from googlenet_jax.data import dividing

    for file, name, split in dividing.read(self.path):
      assert isinstance(file, str)
      assert isinstance(name, str)
      assert split in ('train', 'validation', 'test', 'skipped')


class _Cache(Reader):
  """The caches of decoded images and of headers: whatever is wrong with them, the sources are read."""

  def __init__(self, folder):
    from googlenet_jax.data import headers
    from googlenet_jax.host import cache

    super().__init__(folder)
    os.environ['XDG_CACHE_HOME'] = str(folder)
    self.root = folder / 'pictures'
    self.root.mkdir(exist_ok=True)
    self.files = ['a.png', 'b.png']
    from PIL import Image

    for number, name in enumerate(self.files):
      Image.fromarray(np.full((4, 5), number, np.uint8)).save(self.root / name)
    self.sources = [self.root / name for name in self.files]
    self.truth = {'images': np.arange(24, dtype=np.uint8).reshape(2, 3, 4), 'labels': np.arange(2)}
    cache.arrays('set', self.sources, lambda: dict(self.truth))
    self.looked = headers.look(self.root, self.files)
    self.kept = sorted((folder / 'googlenet_jax').glob('*.npz'))
    self.seeds = [path.read_bytes() for path in self.kept]
    evil = np.empty(1, object)
    evil[0] = Evil()
    data = io.BytesIO()
    np.savez(data, of=evil, files=evil, states=evil)
    self.evil = data.getvalue()

  def make(self, rng):
    number = rng.randrange(2)
    data = self.evil if rng.random() < 0.02 else self.seeds[number]
    if rng.random() < 0.6:
      data = mutate_zip(data, rng, lambda _, inside: mutate(inside, [inside], rng))
    else:
      data = mutate(data, [*self.seeds, self.evil], rng)
    return bytes([number]) + data

  def read(self, data):
    from googlenet_jax.data import headers
    from googlenet_jax.host import cache

    self.kept[data[0]].write_bytes(data[1:])
    calls = []

    def read():
      calls.append(1)
      return dict(self.truth)

    if data[0] == [path.name.startswith('set') for path in self.kept].index(True):
      found = cache.arrays('set', self.sources, read)
      # A file whose checksums are right may hold what it likes, but it must be what a set has.
      assert calls or all(isinstance(array, np.ndarray) and array.dtype != object for array in found.values())
      return 'made anew' if calls else 'taken'
    looked = headers.look(self.root, self.files)
    assert len(looked.digests) == 2
    assert looked.sides.dtype == np.int32
    assert looked.sides.shape == (2,)
    return 'taken'


class _Checkpoint(Reader):
  """Every file of a checkpoint; what is restored must be what was saved."""

  def __init__(self, folder):
    from googlenet_jax.host import checkpoints

    super().__init__(folder)
    rng = np.random.default_rng(0)
    self.items = {'network': {'a': {'kernel': rng.normal(size=(3, 4)).astype(np.float32)}, 'b': np.int32(4)}}
    self.run = folder / 'run'
    saved = checkpoints.Checkpoints(self.run, {})
    saved.save(4, self.items, {'x': 1})
    saved.close()
    self.files = sorted(path for path in (self.run / 'checkpoints').rglob('*') if path.is_file())
    self.whole = [path.read_bytes() for path in self.files]

  def make(self, rng):
    number = rng.randrange(len(self.files))
    whole = self.whole[number]
    with contextlib.suppress(ValueError):  # is it JSON?
      if rng.random() < 0.7:
        return struct.pack('<H', number) + as_json(json.loads(whole), rng)
    return struct.pack('<H', number) + mutate(whole, self.whole, rng)

  def read(self, data):
    import jax
    from jax.sharding import SingleDeviceSharding

    from googlenet_jax.host import checkpoints

    (number,) = struct.unpack('<H', data[:2])
    self.files[number].write_bytes(data[2:])
    where = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype, sharding=where), self.items)
    try:
      saved = checkpoints.Checkpoints(self.run, {}, read_only=True)
      found, _ = saved.restore_whole(shapes)
      saved.close()
    finally:
      self.files[number].write_bytes(self.whole[number])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(self.items), strict=True):
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), 'restored something else than was saved'
    return 'read'


READERS: dict[str, type[Reader]] = {
  'idx': _Idx,
  'pictures': _Pictures,
  'pth': _Torch,
  'safetensors': _Safetensors,
  'run_json': _RunJson,
  'class_names': _ClassNames,
  'metrics_jsonl': _Metrics,
  'split_csv': _SplitCsv,
  'caches': _Cache,
  'checkpoint': _Checkpoint,
}
