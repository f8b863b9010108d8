"""GoogLeNet (Inception v1, Szegedy et al. 2015, arXiv:1409.4842) in JAX and Flax."""

__version__ = '0.1.0'
