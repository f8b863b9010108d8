"""Fashion-MNIST on a laptop: 32x32 pixels, batch normalisation, 10 epochs, one cycle of the learning rate.

  python main.py --config=configs/fashion_fast.py

On 2 cores of an AMD EPYC CPU (family 25, model 17, AVX-512), seed 0: test accuracy 0.927, validation 0.926, 13 1/4
minutes of training at 689 images/s, 14 1/2 minutes in all.

Chosen on 5,000 held-out training images, seed 0, on the same processor: accuracy 0.926 with these values, and 0.922
after 8 epochs without mirroring, label smoothing and Nesterov momentum. One run each.
"""

from configs import default


def get_config():
  """Returns values that were chosen on 5,000 held-out training images. These images stay held out."""
  config = default.get_config()
  config.image_size = 32
  config.epochs = 10
  config.batch_size = 128
  config.learning_rate = 0.05
  config.schedule = 'one_cycle'
  config.nesterov = True
  config.weight_decay = 5e-4
  config.label_smoothing = 0.1
  config.model.norm = 'batch'
  config.augment.alternating_flip = True
  config.data.validation_examples = 5000
  config.evaluate_every_epochs = 2
  return config
