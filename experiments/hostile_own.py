"""Mutated files that the program itself makes, and functions that read them; `experiments/fuzz.py` runs all readers."""

import contextlib
import io
import json
import os
import struct

import numpy as np

from experiments.hostile import Evil, Reader
from experiments.mutations import as_json, mutate, mutate_zip

LETTERS = 'aZ \n\t\0\x1b$\\{_^é日\u202e\ud800\udcff\u0301😀/-'  # in class names


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
  'run_json': _RunJson,
  'class_names': _ClassNames,
  'metrics_jsonl': _Metrics,
  'split_csv': _SplitCsv,
  'caches': _Cache,
  'checkpoint': _Checkpoint,
}
