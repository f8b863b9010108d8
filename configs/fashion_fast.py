from configs import default


def get_config():
  config = default.get_config()
  config.image_size = 32
  config.epochs = 4
  config.batch_size = 128
  config.learning_rate = 0.05
  config.schedule = 'one_cycle'
  config.model.norm = 'batch'
  config.augment.flip = False
  config.weight_decay = 5e-4
  config.data.validation_examples = 5000
  return config
