"""Where a page can listen, and who can reach it there."""

import errno
import ipaddress
import socket

from googlenet_jax.host.errors import UserError, reason

PORTS = 100  # ports that are tried to suggest a free one


def check(host: str, port: int) -> None:
  """Refuses an address that cannot be listened on.

  Raises:
    UserError: the port is in use, and the text has the next free one; or the address is not one of this machine.
  """
  error = _trouble(host, port)
  if error is None:
    return
  if isinstance(error, socket.gaierror) or error.errno not in (errno.EADDRINUSE, errno.EACCES):
    raise UserError(
      f'--host={host}: this machine cannot listen there ({reason(error)}): leave --host out, or give one '
      'of its addresses'
    ) from error
  free = next((other for other in range(port + 1, min(port + PORTS, 65536)) if _trouble(host, other) is None), None)
  advice = f'give another one, such as --port={free}' if free else 'give another --port'
  raise UserError(f'port {port} cannot be used ({reason(error)}): {advice}') from error


def _trouble(host: str, port: int) -> OSError | None:
  """Returns why nothing can listen at an address, and None if it can."""
  try:
    for address in dict.fromkeys((host, '127.0.0.1')):  # Gradio looks at the second one too
      for family, kind, protocol, _, place in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[:1]:
        with socket.socket(family, kind, protocol) as trial:
          trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
          trial.bind(place)
  except OSError as error:
    return error
  return None


def is_of_this_machine(host: str) -> bool:
  """Returns whether only this machine can reach an address."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost'
