"""Pictures of your own: a folder with a folder per class, from a few hundred to some thousands of pictures.

  python main.py --config=configs/folder.py --config.data.source_dir=flowers --workdir=runs/flowers

On `samples/photographs` of `python -m experiments.sample_folders samples` (10 classes in colour, 540 pictures to train
on, sides of 60 to 300 pixels): test accuracy 0.870 (174 of 200), validation 0.983 (59 of 60), 5 1/2 minutes in all. 2
cores of an AMD EPYC (family 25, model 17), jax 0.10.2, seed 0, one run. Usual values, not tuned on this test.
"""

from configs import default


def get_config():
  """GoogLeNet with batch normalisation at 96 pixels, 30 epochs, one cycle of the learning rate, mild crops."""
  config = default.get_config()
  config.data.name = 'folder'
  config.data.canvas = 256  # 2,000 MB then hold 10,000 pictures in colour
  config.image_size = 96
  config.epochs = 30
  config.batch_size = 32
  config.learning_rate = 0.02
  config.schedule = 'one_cycle'
  config.nesterov = True
  config.weight_decay = 5e-4
  config.label_smoothing = 0.1
  config.model.norm = 'batch'
  config.augment.flip = True
  config.augment.min_area = 0.5
  config.evaluate_every_epochs = 5
  config.log_every_steps = 20
  return config
