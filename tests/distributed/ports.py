"""Ports for process groups that several test sessions start side by side."""

import random
import socket
from contextlib import suppress

_RANDOM = random.SystemRandom()  # hypothesis seeds the other one


def master_port() -> int:
    """A free port of those that the kernel never hands out by itself: nobody gets it before rank 0 listens there."""
    while True:
        port = _RANDOM.randrange(15_000, 32_000)
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("", port))
            return port
