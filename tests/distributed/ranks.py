"""Process groups that stay alive across tests: starting one costs a second, a call milliseconds.

`Ranks(2).run(function, *arguments)` calls a module-level function in two real processes joined by gloo, and returns
what each rank returned. A failure on any rank ends the group (the others may wait in a collective for ever) and raises
with that rank's traceback; the next call starts a new group.
"""

import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from tests.distributed.ports import master_port
from tests.forked import ForkedProcess


class Ranks:
    """`world_size` processes, started at the first call."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
        """What `function(*arguments)` returned on each rank. Raises AssertionError with a failed rank's traceback."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                raise AssertionError(f"{function.__name__} on {self.world_size} ranks took longer than {timeout} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    failed, results[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    failed, results[rank] = True, "the process died"
                if failed:
                    self.stop()
                    raise AssertionError(f"rank {rank} of {self.world_size} failed:\n{results[rank]}")
        return [results[rank] for rank in range(self.world_size)]

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        port = master_port()
        for rank in range(self.world_size):
            ours, theirs = Pipe()
            process = ForkedProcess(target=_serve, args=(rank, self.world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch
    import torch.distributed as dist

    from megagpt.training.engine import init_process_group

    torch.set_num_threads(1)
    store, _, _ = next(dist.rendezvous("env://", rank, world_size))
    init_process_group("cpu", store, rank, world_size)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(*arguments)))
        except BaseException:  # noqa: BLE001 - whatever it was, the test that called must see it
            pipe.send((True, traceback.format_exc()))
