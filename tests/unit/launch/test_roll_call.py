"""What the ranks say of themselves before training is judged rightly, in one line that names hosts and ranks."""

import json
import socket
import threading
from dataclasses import asdict, replace

import psutil
import pytest
from torch.distributed import TCPStore

from launch.environment import ProcessEnvironment
from launch.roll_call import (
    Presence,
    address_towards,
    contradiction,
    gloo_interface,
    granted_gpus,
    here,
    interface_of,
    missing,
    network,
    roll_call,
)
from megagpt.errors import AgreedError, UsageError


def on_gpus(devices: list[list[str]], granted: int | None = None) -> list[Presence]:
    """A presence a rank: `devices` of each node's ranks."""
    found = [
        Presence(0, f"node{node}", f"network{node}", f"10.0.0.{node}", device, granted)
        for node, ranks in enumerate(devices)
        for device in ranks
    ]
    return [replace(one, rank=rank) for rank, one in enumerate(found)]


def test_a_rank_a_gpu_is_fine_on_equal_and_unequal_nodes():
    assert contradiction(on_gpus([["a", "b"], ["c", "d"]], granted=2)) is None
    assert contradiction(on_gpus([["a", "b"], ["c"]])) is None
    assert contradiction(on_gpus([["cpu", "cpu"], ["cpu"]], granted=8)) is None


def test_equal_device_names_on_different_hosts_are_different_gpus():
    assert contradiction(on_gpus([["a"], ["a"]], granted=1)) is None


def test_two_ranks_on_one_gpu_are_refused_by_name():
    message, code = contradiction(on_gpus([["a"], ["b", "c", "b", "c"]])) or ("", 0)
    assert message.startswith("node1: ranks 1 and 3 would share one GPU (b); 4 ranks see only 2 GPUs")
    assert code == 2


def test_gpus_that_nobody_would_use_are_refused_with_what_to_do():
    message, code = contradiction(on_gpus([["a"], ["b"]], granted=8)) or ("", 0)
    assert "node0: Slurm gave this job 8 GPUs, but 1 rank would use only 1" in message
    assert "--ntasks-per-node=8" in message
    assert code == 2


def test_gpus_that_slurm_does_not_manage_and_nobody_would_use_are_refused_too():
    everybody = [replace(one, visible_gpus=8) for one in on_gpus([["a"], ["b"]], granted=0)]
    message, code = contradiction(everybody) or ("", 0)
    assert message.startswith("node0: there are 8 GPUs, which Slurm does not manage, but 1 rank would use only 1")
    assert code == 2
    assert contradiction([replace(one, granted_gpus=None) for one in everybody]) is None  # a workstation
    assert contradiction([replace(one, visible_gpus=1) for one in everybody]) is None


def test_a_node_without_gpus_among_nodes_with_them_is_named():
    message, _ = contradiction(on_gpus([["a"], ["b"], ["cpu"]])) or ("", 0)
    assert message == "2 ranks have a GPU and 1 have none; look at node2"


def test_a_problem_of_some_ranks_is_told_once_with_the_first_and_the_count():
    everybody = on_gpus([["cpu"], ["cpu"], ["cpu"]])
    troubled = [everybody[0], *(replace(one, problem="no GPU", exit_code=2) for one in everybody[1:])]
    message = "[rank 1 on node1] no GPU (and on 1 more of 3 ranks) (--exclude=node1,node2 leaves them out)"
    assert contradiction(troubled) == (message, 2)
    assert contradiction([replace(one, problem="no GPU", exit_code=2) for one in everybody]) == ("no GPU", 2)


def test_ranks_that_did_not_come_are_told_with_the_nodes_to_exclude():
    present = [one for one in on_gpus([["a", "b"], ["c", "d"], ["e", "f"]]) if one.host != "node1"]
    message = missing(present, 6, {"SLURM_STEP_NODELIST": "node[0-2]"}, timeout=20)
    assert message == ("2 of 6 ranks did not come within 20 s: ranks 2, 3 of node1 (--exclude=node1 leaves it out)")
    assert missing(on_gpus([["a"]]), 1, {}, timeout=20) == ""


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1"}, 0),
        ({"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_GPUS": "2,3"}, 2),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_GPUS": "0"}, 1),
    ],
)
def test_gpus_that_slurm_gave_are_counted(environ, count):
    assert granted_gpus(environ) == count


def together(presences: list[Presence], world_size: int, timeout: float = 10.0) -> list[object]:
    """What roll_call returned or raised on each rank that is there."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    outcomes: list[object] = [None] * len(presences)

    def take_part(index: int, mine: Presence) -> None:
        place = ProcessEnvironment("Slurm", mine.rank, mine.rank, world_size, world_size, ("127.0.0.1",), (1,), "j")
        own = TCPStore("127.0.0.1", store.port, is_master=False)  # a client does one thing at a time
        try:
            outcomes[index] = roll_call(place, own, mine, timeout)
        except AgreedError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=take_part, args=pair) for pair in enumerate(presences)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


def test_all_ranks_hear_the_same():
    everybody = on_gpus([["a", "b"], ["c"]])
    assert together(everybody, 3) == [everybody] * 3


def test_all_ranks_raise_what_one_of_them_cannot_do():
    place = ProcessEnvironment("Slurm", 1, 1, 2, 2, ("127.0.0.1",), (1,), "j")
    bad = here(place, "cpu", 0, UsageError("it has no GPU"), {"SLURMD_NODENAME": "node7"})
    outcomes = together([replace(bad, rank=0, problem="", exit_code=0), bad], 2)
    assert [str(error) for error in outcomes] == ["[rank 1 on node7] it has no GPU"] * 2
    assert {error.exit_code for error in outcomes} == {2}


def test_all_ranks_that_came_raise_when_one_did_not():
    outcomes = together(on_gpus([["a", "b"]]), 3, timeout=0.5)
    assert [str(error).split(":")[0] for error in outcomes] == ["1 of 3 ranks did not come within 0 s"] * 2


def test_rank_0_whose_end_takes_the_store_away_waits_until_the_others_have_read_what_is_wrong():
    mine, other = on_gpus([["a", "a"]])  # on one GPU
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("roll_call/1", json.dumps(asdict(other)))
    ended = threading.Event()

    def take_part() -> None:
        place = ProcessEnvironment("Slurm", 0, 0, 2, 2, ("127.0.0.1",), (1,), "j")
        with pytest.raises(AgreedError, match="would share one GPU"):
            roll_call(place, TCPStore("127.0.0.1", store.port, is_master=False), mine, timeout=10.0)
        ended.set()

    threading.Thread(target=take_part, daemon=True).start()
    assert not ended.wait(1.5)
    store.add("roll_call/heard", 1)
    assert ended.wait(5)


def test_ranks_of_one_host_speak_over_loopback_those_of_several_over_the_interface_between_them():
    place = ProcessEnvironment("Slurm", 0, 0, 2, 1, ("127.0.0.1",), (1,), "j")
    here_, there = replace(on_gpus([["a"]])[0], network=network()), replace(on_gpus([["a"], ["b"]])[1])
    assert gloo_interface(place, [here_, replace(here_, rank=1)]) == interface_of("127.0.0.1")
    outside = {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    }
    if not outside:
        pytest.skip("this machine has no network interface but loopback")
    name, address = next(iter(outside.items()))
    neighbour = ".".join([*address.split(".")[:3], "254" if not address.endswith(".254") else "253"])
    assert address_towards(address) == address
    assert gloo_interface(place, [here_, replace(there, address=neighbour)]) == name
