"""`--mode=inspect`: the layers of a network, and the filters of its first layer."""

import functools
import pathlib

import numpy as np
from ml_collections import ConfigDict

from googlenet_jax import loading, runs
from googlenet_jax.data import listing, preparing
from googlenet_jax.evaluation.output import Output
from googlenet_jax.host import console, files
from googlenet_jax.host.errors import expanded
from googlenet_jax.model import layer_table
from googlenet_jax.model.googlenet import make_network, with_shapes

PAPER = (1000, 3)  # classes and channels of ImageNet
KNOWN = {'digits': (10, 1), **dict.fromkeys(preparing.IDX_SETS, (10, 1)), 'imagenet2012': PAPER}


def inspect(
  config: ConfigDict, workdir: pathlib.Path | None, step: int | str | None, output: pathlib.Path | None
) -> None:
  """Prints the table of layers; writes layers.md, layers.csv and, of a trained run, filters.png.

  Args:
    config: the recipe.
    workdir: folder of a run; None for a recipe alone.
    step: step of the checkpoint for filters.png, 'best', or None for the newest.
    output: folder to write to; by default the workdir. Without one, or if it cannot be written, nothing is written.

  Raises:
    UserError: `output` cannot be written, or a step is given and there is no such checkpoint.
  """
  is_run = workdir is not None and runs.is_run(workdir)
  if is_run:
    run = runs.read(runs.members(workdir)[0])
    classes, channels, source = len(run.classes), run.image_shape[-1], f'of the run in {workdir}'
  else:
    classes, channels, source = data_of(config)
  size = config.image_size
  network = with_shapes(functools.partial(make_network, config, classes, channels))
  rows = layer_table.layer_table(network, size)
  lines, title = layer_table.cells(rows), f'GoogLeNet, recipe {config.name}, images of {size}x{size}x{channels}'
  _, convolutions, linear = layer_table.totals(rows)
  notes = [f'{classes} classes, {channels} channel{"s" * (channels > 1)}: those {source}']
  notes.append(f'multiply-adds for one image: {convolutions:,} in convolutions, {linear:,} in linear layers')
  if any(row.auxiliary for row in rows):
    notes.append('the total leaves out the multiply-adds of the auxiliary classifiers, which only training uses')
  folder = output or (workdir if is_run else None)
  place = None if folder is None else Output(folder, output is not None)
  console.say('\n'.join([title, '', layer_table.aligned(lines), '', *notes]))
  if place is None:
    return
  numbers = [[cell.replace(',', '') for cell in line] for line in lines]
  text = f'{title}\n\n{layer_table.markdown(lines)}\n' + '\n\n'.join(notes) + '\n'
  place.write('layers.md', lambda path: files.write_text(path, text))
  place.write('layers.csv', lambda path: files.write_text(path, files.csv_text(numbers)))
  if is_run and place.is_open:
    _draw_filters(workdir, step, place)
  place.say()


def data_of(config: ConfigDict) -> tuple[int, int, str]:
  """Returns the number of classes, the channels, and where they come from; it reads no image."""
  data, name = config.data, preparing.normalised(config.data.name)
  if name in KNOWN:
    return *KNOWN[name], f'of {name}'
  if name == 'folder' and not data.source_dir:
    return PAPER[0], data.channels or PAPER[1], 'of ImageNet, because config.data.source_dir names no folder'
  if name == 'folder':
    classes = len(set(listing.find(expanded(data.source_dir, 'config.data.source_dir').absolute()).classes))
    assumed = '' if data.channels else ' (3 channels unless all pictures are grey)'
    return classes, data.channels or PAPER[1], f'of the folder {data.source_dir}{assumed}'
  return *PAPER, f'of ImageNet, because those of data.name={name} are not known before it is read'


def _draw_filters(workdir: pathlib.Path, step: int | str | None, output: Output) -> None:
  """Draws filters.png if there is a checkpoint."""
  if not any(map(runs.has_checkpoints, runs.members(workdir))):
    return
  classifier = loading.load(workdir, step)
  kernel = np.asarray(classifier.networks[0][0]['conv1']['kernel'])
  member = ' (its first member)' if len(classifier.networks) > 1 else ''
  title = f'{workdir}{member}, step {classifier.steps[0]}: filters of the first layer'

  def draw(path: pathlib.Path) -> None:
    from googlenet_jax.evaluation import galleries

    galleries.filters(kernel, path, title)

  output.write('filters.png', draw)
