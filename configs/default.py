"""Every key of a recipe, with the article's values: a recipe starts from these and changes what is its own."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The article's network and optimizer on Fashion-MNIST."""
  config = ml_collections.ConfigDict()

  config.seed = 0  # of initial weights, order of images, augmentation and dropout
  config.epochs = 10
  config.max_steps = 0  # stop after this many steps in all; 0 for no limit
  config.batch_size = 256  # over all devices
  config.image_size = 224  # pixels, padding included
  config.dtype = 'float32'  # of the computation: float32 or bfloat16; parameters are float32

  config.learning_rate = 0.01
  config.schedule = 'step'  # step, constant, cosine or one_cycle
  config.decay_factor = 0.96  # of the step schedule ...
  config.decay_epochs = 8  # ... once in so many epochs
  config.momentum = 0.9
  config.nesterov = False
  config.weight_decay = 0.0  # of kernels
  config.clip_norm = 0.0  # of the whole gradient; 0 for no clipping
  config.label_smoothing = 0.0
  config.average_decay = 0.0  # of weights averaged over the steps, which then predict; 0 for none
  config.micro_batches = 1  # parts in which a device takes its batch one after another, to need less memory

  config.model = ml_collections.ConfigDict()
  config.model.inception = 'reduced'  # reduced, or naive: without the 1x1 reductions
  config.model.head = 'average_pool'  # average_pool or fully_connected
  config.model.stem = 'article'  # article, or small for native 28 or 32 pixels
  config.model.norm = 'none'  # none, batch, or lrn: the paper's local response normalisation in the stem
  config.model.dropout = 0.0  # before the last linear layer
  config.model.auxiliary = 'none'  # average_pool: the paper's classifiers at 4a and 4d; adaptive_pool: torchvision's

  config.data = ml_collections.ConfigDict()
  config.data.name = 'fashion_mnist'  # digits, or an image classification set of TFDS
  config.data.source_dir = ''  # folder with the four original .gz files; FASHION_MNIST_DIR stands in
  config.data.data_dir = ''  # where TFDS keeps prepared sets; empty for ~/tensorflow_datasets
  config.data.validation_examples = 0  # held out of the training images
  config.data.canvas = 512  # pixels: images of many sizes are shrunk to it where a side is longer

  config.augment = ml_collections.ConfigDict()
  config.augment.padding = 0  # pixels of zeros on each side
  config.augment.shift = 0  # most pixels of random translation
  config.augment.flip = False  # mirror left to right at random
  config.augment.resize = 1.0  # ratio of the resized short side to image_size, up to 2; the middle is cut out
  config.augment.min_area = 1.0  # least share of an image in a random crop; 1 for no random crops; the paper's is 0.08
  config.augment.max_aspect = 4 / 3  # of random crops
  config.augment.random_interpolation = False  # of random crops
  config.augment.photometric = 0.0  # strength of brightness, contrast, colour and light at random; Howard's is 0.5
  config.augment.erasing = 0.0  # probability of a rectangle of noise

  config.ensemble = ml_collections.ConfigDict()
  config.ensemble.members = 1
  config.ensemble.member = 0  # which one this run is, where members are trained apart; the ensemble sets it
  config.ensemble.side_by_side = False  # members at the same time, each on its share of the devices
  config.ensemble.initial_weights = 'same'  # same, as in the paper, or different

  config.log_every_steps = 50
  config.checkpoint_every_steps = 0  # between the ends of epochs, where one is always written; 0 for none
  return config
