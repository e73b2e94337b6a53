"""How the ranks find rank 0, and the store they share from then on.

Rank 0 listens at the first of its candidate ports that is free; the others try every candidate address and port in turn
and tell whom they seek, so that neither a port in use nor another job's rank 0 behind it is taken for their own. The
answer is the port of a torch TCPStore on the same host, chosen by the kernel. One line of JSON each way:
{"job": word} and {"store": port}. Where a launcher has a store already (torchrun), that one is used.
"""

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from launch.environment import ProcessEnvironment
from megagpt.errors import UsageError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger("megagpt.launch")

MEETING_SECONDS = 600.0
"""How long ranks wait for each other: a cold file system may take minutes to give a node its Python."""

_TRY_SECONDS = 3.0  # for one address and port


@contextlib.contextmanager
def shared_store(
    place: ProcessEnvironment, timeout: float = MEETING_SECONDS
) -> Iterator[tuple[ProcessEnvironment, "Store"]]:
    """`place` with the one address and port that work, and a store that all ranks share.

    timeout: seconds to wait for rank 0. Raises UsageError if the given port is taken, UserError if rank 0 is not found.
    """
    from torch.distributed import DistError, TCPStore, rendezvous

    patience = timedelta(seconds=timeout)
    if not place.job and place.launcher == "torchrun":
        address = f"{place.master_addr}:{place.master_port}"
        try:
            store, _, _ = next(rendezvous("env://", place.rank, place.world_size, timeout=patience))
        except DistError as error:
            raise UserError(f"cannot use MASTER_ADDR and MASTER_PORT, {address}: {_first_line(error)}") from error
        yield place, store
    elif place.rank == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
        with _Reception(place, store.port) if place.world_size > 1 else contextlib.nullcontext() as reception:
            port = reception.port if reception else store.port
            logger.info("rank 0 waits at %s, port %d", " or ".join(place.addresses), port)
            yield replace(place, ports=(store.port,)), store
    else:
        address, port = find(place, timeout)
        store = TCPStore(address, port, is_master=False, timeout=patience)
        yield replace(place, addresses=(address,), ports=(port,)), store


def another_client(store: "Store") -> "Store":
    """The same store over a connection of its own, for another thread: a client that waits serves nobody else."""
    if hasattr(store, "clone"):
        return store.clone()
    return reconnected(store)


def reconnected(store: "Store") -> "Store":
    """What torch before 2.8 has no `clone` for. Keys are seen without the prefix that torchrun gives them."""
    from torch.distributed import TCPStore

    while not isinstance(store, TCPStore):
        store = store.underlying_store  # type: ignore[attr-defined]
    return TCPStore(store.host, store.port, is_master=False)


class _Reception:
    """Rank 0: tells everyone who seeks this job where its store is, until it is closed."""

    def __init__(self, place: ProcessEnvironment, store_port: int) -> None:
        self._job, self._answer = place.job, json.dumps({"store": store_port}).encode() + b"\n"
        self._server = _listen(place.ports)
        self.port: int = self._server.getsockname()[1]

    def __enter__(self) -> "_Reception":
        threading.Thread(target=self._receive_all, name="reception", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closing would not
        self._server.close()

    def _receive_all(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # somebody who scans ports may say nothing, or be gone
            connection.settimeout(_TRY_SECONDS)
            if _read_line(connection).get("job") == self._job:
                connection.sendall(self._answer)


def find(place: ProcessEnvironment, timeout: float) -> tuple[str, int]:
    """The address of rank 0 as a number and the port of its store. Raises UserError after `timeout` seconds."""
    until = time.monotonic() + timeout
    pause, troubles = 0.05, dict[str, str]()
    while time.monotonic() < until:
        for address in place.addresses:
            try:
                resolved = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
            except OSError as error:
                troubles[address] = f"{address} does not resolve ({error.strerror})"
                continue
            for number in dict.fromkeys(entry[4][0] for entry in resolved):
                for port in place.ports:
                    try:
                        return str(number), _ask(str(number), port, place.job)
                    except OSError as error:
                        troubles[address] = f"{number} port {port}: {error.strerror or error}"
                        if not isinstance(error, ConnectionError):
                            break  # the host does not answer: another port will not help
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
    raise UserError(
        f"rank {place.rank} did not find rank 0 within {timeout:.0f} s; tried {'; '.join(troubles.values())}; "
        "set MASTER_ADDR to an address of the first node that the others reach"
    )


def _ask(number: str, port: int, job: str) -> int:
    with socket.create_connection((number, port), timeout=_TRY_SECONDS) as connection:
        connection.sendall(json.dumps({"job": job}).encode() + b"\n")
        answer = _read_line(connection).get("store")
    if not isinstance(answer, int):
        raise ConnectionRefusedError(0, "somebody else listens there")
    return answer


def _read_line(connection: socket.socket) -> dict[str, object]:
    """A line of JSON; empty if it is something else, or too long."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < 4096:
            received = connection.recv(4096)
            if not received:
                return {}
            data += received
        message = json.loads(data)
    except (ValueError, TimeoutError):
        return {}
    return message if isinstance(message, dict) else {}


def _listen(ports: tuple[int, ...]) -> socket.socket:
    """On the first free port, on all interfaces, for IPv4 and IPv6."""
    dual = socket.has_dualstack_ipv6()
    for port in ports:
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, backlog=4096, dualstack_ipv6=dual
            )
        except OSError as error:
            logger.info("port %d cannot be used: %s", port, error.strerror)
    raise UsageError(f"none of the ports {ports[0]} to {ports[-1]} is free on {socket.gethostname()}; set MASTER_PORT")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
