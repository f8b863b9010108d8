"""Memory in pages of 2 MB instead of 4 KB: a setting of the C library, made before the program begins."""

import os
import pathlib
import re
import sys

VARIABLE = 'GLIBC_TUNABLES'
TUNABLE = 'glibc.malloc.hugetlb'
KERNEL = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')


def glibc_can() -> bool:
  """Whether the C library is a glibc that knows the setting: 2.35 or newer."""
  name = os.confstr('CS_GNU_LIBC_VERSION') if 'CS_GNU_LIBC_VERSION' in getattr(os, 'confstr_names', ()) else None
  return name is not None and tuple(map(int, re.findall(r'\d+', name)))[:2] >= (2, 35)


def environment() -> dict[str, str]:
  """What to add to a process's environment for huge pages; nothing where it has them, or the user has chosen."""
  told = os.environ.get(VARIABLE, '')
  try:
    on_request = glibc_can() and '[madvise]' in KERNEL.read_text()  # not always, nor never
  except OSError:
    on_request = False
  return {VARIABLE: ':'.join(filter(None, [told, f'{TUNABLE}=1']))} if on_request and TUNABLE not in told else {}


def restart() -> None:
  """Starts this program anew with huge pages; returns where they are there, or are not to be had.

  XLA allocates the hundreds of megabytes that a step works in on a CPU anew each time, and the kernel then maps and
  zeroes them page by page (experiments/results/cpu_devices.md). glibc asks for huge pages if a variable says so, which
  it reads once, when a program is loaded.
  """
  added = environment()
  is_a_program = sys.argv[0] in sys.orig_argv  # and not run inside another one, as by IPython's %run
  if added and is_a_program and sys.executable:
    os.environ.update(added)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
