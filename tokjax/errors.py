"""Errors that a user can mend: the command line prints them in one line, without a traceback."""


class UserError(ValueError):
    """Bad input from the command line, a config, a path or a file."""
