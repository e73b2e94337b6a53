"""Errors that a user can cause: their message is one line that says what, where and what to do.

The commands print the message without a traceback and exit with `exit_code`; anything else is a bug and keeps its
traceback.
"""


class UserError(Exception):
    """A failure outside the program: a file, a dataset, a checkpoint, the machine. Exit code 1."""

    exit_code = 1


class UsageError(UserError, ValueError):
    """A wrong argument or configuration, found before any work. Exit code 2."""

    exit_code = 2


class ConfigError(UsageError):
    """One or more problems of a configuration; the message has one line a problem, each with file and key."""


class AgreedError(UserError):
    """A UserError that every rank raises together, with the exit code of the first; rank 0 alone needs to print it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
