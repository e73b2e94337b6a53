"""Who is still there: each rank holds a TCP connection to rank 0, and the kernel closes it when a process dies.

A collective that waits for a dead rank fails late (NCCL: after minutes) or with a message that names an address, at
best. Here its death is known at once; that of a whole node, whose kernel can close nothing, by TCP keepalive within
half a minute. Nothing is sent in peace time and no thread needs to run for a rank to count as alive, so a busy process
is never taken for a dead one. Lines of JSON: {"rank", "host"} at first, then {"end": reason} before a rank leaves.
"""

import json
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger("megagpt.launch")

_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
_CONNECT_SECONDS = 60.0

Reason = Literal["done", "failed", "hang"]


@dataclass(frozen=True)
class Loss:
    """A rank that is no longer there."""

    rank: int
    host: str
    reason: Literal["lost", "failed", "hang"]
    """lost: its process or node died without a word."""
    detail: str = ""

    def __str__(self) -> str:
        where = f"rank {self.rank} on {self.host}"
        if self.reason == "hang":
            return f"{where} made no progress{self.detail}"
        if self.reason == "failed":
            return f"{where} failed: {self.detail} (see rank_{self.rank}.log)"
        return f"{where} was lost: its process was killed or its node died"


class Liveness:
    """This rank's part of the watch; `on_loss` is called once, in a thread, when another rank is gone."""

    def __init__(self, rank: int, on_loss: Callable[[Loss], object]) -> None:
        self._rank, self._on_loss = rank, on_loss
        self._told = threading.Lock()
        self._leaving = False
        self._lines: dict[socket.socket, bytes] = {}
        self._ranks: dict[socket.socket, tuple[int, str]] = {}
        self._to_rank_0: socket.socket | None = None
        self._token = ""
        self._server: socket.socket | None = None

    def serve(self) -> tuple[int, str]:
        """Rank 0: begin to listen; the port, and a word that tells ranks of this run from strangers."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._token = secrets.token_hex(16)
        self._server = socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=dual)
        threading.Thread(target=self._watch_all, name="liveness", daemon=True).start()
        return self._server.getsockname()[1], self._token

    def await_all(self, world_size: int) -> None:
        """Rank 0: wait until all others have connected. Raises TimeoutError naming those that have not."""
        until = time.monotonic() + _CONNECT_SECONDS
        while missing := set(range(1, world_size)) - {rank for rank, _ in list(self._ranks.values())}:
            if time.monotonic() > until:
                names = ", ".join(map(str, sorted(missing)[:8]))
                raise TimeoutError(f"rank {names} did not connect to rank 0 within {_CONNECT_SECONDS:.0f} s")
            time.sleep(0.01)

    def connect(self, host: str, port: int, token: str) -> None:
        """Other ranks: connect to rank 0 and watch it. Raises OSError if it cannot be reached."""
        self._to_rank_0 = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
        self._to_rank_0.settimeout(None)
        _keep_alive(self._to_rank_0)
        self._ranks[self._to_rank_0] = 0, host
        _send(self._to_rank_0, {"token": token, "rank": self._rank, "host": socket.gethostname()})
        threading.Thread(target=self._watch_rank_0, args=(self._to_rank_0,), name="liveness", daemon=True).start()

    def leave(self, reason: Reason, detail: str = "") -> None:
        """Tell the others that this rank ends, and why; afterwards it watches no more."""
        self._leaving = True
        message = {"end": reason, "rank": self._rank, "host": socket.gethostname(), "detail": detail}
        for connection in [self._to_rank_0] if self._to_rank_0 else list(self._ranks):
            _send(connection, message)

    def _watch_all(self) -> None:
        assert self._server is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._server:
                        connection, _ = self._server.accept()
                        _keep_alive(connection)
                        self._lines[connection] = b""
                        selector.register(connection, selectors.EVENT_READ)
                    elif not self._hear(key.fileobj):  # type: ignore[arg-type]
                        selector.unregister(key.fileobj)
                        key.fileobj.close()  # type: ignore[union-attr]

    def _hear(self, connection: socket.socket) -> bool:
        """Take what a rank says; False at the end of its connection."""
        data = _receive(connection)
        if not data:
            self._lines.pop(connection, None)
            if connection in self._ranks:
                rank, host = self._ranks.pop(connection)
                self._lost(Loss(rank, host, "lost"))
            return False
        *lines, self._lines[connection] = (self._lines[connection] + data).split(b"\n")
        return all(self._understand(connection, line) for line in lines)

    def _understand(self, connection: socket.socket, line: bytes) -> bool:
        message = _parse(line)
        if connection not in self._ranks:
            if message.get("token") != self._token:  # somebody scans ports
                self._lines.pop(connection, None)
                return False
            self._ranks[connection] = int(message["rank"]), str(message["host"])
        elif message.get("end") == "done":
            del self._ranks[connection]
        elif "end" in message:
            self._ranks.pop(connection)
            self._lost(_loss_of(message))
        return True

    def _watch_rank_0(self, connection: socket.socket) -> None:
        received = b""
        while True:
            data = _receive(connection)
            if not data:
                self._lost(Loss(*self._ranks[connection], "lost"))
                return
            *lines, received = (received + data).split(b"\n")
            for line in lines:
                message = _parse(line)
                if message.get("end") == "done":
                    return
                if "end" in message:
                    self._lost(_loss_of(message))

    def _lost(self, loss: Loss) -> None:
        if self._leaving or not self._told.acquire(blocking=False):
            return
        logger.error("%s", loss)
        for connection in list(self._ranks) if self._server else []:
            _send(connection, {"end": loss.reason, "rank": loss.rank, "host": loss.host, "detail": loss.detail})
        self._on_loss(loss)


def _loss_of(message: dict[str, Any]) -> Loss:
    return Loss(int(message["rank"]), str(message["host"]), message["end"], str(message.get("detail", "")))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError as error:  # the other side is gone: its own end is noticed by whoever watches it
        logger.info("cannot tell a rank of an end: %s", error)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except OSError:  # reset, or given up by keepalive: as good as closed
        return b""


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
