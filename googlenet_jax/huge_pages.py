"""Memory in pages of 2 MB instead of 4 KB: a setting of the C library, made before the program begins."""

import os
import pathlib
import sys

VARIABLE = 'GLIBC_TUNABLES'
TUNABLE = 'glibc.malloc.hugetlb'
KERNEL = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')


def environment() -> dict[str, str]:
  """What to add to a process's environment for huge pages; nothing where it has them, or the user has chosen."""
  told = os.environ.get(VARIABLE, '')
  try:
    offered = sys.platform == 'linux' and '[never]' not in KERNEL.read_text()
  except OSError:
    offered = False
  return {VARIABLE: ':'.join(filter(None, [told, f'{TUNABLE}=1']))} if offered and TUNABLE not in told else {}


def restart() -> None:
  """Starts this program anew with huge pages; returns where they are there, or are not to be had.

  XLA allocates the hundreds of megabytes that a step works in on a CPU anew each time, and the kernel then maps and
  zeroes them page by page (experiments/results/cpu_devices.md). glibc, from 2.35 on, asks for huge pages if a variable
  says so, which it reads once, when a program is loaded. To start anew costs a tenth of a second.
  """
  added = environment()
  if added and sys.executable:
    os.environ.update(added)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
