"""Makes folders of real pictures to try things on, from what Python packages ship. Nothing is downloaded.

  pip install scikit-image
  FASHION_MNIST_DIR=DIR python -m experiments.sample_folders samples

    samples/photographs/{train,test}/CLASS   10 classes in colour, JPEG and PNG, sides of 60 to 300 pixels
    samples/textures/{train,test}/CLASS      brick, grass and gravel in grey, sides of 64 to 160 pixels
    samples/digits/CLASS                     scikit-learn's 1,797 digits, 8 x 8
    samples/fashion/CLASS                    100 training images of Fashion-MNIST a class, 28 x 28

A class of the photographs or textures is one photograph. Its pictures are cut from it at random places: those in train/
from the left 60 %, those in test/ from the rest. No pixel is in both, but light, colours and camera are the same. So an
accuracy on test/ says that the program learns and that its parts fit; it does not say how well the network would know
another cup of coffee. The same seed gives the same pixels.
"""

import argparse
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from googlenet_jax.data import datasets, pictures, preparing
from googlenet_jax.host.errors import UserError

PHOTOGRAPHS = {  # class: package, file
  'astronaut': ('skimage', 'data/astronaut.png'),
  'cat': ('skimage', 'data/chelsea.png'),
  'coffee': ('skimage', 'data/coffee.png'),
  'flower': ('sklearn', 'datasets/images/flower.jpg'),
  'galaxies': ('skimage', 'data/hubble_deep_field.jpg'),
  'motorcycle': ('skimage', 'data/motorcycle_left.png'),
  'pagoda': ('sklearn', 'datasets/images/china.jpg'),
  'retina': ('skimage', 'data/retina.jpg'),
  'rocket': ('skimage', 'data/rocket.jpg'),
  'tissue': ('skimage', 'data/ihc.png'),
}
TEXTURES = {name: ('skimage', f'data/{name}.png') for name in ('brick', 'grass', 'gravel')}
FASHION = ('T-shirt', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')
LEFT = 0.6  # share of a photograph's width that the training pictures come from
COUNTS = {'train': 60, 'test': 20}  # pictures a class


def shipped(package: str, file: str) -> pathlib.Path:
  """Returns the path of a file in an installed package.

  Raises:
    UserError: the package is not installed, or does not have the file.
  """
  spec = importlib.util.find_spec(package)
  path = spec and pathlib.Path(spec.submodule_search_locations[0], file)
  if not path or not path.exists():
    name = {'skimage': 'scikit-image', 'sklearn': 'scikit-learn'}.get(package, package)
    raise UserError(f'{file} of {package} is missing: pip install {name}')
  return path


def cut(
  folder: pathlib.Path,
  sources: Mapping[str, tuple[str, str]],
  sides: tuple[int, int],
  channels: int = 3,
  counts: Mapping[str, int] = COUNTS,
  seed: int = 0,
) -> None:
  """Writes `folder/{train,test}/CLASS/*`, cut at random places from the two parts of a photograph a class.

  Args:
    folder: what to fill.
    sources: class name to package and file.
    sides: least and most pixels of a side; a photograph with less room gives smaller ones.
    channels: 3 writes JPEG and PNG in turn, 1 writes grey PNG.
    counts: pictures a class, for 'train' and 'test'.
    seed: another one gives other places and sizes.
  """
  for c, (name, source) in enumerate(sources.items()):
    photograph = pictures.read(shipped(*source), channels)
    edge = round(LEFT * photograph.shape[1])
    for p, (part, area) in enumerate({'train': photograph[:, :edge], 'test': photograph[:, edge:]}.items()):
      rng = np.random.default_rng([seed, c, p])
      (folder / part / name).mkdir(parents=True)
      for i in range(counts[part]):
        size = [rng.integers(min(sides[0], room), min(sides[1], room) + 1) for room in area.shape[:2]]
        top, left = (rng.integers(0, room - side + 1) for room, side in zip(area.shape[:2], size, strict=True))
        picture = np.squeeze(area[top : top + size[0], left : left + size[1]])
        ending = 'jpg' if channels == 3 and i % 2 else 'png'
        Image.fromarray(picture).save(folder / part / name / f'{name}_{i:03d}.{ending}', quality=92)


def write_arrays(folder: pathlib.Path, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...]) -> None:
  """Writes `folder/CLASS/*.png`; images are uint8 `[N, H, W]`."""
  for label, name in enumerate(names):
    (folder / name).mkdir(parents=True)
    for i in np.flatnonzero(labels == label):
      Image.fromarray(images[i]).save(folder / name / f'{i:05d}.png')


def write_photographs(folder: pathlib.Path) -> None:
  """Writes 10 classes in colour."""
  cut(folder, PHOTOGRAPHS, (60, 300))


def write_textures(folder: pathlib.Path) -> None:
  """Writes 3 classes in grey."""
  cut(folder, TEXTURES, (64, 160), channels=1)


def write_digits(folder: pathlib.Path) -> None:
  """Writes scikit-learn's digits."""
  digits = datasets.load('digits')
  images, labels = (np.concatenate([getattr(s, n) for s in (digits.train, digits.test)]) for n in ('images', 'labels'))
  write_arrays(folder, images[..., 0], labels, digits.class_names)


def write_fashion(folder: pathlib.Path, each: int = 100) -> None:
  """Writes the first training images of each class of Fashion-MNIST.

  Raises:
    UserError: the environment does not name the folder with the original files.
  """
  source = os.environ.get(preparing.SOURCE_VARIABLE)
  if not source:
    raise UserError(f'left out: set {preparing.SOURCE_VARIABLE} to the folder with its original .gz files')
  images, labels = (preparing.read_idx(pathlib.Path(source, file)) for file in preparing.IDX_FILES['train'])
  chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(len(FASHION))]))
  write_arrays(folder, images[chosen], labels[chosen], FASHION)


SETS: dict[str, Callable[[pathlib.Path], None]] = {
  'photographs': write_photographs,
  'textures': write_textures,
  'digits': write_digits,
  'fashion': write_fashion,
}


def main() -> None:
  """Writes the sets that are wanted and can be written."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('folder', type=pathlib.Path, help='where to write')
  parser.add_argument('--sets', nargs='+', choices=SETS, default=list(SETS))
  options = parser.parse_args()
  missing = False
  for name in options.sets:
    folder = options.folder / name
    try:
      if folder.exists():
        raise UserError(f'{folder} exists already: remove it, or give another folder')
      SETS[name](folder)
    except UserError as error:
      print(f'{name}: {error}', file=sys.stderr)
      missing = True
      continue
    count = sum(path.is_file() for path in folder.rglob('*'))
    print(f'{name}: {count:,} pictures in {folder}')
  sys.exit(int(missing))


if __name__ == '__main__':
  main()
