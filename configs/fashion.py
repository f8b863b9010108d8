"""The article's recipe: Fashion-MNIST at 224x224, batch 256, 10 epochs, SGD at 0.01 with momentum 0.9.

  python main.py --config=configs/fashion.py

All 60,000 training images, no batch normalisation, the learning rate falls 4 % every 8 epochs. Made for an
accelerator; its accuracy and time on one have not been measured yet. On 2 CPU cores it estimates 15 hours.
"""

from configs import default


def get_config():
  """The values of configs/default.py are the article's; lines and checkpoints come oftener, as steps may take long."""
  config = default.get_config()
  config.log_every_steps = 10
  config.checkpoint_every_steps = 100
  return config
