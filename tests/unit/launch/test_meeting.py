"""The ranks of a job find each other past ports in use, other jobs and names that do not resolve."""

import socket
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest

from launch.environment import ProcessEnvironment, free_port
from launch.meeting import another_client, find, reconnected, shared_store
from megagpt.errors import UsageError, UserError


def places(world_size: int, ports: tuple[int, ...], job: str = "7.0.0", addresses: tuple[str, ...] = ("127.0.0.1",)):
    return [
        ProcessEnvironment("Slurm", rank, rank, world_size, world_size, addresses, ports, job)
        for rank in range(world_size)
    ]


def meet(all_places) -> list[str]:
    """What each rank reads of what rank 0 has written into the store that they share."""
    words: list[str] = [""] * len(all_places)
    done = threading.Barrier(len(all_places))

    def take_part(place):
        with shared_store(place, timeout=20) as (found, store):
            if place.rank == 0:
                store.set("word", place.job)
            words[place.rank] = store.get("word").decode()
            assert found.addresses == ("127.0.0.1",) or place.rank == 0
            done.wait(20)

    threads = [threading.Thread(target=take_part, args=(place,)) for place in all_places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return words


def free_ports(count: int) -> tuple[int, ...]:
    return tuple({free_port() for _ in range(4 * count)})[:count]


def test_ranks_share_a_store():
    assert meet(places(3, free_ports(1))) == ["7.0.0"] * 3


def test_a_port_in_use_by_a_program_that_says_nothing_is_passed_over():
    ports = free_ports(2)
    with socket.create_server(("", ports[0])):
        assert meet(places(2, ports)) == ["7.0.0"] * 2


def test_a_port_in_use_by_a_program_that_talks_nonsense_is_passed_over():
    ports = free_ports(2)
    with socket.create_server(("", ports[0])) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        assert meet(places(2, ports)) == ["7.0.0"] * 2


def test_two_jobs_with_the_same_ports_do_not_mix():
    ports = free_ports(4)
    with shared_store(places(2, ports, job="1.0.0")[0]) as (_, other):
        other.set("word", "of another job")
        assert meet(places(2, ports, job="2.0.0")) == ["2.0.0"] * 2


def test_an_address_that_does_not_resolve_is_passed_over():
    first, second = places(2, free_ports(1))
    assert meet([first, replace(second, addresses=("no-such-host.invalid", "127.0.0.1"))]) == ["7.0.0"] * 2


def test_no_free_port_is_told_with_the_range():
    ports = free_ports(2)
    with (
        socket.create_server(("", ports[0])),
        socket.create_server(("", ports[1])),
        pytest.raises(UsageError, match=f"none of the ports {ports[0]} to {ports[1]} is free"),
        shared_store(places(2, ports)[0]),
    ):
        pass


def test_a_rank_0_that_is_not_there_is_told_with_all_that_was_tried():
    port = free_port()
    start = time.monotonic()
    with pytest.raises(UserError, match=r"no-such-host.invalid does not resolve.*127.0.0.1 port .*set MASTER_ADDR"):
        find(places(2, (port,), addresses=("no-such-host.invalid", "127.0.0.1"))[1], timeout=0.5)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("connect", [another_client, reconnected])
def test_a_client_that_waits_does_not_keep_another_thread_from_the_store(connect):
    with shared_store(places(1, free_ports(1))[0]) as (_, store):
        other = connect(store)
        waiting = threading.Thread(target=store.wait, args=(["awaited"], timedelta(seconds=20)))
        waiting.start()
        other.set("word", "heard")
        assert other.get("word") == b"heard"
        assert waiting.is_alive()
        other.set("awaited", "now")
        waiting.join(20)
        assert not waiting.is_alive()
