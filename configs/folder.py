"""Pictures in your own folder."""
from configs import default
def get_config():
  config = default.get_config()
  config.data.name = 'folder'
  config.image_size = 96
  return config
