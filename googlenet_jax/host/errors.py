"""The one exception that means: the user can mend this."""


class UserError(Exception):
  """A mistake in what the user gave: says what is wrong, where, and what to do.

  `main.py` prints its text as one line and exits with status 2, without a traceback.
  """
