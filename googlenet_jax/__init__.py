"""GoogLeNet (Inception v1, Szegedy et al. 2015, arXiv:1409.4842) in JAX and Flax.

classifier = googlenet_jax.load('runs/digits')   # a trained run
classifier.predict('picture.png')
googlenet_jax.train('configs/digits.py', 'runs/digits')
"""

import importlib
from typing import Any

__version__ = '0.2.0'

# Imported at first use: main.py may restart itself before JAX is imported.
_HOMES = {
  'Classifier': 'googlenet_jax.classifier',
  'GoogLeNet': 'googlenet_jax.model.googlenet',
  'Options': 'googlenet_jax.model.options',
  'UserError': 'googlenet_jax.host.errors',
  'load': 'googlenet_jax.loading',
  'train': 'googlenet_jax.training.ensemble',
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
  if name in _HOMES:
    return getattr(importlib.import_module(_HOMES[name]), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return [*_HOMES, '__version__']
