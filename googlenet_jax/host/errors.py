"""The one exception for mistakes that the user can correct."""


class UserError(Exception):
  """The user gave something wrong. The text says what is wrong, where, and what to do.

  `main.py` prints the text as one line and exits with status 2, without a traceback.
  """
