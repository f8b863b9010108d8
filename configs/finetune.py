"""Your own pictures, from weights that know pictures already: for a few hundred of them, at 224 pixels.

  python main.py --config=configs/finetune.py --config.init_from=googlenet-1378be20.pth \\
      --config.data.source_dir=flowers --workdir=runs/flowers

`init_from` is a file of PyTorch's weights or the workdir of another run; the network is then that of the weights.
docs/pytorch.md says where torchvision's published weights are. On a CPU, freeze most of the network, which made a step
4 times as fast (experiments/results/finetune_speed.md): --config.freeze=inception_4e. The values are common ones and
were not compared.
"""

from configs import default


def get_config():
  """20 epochs of mild crops; the head, which is new, learns ten times as fast as the rest."""
  config = default.get_config()
  config.data.name = 'folder'
  config.image_size = 224
  config.epochs = 20
  config.batch_size = 32
  config.learning_rate = 0.02
  config.body_learning_rate = 0.1
  config.schedule = 'cosine'
  config.warmup_epochs = 1.0
  config.nesterov = True
  config.weight_decay = 1e-4
  config.label_smoothing = 0.1
  config.model.dropout = 0.2
  config.augment.resize = 256 / 224
  config.augment.min_area = 0.3
  config.augment.flip = True
  config.evaluate_every_epochs = 2
  config.log_every_steps = 20
  return config
