"""The paper's recipe, shortened, on a small set of ImageNet's form: colour pictures of many sizes.

  python experiments/photographs.py

The set is cut out of the two photographs that scikit-learn carries: each class is a place in one of them, each picture
a cut of random place and size near it, stored as JPEG by TFDS. Training and test pictures come from the same
photographs, so that this proves the way from files to table, and says nothing about accuracy. `main.py` trains
configs/paper.py on it with fewer and smaller steps, is interrupted by a signal in its second member, goes on, and
evaluates with 1, 10 and 144 crops. Everything stays in runs/photographs; what was printed goes to
experiments/results/photographs/.
"""

import argparse
import io
import pathlib
import shutil
import signal
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from experiments.run_main import run_main

PLACES = ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))  # of a photograph: four classes
COUNTS = {'train': 768, 'test': 128}


def pictures(split: str):
  """Yields (picture, label): uint8 `[h, w, 3]` of 60 to 240 pixels a side, landscape and portrait."""
  from sklearn.datasets import load_sample_images

  photographs = load_sample_images().images  # china.jpg and flower.jpg, 427 x 640
  rng = np.random.default_rng(list(COUNTS).index(split))
  for i in range(COUNTS[split]):
    label = i % (len(photographs) * len(PLACES))
    photograph = photographs[label // len(PLACES)]
    size = rng.integers(60, 240, 2)
    room = np.array(photograph.shape[:2]) - size
    corner = np.clip(np.array(PLACES[label % len(PLACES)]) * room + rng.normal(0, 20, 2), 0, room).astype(int)
    (top, left), (height, width) = corner, size
    yield photograph[top : top + height, left : left + width], label


def prepare(data_dir: pathlib.Path) -> None:
  """Has TFDS write the set as array_record."""
  import tensorflow_datasets as tfds
  from PIL import Image

  class Photographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Cuts of two photographs."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = {
        'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
        'label': tfds.features.ClassLabel(names=[f'{name}_{i}' for name in ('china', 'flower') for i in range(4)]),
      }
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(split) for split in COUNTS}

    def _generate_examples(self, split):
      for i, (picture, label) in enumerate(pictures(split)):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, 'jpeg', quality=95)
        yield i, {'image': file.getvalue(), 'label': label}

  Photographs.name = 'photographs'
  builder = Photographs(data_dir=str(data_dir))
  if not builder.is_prepared():
    builder.download_and_prepare(file_format='array_record')


def run(arguments: list[str], interrupt_after: tuple[str, ...] = ()) -> str:
  """Runs main.py; sends SIGTERM once it has printed some texts, in this order; returns what it printed."""
  waiting, lines = list(interrupt_after), []

  def each_line(process, line):
    print(line, end='', flush=True)
    lines.append(line)
    if waiting and waiting[0] in line:
      del waiting[0]
      if not waiting:
        process.send_signal(signal.SIGTERM)

  status = run_main(arguments, each_line)
  if waiting:
    sys.exit(f'error: main.py never printed {waiting[0]!r}, so that it was not interrupted')
  if status != (128 + signal.SIGTERM if interrupt_after else 0):
    sys.exit(f'error: main.py ended with status {status}')
  return ''.join(lines)


def main() -> None:
  """Prepares, trains, interrupts, goes on, evaluates."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--image_size', type=int, default=80, help='pixels; at least 65, for the auxiliary classifiers')
  parser.add_argument('--epochs', type=int, default=14)
  parser.add_argument('--members', type=int, default=2)
  options = parser.parse_args()
  if options.members < 2:
    parser.error('--members must be at least 2: the second one is interrupted')
  workdir = pathlib.Path('runs', 'photographs')  # from ROOT, where main.py starts: what is kept names no folder here
  prepare(ROOT / workdir / 'tfds')
  for member in (ROOT / workdir).glob('member_*'):  # of a run before
    shutil.rmtree(member)
  flags = [
    '--config=configs/paper.py',
    f'--workdir={workdir}',
    '--config.data.name=photographs',
    f'--config.data.data_dir={workdir / "tfds"}',
    '--config.data.canvas=256',
    f'--config.image_size={options.image_size}',
    f'--config.epochs={options.epochs}',
    f'--config.ensemble.members={options.members}',
    '--config.batch_size=32',
    '--config.learning_rate=0.02',
    '--config.average_decay=0.9',
    '--config.log_every_steps=12',
  ]
  printed = [run(flags, ('member 1 of', 'step 12/')), run(flags), run([*flags, '--mode=evaluate'])]
  text = '\n'.join(
    ['Printed by `python experiments/photographs.py`:\n', '```', *(p.rstrip() for p in printed), '```\n']
  )
  results = ROOT / 'experiments' / 'results' / 'photographs'
  results.mkdir(parents=True, exist_ok=True)
  (results / 'printed.md').write_text(text)
  shutil.copy(ROOT / workdir / 'member_0' / 'augmentations.png', results)
  shutil.copy(ROOT / workdir / 'table.png', results)


if __name__ == '__main__':
  main()
