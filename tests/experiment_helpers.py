"""What the tests of the experiments share: timings, a worker that takes no time, a table of errors."""

from experiments import worker
from experiments.tables import Case

CASE = Case('training', 32, 100, 'float32')
NAMES = ('ours', 'eager', 'compiled')
RESULT = {  # as contest.py returns it
  'seconds': {'ours': [0.5, 0.5, 0.25], 'eager': [1.0, 2.0, 1.0], 'compiled': [4.0, 4.0, 4.0]},
  'multiply_adds': 100_000_000_000,
  'products': {'ours': [700e9, 900e9], 'eager': [600e9]},
  'made': {name: {'runs_on': '2 threads', 'start': 3.0} for name in NAMES},
  'memory': {name: (2**30, None) for name in NAMES},
  'errors': {},
  'alone': False,
}


class FakeWorker:
  """Takes 0.25 s a step; 'broken' fails in its second block."""

  told = []

  def __init__(self, module, platform, environment):
    self.name, self.blocks = module, 0

  def ask(self, do, seconds=None, **arguments):
    self.told.append((self.name, do))
    if do == 'run':
      self.blocks += arguments['steps'] == 8
      if self.name == 'broken' and self.blocks == 2:
        raise worker.WorkerError('broken')
      return 0.25
    made = {'multiply_adds': None, 'runs_on': '1 device'}
    return {'describe': {'versions': {}}, 'make': made, 'memory': (1, 2), 'product': 1e9}[do]

  def close(self):
    self.told.append((self.name, 'close'))

  def log(self):
    return f'{self.name} says'


def table(models, *errors):
  return [{'models': models, 'crops': n, 'top1_error': e} for n, e in zip((1, 10), errors, strict=True)]
