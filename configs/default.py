"""Where every recipe starts: d2l's network on Fashion-MNIST, SGD with momentum.

Each key is defined once, in googlenet_jax/recipe.py, with its default, meaning and range. docs/recipes.md lists them.
"""

from googlenet_jax import recipe


def get_config():
  """Returns a recipe with every key at its default."""
  return recipe.default()
