"""Made for the highest accuracy on Fashion-MNIST: 32 pixels, batch normalisation, augmentation, averaged weights.

  python main.py --config=configs/fashion_best.py
  python main.py --config=configs/fashion_best.py --config.ensemble.members=7 --workdir=runs/seven
  python main.py --mode=evaluate --workdir=runs/seven --crops=1,6     # 6: mirror and shifts of one pixel
  python -m experiments.choices                                       # what each choice is worth on held-out images

Four networks on one H200 (jax 0.11.2, commit 4eb9ea0): test accuracy 0.9553, 0.9546, 0.9561 and 0.9555, each after 90
to 94 s of training. With 6 views their mean is 0.957, and 0.959 together (docs/protocol.md). Seven networks, whose goal
is 0.962 with 6 views, have not been trained.

Where its values come from: two earlier runs, on a card shared with two others, had one cycle of the
learning rate. Both were stopped at epoch 32 of 60, while the rate was still high:

- With the augmentation, the learning rate and the dropout of this recipe, the averaged weights had an accuracy of 0.948
  on held-out images and 0.947 on the test images.
- With random areas in place of shifts, half the erasing, half the learning rate and twice the dropout: 0.936 and 0.938.

The rest is not measured:

- The rate rises for 2 epochs and falls along a cosine to zero, as in most published recipes for this data set.
- Mirroring is random, as in the measured runs. Alternating mirroring would show each image exactly 30 times in
  each direction. Over 60 epochs random mirroring comes near that. It matters more in short trainings such as
  `fashion_speed`.
- There is no CutMix and no mixup. Images are erased, features dropped and labels smoothed already. The published
  results with CutMix come from hundreds of epochs.
"""

from configs import default


def get_config():
  """Returns a recipe with the paper's nine Inception blocks, after a stem that shrinks small images less."""
  config = default.get_config()
  config.image_size = 32
  config.epochs = 60
  config.batch_size = 256
  config.dtype = 'bfloat16'
  config.learning_rate = 0.1
  config.schedule = 'cosine'
  config.warmup_epochs = 2.0
  config.nesterov = True
  config.weight_decay = 5e-4
  config.label_smoothing = 0.1
  config.average_decay = 0.999  # about the last 5 epochs; batch statistics are computed for the averages themselves
  config.model.norm = 'batch'
  config.model.stem = 'small'
  config.model.dropout = 0.2
  config.augment.padding = 2  # 28 pixels become 32 without resizing
  config.augment.shift = 4
  config.augment.flip = True
  config.augment.erasing = 0.5
  config.data.validation_examples = 5000
  config.ensemble.initial_weights = 'different'
  config.evaluate_every_epochs = 5  # on a large GPU an evaluation takes as long as an epoch
  return config
