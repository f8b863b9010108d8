"""The program starts itself again with huge pages, once, and respects what the user has chosen."""

import os
import subprocess
import sys

import pytest

from googlenet_jax.host import huge_pages

ON = 'glibc.malloc.hugetlb=1'
# Prints its arguments, the variable, and whether most of 256 MB lie on huge pages. (NumPy asks for them by itself.)
CODE = """
import os, sys
from googlenet_jax.host import huge_pages
print('started')
huge_pages.restart()
memory = b'1' * 2**28
with open('/proc/self/smaps_rollup') as file:
  (kilobytes,) = (line.split()[1] for line in file if line.startswith('AnonHugePages'))
print(sys.argv[1:], os.environ.get('GLIBC_TUNABLES'), int(kilobytes) > 2**17)
"""


@pytest.fixture
def kernel(tmp_path, monkeypatch):
  monkeypatch.setattr(huge_pages, 'KERNEL', tmp_path / 'enabled')
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  (tmp_path / 'enabled').write_text('always [madvise] never\n')
  return tmp_path / 'enabled'


@pytest.mark.skipif(not huge_pages.glibc_can(), reason='another C library')
def test_what_is_added_to_the_environment(kernel, monkeypatch):
  assert huge_pages.environment() == {'GLIBC_TUNABLES': ON}
  monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.tcache_count=3')
  assert huge_pages.environment() == {'GLIBC_TUNABLES': f'glibc.malloc.tcache_count=3:{ON}'}
  monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=0')
  assert huge_pages.environment() == {}
  monkeypatch.delenv('GLIBC_TUNABLES')
  for choice in ('always madvise [never]', '[always] madvise never'):  # there is nothing to ask for, or no need to ask
    kernel.write_text(choice)
    assert huge_pages.environment() == {}
  kernel.unlink()
  assert huge_pages.environment() == {}


@pytest.mark.skipif(not huge_pages.environment() and ON not in os.environ.get('GLIBC_TUNABLES', ''), reason='none here')
def test_a_program_starts_itself_again_once_with_its_arguments(tmp_path):
  environment = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
  (tmp_path / 'program.py').write_text(CODE)
  environment['PYTHONPATH'] = os.getcwd()
  command = [sys.executable, '-u', tmp_path / 'program.py', 'a b', '--c=d']
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  assert done.stdout.splitlines() == ['started', 'started', f"['a b', '--c=d'] {ON} True"]
  off = environment | {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=0'}
  done = subprocess.run(command, env=off, capture_output=True, text=True, check=True)
  assert done.stdout.splitlines() == ['started', "['a b', '--c=d'] glibc.malloc.hugetlb=0 False"]
