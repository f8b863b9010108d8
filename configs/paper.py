"""The paper's protocol on ImageNet (ILSVRC 2012): seven networks, 144 crops.

  python main.py --config=configs/paper.py --config.data.data_dir=DIR          # trains seven networks
  python main.py --mode=evaluate --workdir=runs/paper

ImageNet was not at hand: this recipe has not been run on it. `python -m experiments.photographs` runs a shortened form
on a small set of pictures.

From the paper (sections 5 to 7): local response normalisation, auxiliary classifiers with weight 0.3, dropout of 40
and 70 %; momentum 0.9, a learning rate that falls by 4 % every 8 epochs, averaged weights; random areas of 8 to 100 %,
aspect ratios of 3/4 to 4/3, photometric distortions, random interpolation; seven networks with the same initial
weights, 144 crops. The paper does not state the rest, so it is a choice: learning rate and weight decay (those of
BVLC's replica in Caffe, there with batches of 32), batch size, epochs, and an exponential average. The paper trained
by asynchronous SGD; this is synchronous. TFDS calls the challenge's validation images `validation`. Its test images
have no labels, so those are tested on.
"""

from configs import default


def get_config():
  """The paper's values, where it states them."""
  config = default.get_config()
  config.data.name = 'imagenet2012'
  config.epochs = 100
  config.learning_rate = 0.01
  config.weight_decay = 2e-4
  config.average_decay = 0.9999
  config.model.norm = 'lrn'
  config.model.auxiliary = 'average_pool'
  config.model.dropout = 0.4
  config.augment.resize = 256 / 224
  config.augment.min_area = 0.08
  config.augment.random_interpolation = True
  config.augment.photometric = 0.5
  config.augment.flip = True
  config.ensemble.members = 7
  config.checkpoint_every_steps = 1000
  return config
