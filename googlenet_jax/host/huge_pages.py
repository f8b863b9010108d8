"""Memory in pages of 2 MB instead of 4 KB. The C library reads this setting when a program starts."""

import os
import pathlib
import re
import sys

from googlenet_jax.host import program

VARIABLE = 'GLIBC_TUNABLES'
TUNABLE = 'glibc.malloc.hugetlb'
KERNEL = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')


def glibc_can() -> bool:
  """Returns whether the C library is glibc 2.35 or newer, which knows the setting."""
  name = os.confstr('CS_GNU_LIBC_VERSION') if 'CS_GNU_LIBC_VERSION' in getattr(os, 'confstr_names', ()) else None
  return name is not None and tuple(map(int, re.findall(r'\d+', name)))[:2] >= (2, 35)


def environment() -> dict[str, str]:
  """Returns what to add to the environment to get huge pages; nothing if they are on or the user has chosen."""
  told = os.environ.get(VARIABLE, '')
  try:
    on_request = glibc_can() and '[madvise]' in KERNEL.read_text()  # and not [always] or [never]
  except OSError:
    on_request = False
  return {VARIABLE: ':'.join(filter(None, [told, f'{TUNABLE}=1']))} if on_request and TUNABLE not in told else {}


def restart() -> None:
  """Restarts this program with huge pages. Returns if it has them already or cannot get them.

  On a CPU, XLA allocates hundreds of megabytes again in every step. The kernel maps and zeroes them page by page
  (experiments/results/cpu_devices.md). glibc requests huge pages if an environment variable says so. It reads the
  variable once, when a program is loaded.
  """
  added = environment()
  if added and program.can_restart():
    os.environ.update(added)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
