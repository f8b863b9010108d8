"""Made for the highest accuracy on Fashion-MNIST: 32 pixels, batch normalisation, augmentation, averaged weights.

  python main.py --config=configs/fashion_best.py
  python main.py --config=configs/fashion_best.py --config.ensemble.members=7 --workdir=runs/seven
  python -m experiments.choices                      # what each choice is worth on held-out images

Made for a GPU. It has not been trained to its end, so its accuracy is not known. On held-out images, at a scale that a
CPU allows (d2l's stem, 3 epochs, one seed), three choices were made (experiments/results/choices/): a learning rate of
0.05, because 0.1 and 0.02 were worse; no shift besides the random areas; and these areas: a network that has seen whole
images only gets worse by 10 crops, one that has seen parts gets better. By one crop the former is ahead after so few
epochs. Erasing cost a point there; it stays for long trainings, unproven. The other values are customary ones.
"""

from configs import default


def get_config():
  """The paper's nine Inception blocks after a stem that keeps maps of small images large."""
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
  config.augment.min_area = 0.4  # about the smallest part of an image among the 144 crops
  config.augment.shift = 0  # random areas shift already
  config.augment.flip = True
  config.augment.erasing = 0.25
  config.data.validation_examples = 5000
  config.ensemble.initial_weights = 'different'
  return config
