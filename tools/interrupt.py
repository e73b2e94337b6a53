"""An interrupt while a command still imports its libraries: it ends in the line that it would end in later, at once."""

import os
import signal


def end_at_once_on_interrupt() -> None:
    """Until `interrupt_as_usual`, for a program that has not begun anything that needs an end."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as of a job in the background
        signal.signal(signal.SIGINT, _end)


def interrupt_as_usual() -> None:
    """Let an interrupt raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(128 + signal.SIGINT)
