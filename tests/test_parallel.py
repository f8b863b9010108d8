"""What parallel.py does to the process; meshes and shardings are tested with the training step."""

import subprocess
import sys

import pytest

# Pages faulted in by writing the same 64 MB for the third time, after it was freed twice.
CODE = """
import resource, sys
import numpy as np
from googlenet_jax import parallel
if sys.argv[1] == 'kept':
  parallel.keep_freed_memory()
for _ in range(3):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(2**24, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason="glibc's malloc")
def test_freed_memory_is_kept():
  faults = {
    case: int(subprocess.run([sys.executable, '-c', CODE, case], capture_output=True, check=True, text=True).stdout)
    for case in ('kept', 'returned')
  }
  assert faults['kept'] < 100 < faults['returned']
