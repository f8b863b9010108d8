"""Made for the highest accuracy on Fashion-MNIST: 32 pixels, batch normalisation, augmentation, averaged weights.

  python main.py --config=configs/fashion_best.py
  python main.py --config=configs/fashion_best.py --config.ensemble.members=7 --workdir=runs/seven
  python main.py --mode=evaluate --workdir=runs/seven --crops=1,6     # 6: mirror and shifts of one pixel
  python -m experiments.choices                                       # what each choice is worth on held-out images

Made for a GPU. It has not been trained to its end, so its accuracy is not known. Its goals are a test accuracy of 0.955
for one network and 0.962 for seven networks with 6 views.

What was measured is an earlier form, which was stopped at epoch 32 of 60 while its one-cycle rate was still high. With
the augmentation, the learning rate and the dropout of this recipe, the averaged weights had 0.948 on held-out images
and 0.947 on the test images (2026-11-26, one H200, jax 0.11.2, one seed). With random areas, without shifts, with half
the erasing and half the learning rate, they had 0.936 and 0.938.

Not measured, and taken from what others publish for small images:

- A warm-up of 2 epochs, then a cosine to zero. The averages need a rate that goes to zero less than the raw weights do,
  but both end at the same place.
- Random mirroring, as in the measured form. Alternating mirroring shows each image 30 times either way; random
  mirroring does so nearly, over 60 epochs. It matters in short trainings (`fashion_speed`).
- No CutMix and no mixup. Images are erased, outputs dropped and labels smoothed already, and 60 epochs are few for
  more. Published results with CutMix train for hundreds of epochs.
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
  return config
