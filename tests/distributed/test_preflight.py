"""The pre-flight on real ranks: what they measure, and the command with a rank that is stale, dead or stopped."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.environment import free_port
from megagpt.config import save_config
from megagpt.scaling import fabric
from megagpt.scaling.fabric import Fabric
from tests.distributed.jobs import tiny_config
from tests.forked import ForkedProcess

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def exchanges(nodes: list[list[int]]) -> list[tuple[int, int, bool]]:
    measured = Fabric(CPU, nodes).between_nodes(0.2, lambda step, partner: None)
    return [(one.partner, one.bytes, one.intact and 0 < one.latency_seconds < 10) for one in measured]


@pytest.mark.parametrize(
    ("nodes", "partners"),
    [
        ([[0], [1], [2], [3]], {0: {1, 2, 3}, 1: {0, 2, 3}, 2: {0, 1, 3}, 3: {0, 1, 2}}),
        ([[0, 1], [2, 3]], {0: {2}, 1: {3}, 2: {0}, 3: {1}}),
        ([[0, 2, 3], [1]], {0: {1}, 1: {0}, 2: set(), 3: set()}),
        ([[0, 1, 2, 3]], {0: set(), 1: set(), 2: set(), 3: set()}),
    ],
)
def test_ranks_of_the_same_place_on_all_pairs_of_nodes_exchange_data_intact(nodes, partners, four_ranks):
    found = four_ranks.run(exchanges, nodes)
    assert {rank: {partner for partner, _, _ in one} for rank, one in enumerate(found)} == partners
    sizes = {(nbytes, intact) for one in found for _, nbytes, intact in one}
    assert len(sizes) <= 1  # the same bytes everywhere, as they arrived
    assert all(intact for _, intact in sizes)


def damaged_on_rank_2() -> list[bool]:
    """Rank 2 sends something else than it says in its exchanges."""
    if dist.get_rank() == 2:
        original = dist.batch_isend_irecv

        def damage(operations: list) -> list:
            operations[0].tensor[-1] += 1
            return original(operations)

        fabric.dist.batch_isend_irecv = damage
        try:
            list(Fabric(CPU, [[0], [1], [2]]).between_nodes(0.1, lambda step, partner: None))
        finally:
            fabric.dist.batch_isend_irecv = original
        return []
    measured = Fabric(CPU, [[0], [1], [2]]).between_nodes(0.1, lambda step, partner: None)
    return [one.intact for one in sorted(measured, key=lambda one: one.partner)]


def test_what_arrives_changed_is_noticed(three_ranks):
    assert three_ranks.run(damaged_on_rank_2)[:2] == [[True, False], [True, False]]


def collectives(nodes: list[list[int]]) -> list[tuple[str, int, bool]]:
    measured = Fabric(CPU, nodes)
    clock = measured.connect()
    assert abs(clock - measured.connect()) < 60
    within = measured.within_node(0.1)
    found = [*measured.among_all(0.2), *([within] if within else [])]
    return [(one.operation, one.ranks, one.intact and one.busbw > 0) for one in found]


def test_collectives_of_all_and_of_a_nodes_ranks_give_the_right_values(four_ranks):
    whole = [("all-reduce", 4, True), ("all-gather", 4, True), ("broadcast", 4, True)]
    found = four_ranks.run(collectives, [[0, 1, 2], [3]])
    assert found == [[*whole, ("all-reduce", 3, True)]] * 3 + [whole]


def _rank(rank: int, port: int, arguments: list[str], output: Path, trouble: str) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    place = {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "SLURMD_NODENAME": f"node{rank // 2}"}
    if rank == 2:
        from launch import preflight_facts

        if trouble == "stale":
            original = preflight_facts.code_hashes
            preflight_facts.code_hashes = lambda root: original(root) | {"launch/train.py": "0"}
        elif trouble == "wrong":
            preflight_facts.data_files = lambda config: {"data/train.bin": "permission denied"}
        elif trouble:
            Fabric.within_node = lambda self, seconds: os.kill(os.getpid(), getattr(signal, trouble))
    sys.argv = ["launch.preflight", *arguments]
    runpy.run_module("launch.preflight", run_name="__main__", alter_sys=True)


def preflight(folder: Path, *arguments: object, trouble: str = "") -> tuple[list[int | None], str, dict]:
    """Two nodes of two ranks; exit codes of the ranks that end, all that they print, the JSON file."""
    port = free_port()
    words = [*map(str, arguments), "train.device=cpu", "--output", f"{folder}/out.json", "--seconds", "6"]
    outputs = [folder / f"out_{rank}" for rank in range(4)]
    ranks = [ForkedProcess(target=_rank, args=(rank, port, words, outputs[rank], trouble)) for rank in range(4)]
    for process in ranks:
        process.start()
    try:
        for rank, process in enumerate(ranks):
            if (rank, trouble) != (2, "SIGSTOP"):
                process.join(60)
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    text = "".join(output.read_text() for output in outputs if output.exists())
    return codes, text, json.loads((folder / "out.json").read_text())


@pytest.mark.slow
def test_a_sound_job_gives_a_table_and_all_numbers(tmp_path, corpus):
    save_config(tiny_config(corpus, tmp_path / "run"), tmp_path / "config.yaml")
    before = set(tmp_path.iterdir())
    codes, text, found = preflight(tmp_path, tmp_path / "config.yaml", "--threshold=0")
    assert codes == [0] * 4, text
    assert text.startswith("pre-flight: 2 nodes, 4 ranks, CPU, Python ")
    assert re.search(r"^node0 +0-1 .*^node1 +2-3 .*^all-reduce .*^all-gather .*^broadcast ", text, re.M | re.S)
    assert (found["exit_code"], found["exclude"]) == (0, [])
    assert [rank["state"] for rank in found["ranks"]] == ["done"] * 4
    data = [rank["machine"]["data"] for rank in found["ranks"] if rank["machine"]]
    assert len(data) == 2
    assert data[0] == data[1]
    assert data[0][f"{corpus}/train.bin"] == (corpus / "train.bin").stat().st_size
    assert found["ranks"][2]["sees_run_dir"] is True
    (pair,) = found["pairs"]
    assert pair["nodes"] == ["node0", "node1"]
    assert pair["bytes_per_second"] > 0
    left = {path.name for path in set(tmp_path.iterdir()) - before}
    assert left == {"out.json", "out_0", "out_1", "out_2", "out_3"}  # no probe is left, no run folder was made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "codes", "reason"),
    [
        ("stale", [1, 1, 1, 1], "another copy of the code: launch/train.py not as where node0 has"),
        ("wrong", [1, 1, 1, 1], "data/train.bin: permission denied"),
        ("SIGKILL", [1, 1, -9, 1], "rank 2 does not answer"),
        ("SIGSTOP", [1, 1, None, 1], "rank 2 does not answer"),
    ],
)
def test_the_node_in_trouble_is_named_in_one_line_and_all_ranks_end(trouble, codes, reason, tmp_path):
    ended, text, found = preflight(tmp_path, "--threshold=0", trouble=trouble)
    assert ended == codes, text
    (error,) = re.findall(r"^error: .*$", text, re.M)
    assert error.startswith(f"error: node1: {reason}")
    assert error.endswith("(--exclude=node1 leaves it out)")
    assert found["exit_code"] == 1
    assert found["exclude"] == ["node1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["train.devices=cpu"],
            2,
            "override train.devices=cpu: train.devices: unknown key; did you mean train.device?",
        ),
        (["train.device=cuda"], 2, "sees no GPU"),
        (["/nowhere.yaml"], 2, "/nowhere.yaml: cannot read the configuration file"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, code, message):
    command = [sys.executable, "-m", "launch.preflight", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
