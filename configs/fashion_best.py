"""Meant to be the most accurate GoogLeNet for Fashion-MNIST: native resolution, batch norm, augmentation, averages.

  python main.py --config=configs/fashion_best.py
  python experiments/ensemble_table.py               # seven of them, by 1, 10 and 144 crops
  python experiments/choices.py                      # what each choice is worth on held-out images

Made for an accelerator, and not trained to its end yet: its accuracy is not known. On held-out images, at the scale
that a CPU allows (the article's stem, 3 epochs, one seed), three choices were made (experiments/results/choices/): a
learning rate of 0.05, where 0.1 and 0.02 were worse; no shift besides the random areas; and these areas, because a
network that has seen whole images only gets worse by 10 crops, and one that has seen parts gets better, though by one
crop the former is ahead in so few epochs. Erasing cost a point there; it stays for long trainings, unproven. The other
values are customary ones, and wait for choices.py on an accelerator.
"""

from configs import default


def get_config():
  """The nine Inception blocks of the paper behind a stem that keeps 28 pixels large enough to be worth looking at."""
  config = default.get_config()
  config.image_size = 32
  config.epochs = 60
  config.batch_size = 256
  config.dtype = 'bfloat16'
  config.learning_rate = 0.05
  config.schedule = 'one_cycle'
  config.nesterov = True
  config.weight_decay = 5e-4
  config.label_smoothing = 0.1
  config.average_decay = 0.999
  config.model.norm = 'batch'
  config.model.stem = 'small'
  config.model.dropout = 0.4
  config.augment.padding = 2
  config.augment.min_area = 0.4  # about the least part of an image that the 144 crops show
  config.augment.shift = 0  # random areas shift already
  config.augment.flip = True
  config.augment.erasing = 0.25
  config.data.validation_examples = 5000
  config.ensemble.initial_weights = 'different'
  return config
