"""Requests to stop: SIGTERM and SIGUSR1 end the run after the step under way, a second one ends the process at once.

The bytes that Python's C handler writes are read by a thread, since a Python handler would have to wait until the main
thread returns from a collective that may never end.
"""

import os
import signal
import threading
import time
from collections.abc import Callable

from megagpt.training.supervision import REQUEUE

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SAME_SECONDS = 1.0  # launchers and process groups both pass a signal on: so it may come twice


class StopSignals:
    """Listens from construction on."""

    def __init__(self, exit_process: Callable[[int], object] = os._exit) -> None:
        """exit_process: how a second signal ends this process."""
        self._exit_process = exit_process
        self._first: tuple[int, float] | None = None
        readable, writable = os.pipe()
        os.set_blocking(writable, False)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # what counts is the byte in the pipe
        threading.Thread(target=self._listen, args=(readable,), name="signals", daemon=True).start()

    @property
    def requested(self) -> int:
        """The number of the signal that asked to stop; 0: none did."""
        return self._first[0] if self._first else 0

    def _listen(self, pipe: int) -> None:
        while byte := os.read(pipe, 1):
            if byte[0] in _SIGNALS:
                self._take(byte[0])

    def _take(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self._first is None:
            self._first = number, now
            _tell(f"{name}: stopping after this step, with a checkpoint; a second signal ends the process at once")
        elif now - self._first[1] > _SAME_SECONDS:
            _tell(f"second signal {name}: ending at once; the last complete checkpoint stays")
            self._exit_process(REQUEUE)


def _tell(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{message}\n".encode())
