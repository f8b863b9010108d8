"""Runs the paper's recipe, shortened, on a small set like ImageNet: colour pictures of many sizes.

  python -m experiments.photographs

The set is cut from the two photographs in scikit-learn. Each class is a place in one of them; each picture is cut near
it, with a random place and size, and stored as JPEG by TFDS. Training and test pictures come from the same photographs,
so this shows that every step from files to table works, and says nothing about accuracy.

`main.py` trains configs/paper.py on it, with fewer and smaller steps. A signal interrupts it in its second member; the
same command continues; then it evaluates with 1, 10 and 144 crops. Everything stays in runs/photographs. What was
printed goes to experiments/results/photographs/printed.md, and two pictures beside it.
"""

import argparse
import io
import pathlib
import shlex
import shutil
import signal
import sys

import numpy as np

from experiments import tables
from experiments.worker import ROOT, run_main

PLACES = ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))  # in a photograph: four classes
COUNTS = {'train': 768, 'test': 128}
INTERRUPT_AFTER = ('member 1 of', 'step 12/')  # printed in this order


def pictures(split: str):
  """Yields (picture, label): uint8 `[H, W, 3]` with sides of 60 to 240 pixels."""
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
    """Parts of two photographs."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      names = [f'{photograph}_{place}' for photograph in ('china', 'flower') for place in range(len(PLACES))]
      image = tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg')
      features = tfds.features.FeaturesDict({'image': image, 'label': tfds.features.ClassLabel(names=names)})
      return tfds.core.DatasetInfo(builder=self, features=features)

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
  """Runs main.py; sends SIGTERM once it has printed some texts in this order; returns what it printed, as Markdown."""
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
    sys.exit(f'error: main.py was not interrupted, because it did not print {waiting[0]!r}')
  if status != (128 + signal.SIGTERM if interrupt_after else 0):
    sys.exit(f'error: main.py ended with status {status}')
  return f'\n```\n$ {shlex.join(["python", "main.py", *arguments])}\n{"".join(lines).rstrip()}\n```\n'


def main() -> None:
  """Prepares, trains, interrupts, continues and evaluates."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--image_size', type=int, default=80, help='pixels; at least 65, for the auxiliary classifiers')
  parser.add_argument('--epochs', type=int, default=8)
  parser.add_argument('--output', type=pathlib.Path, default=tables.RESULTS / 'photographs', help='folder')
  options = parser.parse_args()
  workdir = pathlib.Path('runs', 'photographs')  # relative, because printed paths are published
  prepare(ROOT / workdir / 'tfds')
  for member in (ROOT / workdir).glob('member_*'):  # from an earlier call
    shutil.rmtree(member)
  train = [
    '--config=configs/paper.py',
    f'--workdir={workdir}',
    '--config.data.name=photographs',
    f'--config.data.data_dir={workdir / "tfds"}',
    '--config.data.canvas=256',
    f'--config.image_size={options.image_size}',
    f'--config.epochs={options.epochs}',
    '--config.ensemble.members=2',
    '--config.batch_size=32',
    '--config.learning_rate=0.02',
    '--config.average_decay=0.9',
    '--config.log_every_steps=12',
  ]
  evaluate = ['--mode=evaluate', f'--workdir={workdir}']
  printed = [run(train, INTERRUPT_AFTER), run(train), run(evaluate)]
  about = f'{tables.cores()} cores of {tables.cpu_model()}. SIGTERM interrupts the first command.'
  tables.publish('\n'.join([tables.written_by('jax', 'flax'), about, *printed]), options.output / 'printed.md')
  shutil.copy(ROOT / workdir / 'member_0' / 'augmentations.png', options.output)
  shutil.copy(ROOT / workdir / 'table.png', options.output)


if __name__ == '__main__':
  main()
