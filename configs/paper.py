"""The paper's protocol on ImageNet (ILSVRC 2012): seven networks, 144 crops.

  python main.py --config=configs/paper.py --config.data.data_dir=DIR          # trains seven networks
  python main.py --mode=evaluate --workdir=runs/paper

This recipe has not been run on ImageNet, because the images were not available. `python -m experiments.photographs`
runs a shortened form on a small set of pictures.

From the paper (sections 5 to 7): local response normalisation, auxiliary classifiers with weight 0.3, dropout of 40
and 70 %; momentum 0.9, a learning rate that falls by 4 % every 8 epochs, averaged weights; random areas of 8 to 100 %,
aspect ratios of 3/4 to 4/3, photometric distortions, random interpolation; seven networks with the same initial
weights, 144 crops. The paper does not state the rest. These values are choices: the learning rate and the weight decay
(from BVLC's replica in Caffe, which used batches of 32), the batch size, the epochs, and an exponential average. The
paper trained with asynchronous SGD; this program uses synchronous SGD. The challenge's test images have no labels. So
the test images here are those that TFDS calls `validation`.
"""

from configs import default


def get_config():
  """Returns the paper's values where the paper states them."""
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
