"""The hang watchdog: without progress for `faults.step_timeout` this rank writes down where it stands, and ends.

Written to logs/hang_rank_R.txt: the phase, how far each process group has come (a rank whose count is behind is the one
that the others wait for), the stacks of all threads. A thread can only do that while no other one holds Python's lock
for ever: for that case faulthandler's timer, which needs none, writes the stacks a little later and ends the process.
"""

import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megagpt.training.supervision import HANG

_CHECK_SECONDS = 1.0
_GRACE_SECONDS = 20.0  # how much later faulthandler's timer is due than the thread


class Watchdog:
    """Watches from construction on; `beat` feeds it."""

    def __init__(self, timeout: float, file: Path, on_hang: Callable[[str], object]) -> None:
        """timeout: seconds. file: for stacks and state. on_hang: called in the thread, once, after writing."""
        self._timeout, self._file, self._on_hang = timeout, file, on_hang
        self._phase, self._since, self._patient = "start", time.monotonic(), False
        self._stop = threading.Event()
        self._output = file.with_suffix(".stacks").open("w", encoding="utf-8")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, phase: str, patient: bool = False) -> None:
        """There is progress: `phase` begins; a patient one has no limit."""
        self._phase, self._since, self._patient = phase, time.monotonic(), patient

    def close(self) -> None:
        """Watch no more."""
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._output.close()
        self._drop_empty_output()

    def _drop_empty_output(self) -> None:
        path = Path(self._output.name)
        if path.exists() and not path.stat().st_size:
            path.unlink()

    def write_state(self, headline: str) -> None:
        """Write what this rank is doing to its file."""
        with self._file.open("w", encoding="utf-8") as file:
            waited = time.monotonic() - self._since
            file.write(f"{headline}\nphase: {self._phase}, for {waited:.0f} s\n\n")
            file.write(collective_state())
            file.write("\nStacks of all threads, the newest call first:\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.cancel_dump_traceback_later()
        self._drop_empty_output()

    def _watch(self) -> None:
        while not self._stop.wait(min(_CHECK_SECONDS, self._timeout / 4)):
            waited = 0.0 if self._patient else time.monotonic() - self._since
            # Armed anew each time, so that it fires only if this thread cannot run.
            faulthandler.dump_traceback_later(
                max(self._timeout - waited, 0) + _GRACE_SECONDS, file=self._output, exit=True
            )
            if waited > self._timeout:
                message = f" for {waited:.0f} s in: {self._phase}"
                exit_in_any_case()
                try:
                    self.write_state(f"no progress{message}")
                finally:
                    self._on_hang(message)
                return


def exit_in_any_case() -> None:
    """Writing down a hang may hang itself, where the file system does not answer: then end without it."""
    timer = threading.Timer(30.0, os._exit, (HANG,))
    timer.daemon = True
    timer.start()


def collective_state() -> str:
    """How many collectives each process group of this rank has begun, and NCCL's own record where there is one."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return "no process group yet\n"
    lines = [f"rank {dist.get_rank()} of {dist.get_world_size()}\n"]
    for group, (backend, _) in dist.distributed_c10d._world.pg_map.items():
        lines.append(f"group {group.group_name}: {backend}, {group.size()} ranks, {_sequence(group)}\n")
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    if dump is not None and torch.cuda.is_available():
        lines.append(json.dumps(json.loads(dump()), indent=1) + "\n")
    return "".join(lines)


def _sequence(group) -> str:  # type: ignore[no-untyped-def]
    try:
        return f"{group._get_sequence_number_for_group()} collectives begun"
    except RuntimeError as error:  # groups that count nothing
        return f"collectives not counted ({str(error).splitlines()[0]})"
