from configs import default


def get_config():
  config = default.get_config()
  config.data.name = 'digits'
  config.image_size = 32
  config.epochs = 15
  config.batch_size = 64
  config.learning_rate = 0.02
  config.schedule = 'one_cycle'
  config.model.norm = 'batch'
  config.augment.shift = 2
  config.log_every_steps = 10
  return config
