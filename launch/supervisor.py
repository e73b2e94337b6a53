"""Watches over one rank's process: signals, lost ranks, hangs; ends the process when training cannot."""

import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import NoReturn

from launch.environment import ProcessEnvironment
from launch.liveness import Liveness, Loss, Reason
from launch.signals import StopSignals
from launch.watchdog import Watchdog, exit_in_any_case
from megagpt.training.supervision import HANG, LOST, Supervisor

logger = logging.getLogger("megagpt.launch")

_CODES = {"hang": HANG, "lost": LOST, "failed": 1}

_GRACE_SECONDS = 10.0  # for the main thread to come out of its collective by itself


class ProcessSupervisor(Supervisor):
    """A Supervisor of a real process; `close` it at the end."""

    def __init__(self, place: ProcessEnvironment, signals: StopSignals, logs: Path, step_timeout: float) -> None:
        """Needs the process group. logs: folder. step_timeout: seconds, 0: hangs are not looked for."""
        self._place, self._signals = place, signals
        self._loss: Loss | None = None
        self._known, self._ended = threading.Event(), threading.Event()
        file = logs / f"hang_rank_{place.rank}.txt"
        self._watchdog = Watchdog(step_timeout, file, self._hangs) if step_timeout else None
        self._liveness = Liveness(place.rank, self._lost)
        self._join()

    def stop_requested(self) -> int:
        """The number of the signal that asked this process to stop; 0: none did."""
        return self._signals.requested

    def beat(self, phase: str, patient: bool = False) -> None:
        """There is progress; a patient phase may take as long as it needs. What is no step's is written to the log."""
        if not phase.startswith("step "):
            logger.info("%s", phase)
        if self._watchdog:
            self._watchdog.beat(phase, patient)

    def explain(self) -> Loss | None:
        """The rank whose loss made a collective fail just now, as far as it becomes known soon."""
        self._known.wait(_GRACE_SECONDS / 2)
        return self._loss

    def close(self, reason: Reason, detail: str = "") -> None:
        """This rank ends by itself."""
        self._ended.set()
        self._liveness.leave(reason, detail)
        if self._watchdog:
            self._watchdog.close()

    def end(self, loss: Loss) -> NoReturn:
        """End this process because of another one, without waiting for libraries that wait for that one."""
        if loss.reason == "hang":
            time.sleep(_GRACE_SECONDS)  # the thread that heard of it writes this rank's state and ends the process
        self._exit(_CODES[loss.reason], str(loss))

    def _join(self) -> None:
        import torch.distributed as dist

        box: list[tuple[int, str] | None] = [self._liveness.serve() if self._place.rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        if self._place.rank:
            assert box[0] is not None
            port, token = box[0]
            self._liveness.connect(self._place.master_addr, port, token)
        else:
            self._liveness.await_all(self._place.world_size)

    def _lost(self, loss: Loss) -> None:
        """In a thread: another rank is gone, and the main thread will fail or hang in its next collective."""
        self._loss = loss
        self._known.set()
        if loss.reason == "hang":
            exit_in_any_case()
            if self._watchdog:
                self._watchdog.write_state(str(loss))
            self._exit(HANG, str(loss))
        if not self._ended.wait(_GRACE_SECONDS):
            self._exit(_CODES[loss.reason], str(loss))

    def _hangs(self, detail: str) -> None:
        self._liveness.leave("hang", detail)
        time.sleep(1.0)  # let the others hear of it before the connection ends
        me = Loss(self._place.rank, socket.gethostname(), "hang", detail)
        self._exit(HANG, str(me))

    def _exit(self, code: int, message: str) -> NoReturn:
        logger.error("%s", message)
        logging.shutdown()
        os.write(2, f"error: [rank {self._place.rank}] {message}\n".encode())
        os._exit(code)
