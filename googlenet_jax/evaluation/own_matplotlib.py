"""matplotlib without the user's settings: whatever draws takes matplotlib's names from here.

MPLBACKEND, matplotlibrc and style files are for the user's own figures. They stay as they are in a notebook, and do not
reach the pictures of this program.
"""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator

from googlenet_jax.host.errors import reason

_lock = threading.RLock()  # the settings belong to the whole process


@contextlib.contextmanager
def _importing() -> Iterator[None]:
  """Lets matplotlib be imported whatever the user's settings are, and then gives it those that it takes."""
  if 'matplotlib' in sys.modules:
    yield
    return
  logger = logging.getLogger('matplotlib')
  level, backend = logger.level, os.environ.pop('MPLBACKEND', None)  # an unknown backend would end the import
  logger.setLevel(logging.ERROR)  # a cache of fonts that is new or has no place, unknown settings
  try:
    yield
    if backend:
      with contextlib.suppress(ValueError):
        sys.modules['matplotlib'].rcParams['backend'] = backend
  except (OSError, UnicodeError) as error:  # OSError: it ends as one line
    raise OSError(f'matplotlib cannot be used ({reason(error)}): look at your file matplotlibrc') from error
  finally:
    logger.setLevel(level)
    if backend is not None:
      os.environ['MPLBACKEND'] = backend


with _importing():
  import matplotlib
  from matplotlib import font_manager
  from matplotlib.axes import Axes
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.cm import ScalarMappable
  from matplotlib.colors import LinearSegmentedColormap, PowerNorm
  from matplotlib.figure import Figure
  from matplotlib.ft2font import FT2Font
  from matplotlib.patches import Rectangle
  from matplotlib.textpath import text_to_path
  from matplotlib.ticker import MaxNLocator

__all__ = [
  'FT2Font', 'Axes', 'Figure', 'FigureCanvasAgg', 'LinearSegmentedColormap', 'MaxNLocator', 'PowerNorm', 'Rectangle',
  'ScalarMappable', 'font_manager', 'own_settings', 'text_to_path',
]  # fmt: skip


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
  """Gives matplotlib its defaults inside the block, and the user's settings back after it. One thread at a time."""
  with _lock, matplotlib.rc_context():
    matplotlib.rcdefaults()
    yield
