"""Of invented clusters exactly the node that is slow, broken, different or silent is named."""

import json
import math
import random
import re
import statistics
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import preflight_facts as facts
from launch.preflight_facts import Disk, Gpu, GpuProcess, GpuState, Machine, Phase, Report
from launch.preflight_report import show, write_json
from launch.preflight_verdict import blamed, in_one_line, judge, medians_of_others, pair_rates, slow_network
from megagpt.config.schema import RunConfig
from megagpt.scaling.device_check import DeviceCheck
from megagpt.scaling.fabric import Collective, Exchange, tournament

THRESHOLD = 0.5
SOFTWARE = {"Python": "3.11.7", "torch": "2.13.0", "CUDA": "12.8", "NCCL": "2.27.5", "deepspeed": "0.19.8", "code": "a"}


class Cluster:
    """Reports of a healthy job, for a test to spoil; noise: relative, of every speed."""

    def __init__(self, nodes: int, ranks_per_node: int = 1, noise: float = 0.1, seed: int = 0) -> None:
        self.random, self.noise = random.Random(seed), noise
        self.nodes, self.per_node = nodes, ranks_per_node
        self.hosts = [f"node{node}" for node in range(nodes) for _ in range(ranks_per_node)]
        self.speed = dict.fromkeys(self.hosts, 1.0)
        self.links: dict[tuple[str, str], float] = {}

    def reports(self) -> list[Report]:
        """What the ranks say."""
        found = [self._report(rank) for rank in range(len(self.hosts))]
        for pairs in tournament(self.nodes):
            for pair in pairs:
                for place in range(self.per_node):
                    first, second = (found[node * self.per_node + place] for node in pair)
                    link = self.links.get((first.host, second.host), 1.0)
                    rate = 50e9 * self._noisy(min(self.speed[first.host], self.speed[second.host]) * link)
                    for one, other in ((first, second), (second, first)):
                        exchange = Exchange(other.rank, 1 << 28, rate, 20e-6 * self._noisy(1.0), intact=True)
                        one.exchanges = [*one.exchanges, exchange]
        return found

    def _report(self, rank: int) -> Report:
        host = self.hosts[rank]
        leader = rank % self.per_node == 0
        return Report(
            rank=rank,
            host=host,
            pid=1000 + rank,
            state="done",
            phase=Phase(order=1_000, text="the collectives of all ranks", alone=False),
            software=dict(SOFTWARE),
            gpu=Gpu(name="H100", uuid=f"gpu{rank}", total_bytes=80 << 30, free_bytes=79 << 30),
            machine=self._machine(rank) if leader else None,
            device_check=DeviceCheck(self._noisy(700e12), self._noisy(3e12), self._noisy(50e9), exact=True),
            clock=1e9 + self._noisy(0.01),
            sees_run_dir=True if leader else None,
            within_node=self._collective("all-reduce", self.per_node) if self.per_node > 1 else None,
            collectives=[self._collective(name, len(self.hosts)) for name in ("all-reduce", "all-gather", "broadcast")],
        )

    def _machine(self, rank: int) -> Machine:
        states = [
            GpuState(uuid=f"gpu{rank + place}", driver="570.1", uncorrected_errors=0, slowed_down=False)
            for place in range(self.per_node)
        ]
        return Machine(
            code={"megagpt/model/gpt.py": "1"},
            memory_bytes=1 << 40,
            shared_memory_bytes=1 << 38,
            open_files=1 << 20,
            locked_memory_bytes=0,
            infiniband=True,
            resolves_rank_0=True,
            interface="eth0",
            gpus=states,
            gpu_processes=[],
            disk=Disk(folder="/scratch/run", free_bytes=1 << 44, write_bytes_per_second=self._noisy(1e9)),
            data={"data/train.bin": 12_345, "data/train.idx": 678},
        )

    def _collective(self, operation: str, ranks: int) -> Collective:
        return Collective(operation, max(ranks, 2), 1 << 28, self._noisy(0.01), 30e-6, intact=True)

    def _noisy(self, value: float) -> float:
        return value * self.random.uniform(1 - self.noise, 1 + self.noise)


def named(cluster: Cluster, reports: list[Report] | None = None) -> tuple[list[str], list[str]]:
    """The nodes that are blamed, and all findings as text."""
    findings = judge(reports if reports is not None else cluster.reports(), cluster.hosts, THRESHOLD)
    return blamed(findings), [f"{finding.level} {finding}" for finding in findings]


SHAPES = [(1, 8), (2, 1), (2, 8), (3, 1), (4, 2), (17, 1), (18, 1), (64, 8), (1000, 1)]


@pytest.mark.parametrize(("nodes", "ranks"), SHAPES)
def test_of_equal_nodes_none_is_named(nodes, ranks):
    assert named(Cluster(nodes, ranks)) == ([], [])


@settings(max_examples=60, deadline=None)
@given(nodes=st.integers(3, 70), seed=st.integers(0, 2**32), noise=st.floats(0, 0.2), data=st.data())
def test_exactly_the_node_with_the_slow_network_is_named(nodes, seed, noise, data):
    cluster = Cluster(nodes, noise=noise, seed=seed)
    slow = f"node{data.draw(st.integers(0, nodes - 1))}"
    cluster.speed[slow] = 0.3
    findings = list(slow_network(pair_rates(cluster.reports(), cluster.hosts), THRESHOLD))
    assert [finding.nodes for finding in findings] == [(slow,)]
    assert "its network is slow" in findings[0].text


def test_the_slow_one_of_a_thousand_nodes_is_named_with_its_number_and_the_others():
    cluster = Cluster(1000)
    cluster.speed["node617"] = 0.3
    nodes, texts = named(cluster)
    assert nodes == ["node617"]
    value, median = re.search(r"slow: (\S+) GB/s where the others' median is (\S+) GB/s", texts[0]).groups()
    assert float(value) == pytest.approx(15, rel=0.15)
    assert float(median) == pytest.approx(50, rel=0.15)


def test_several_slow_nodes_are_all_named():
    cluster = Cluster(9)
    cluster.speed |= {"node1": 0.3, "node4": 0.2, "node8": 0.3}
    assert sorted(named(cluster)[0]) == ["node1", "node4", "node8"]


@settings(max_examples=40, deadline=None)
@given(nodes=st.integers(3, 17), seed=st.integers(0, 2**32), data=st.data())
def test_a_bad_link_is_told_as_a_pair_and_no_node_is_blamed(nodes, seed, data):
    cluster = Cluster(nodes, seed=seed)
    first = data.draw(st.integers(0, nodes - 2))
    second = data.draw(st.integers(first + 1, nodes - 1))
    cluster.links[f"node{first}", f"node{second}"] = 0.1
    blamed_nodes, texts = named(cluster)
    assert blamed_nodes == []
    (text,) = texts
    assert {f"node{first}", f"node{second}"} == set(re.search(r"link between (\S+) and (\S+) is slow", text).groups())


def test_with_two_nodes_a_slow_pairing_blames_neither_but_a_slow_device_does():
    cluster = Cluster(2, 2)
    cluster.speed["node1"] = 0.3
    assert named(cluster) == ([], [])
    reports = cluster.reports()
    for report in reports[2:]:
        report.device_check = DeviceCheck(200e12, 3e12, 50e9, exact=True)
    nodes, texts = named(cluster, reports)
    assert nodes == ["node1"]
    assert "matrix product is slow: 200 TFLOP/s where the others' median is" in texts[0]
    assert "1 more of its ranks" in texts[0]


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(0, 1e6), min_size=2, max_size=9))
def test_medians_of_others_are_those_of_the_statistics_module(values):
    expected = [statistics.median(values[:index] + values[index + 1 :]) for index in range(len(values))]
    assert medians_of_others(values) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["Python", "torch", "CUDA", "NCCL", "deepspeed"])
def test_the_node_with_another_version_is_named_with_both(name):
    cluster = Cluster(8, 2)
    reports = cluster.reports()
    for report in reports[6:8]:
        report.software[name] = "0.1"
    nodes, texts = named(cluster, reports)
    assert nodes == ["node3"]
    assert texts == [f"error node3: {name} 0.1 where the other 7 nodes have {SOFTWARE[name]}"]


def test_of_two_nodes_the_one_that_differs_from_rank_0_is_named():
    cluster = Cluster(2)
    reports = cluster.reports()
    reports[1].software["torch"] = "2.9.0"
    assert named(cluster, reports)[1] == ["error node1: torch 2.9.0 where node0 has 2.13.0"]


def test_a_stale_copy_of_the_code_is_named_with_its_files():
    cluster = Cluster(4)
    reports = cluster.reports()
    reports[2].software["code"] = "b"
    reports[2].machine.code["megagpt/model/gpt.py"] = "2"
    nodes, (text,) = named(cluster, reports)
    assert nodes == ["node2"]
    assert "another copy of the code: megagpt/model/gpt.py" in text


def test_missing_and_different_data_files_are_told_by_node_or_for_all():
    cluster = Cluster(4)
    reports = cluster.reports()
    reports[1].machine.data["data/train.bin"] = "no such file or directory"
    reports[3].machine.data["data/train.idx"] = 600
    assert named(cluster, reports)[1] == [
        "error node1: data/train.bin: no such file or directory",
        "error node3: data/train.idx: 600 bytes where the other 3 nodes have 678",
    ]
    for report in reports:
        report.machine.data = dict.fromkeys(report.machine.data, "permission denied")
    assert named(cluster, reports) == ([], ["error data/train.bin: permission denied (and 1 more files)"])


def spoil_device(report: Report) -> str:
    report.device_check = DeviceCheck(700e12, 3e12, 50e9, exact=False)
    return "error node1: rank 2's matrix product is wrong (gpu2)"


def spoil_driver(report: Report) -> str:
    report.machine.nvidia_smi_error = "nvidia-smi does not answer within 10 s"
    return "error node1: nvidia-smi does not answer within 10 s"


def spoil_ecc(report: Report) -> str:
    report.machine.gpus[0].uncorrected_errors = 3
    return "warning node1: GPU gpu2 had 3 uncorrected memory errors"


def spoil_memory(report: Report) -> str:
    report.gpu.free_bytes = 40 << 30
    report.machine.gpu_processes = [
        GpuProcess(uuid="gpu2", pid=report.pid, bytes=1),
        GpuProcess(uuid="gpu2", pid=7, bytes=1),
    ]
    return "error node1: 40.0 of 80.0 GiB of rank 2's GPU are in use by process 7 before the start"


def spoil_disk(report: Report) -> str:
    report.machine.disk.error = "Permission denied"
    return "error node1: cannot write train.run_dir in /scratch/run: Permission denied"


def spoil_space(report: Report) -> str:
    report.machine.disk.free_bytes = 3 << 30
    return "warning node1: 3.0 GiB free for train.run_dir"


def spoil_writing(report: Report) -> str:
    report.machine.disk.write_bytes_per_second = 50e6
    return "warning node1: writing to /scratch/run is slow: 50 MB/s"


def spoil_sharing(report: Report) -> str:
    report.sees_run_dir = False
    return "error node1: what node0 writes into train.run_dir is not there"


def spoil_clock(report: Report) -> str:
    report.clock += 35
    return "warning node1: its clock is 35 s ahead of the others"


def spoil_limits(report: Report) -> str:
    report.machine.open_files = 64
    return "warning node1: at most 64 open files"


def spoil_locked_memory(report: Report) -> str:
    report.machine.locked_memory_bytes = 64 << 10
    return "warning node1: at most 64 KiB of locked memory"


def spoil_shared_memory(report: Report) -> str:
    report.machine.shared_memory_bytes = 64 << 20
    return "warning node1: 64 MiB free in /dev/shm"


def spoil_nvlink(report: Report) -> str:
    report.within_node = Collective("all-reduce", 2, 1 << 28, 0.1, 30e-6, intact=True)
    return "warning node1: all-reduce of its 2 ranks is slow"


def spoil_latency(report: Report) -> str:
    report.exchanges = [Exchange(one.partner, one.bytes, one.bytes_per_second, 1e-3, True) for one in report.exchanges]
    return "warning node1: its network answers late: 1e+03 µs where the others' median is"


def spoil_messages(report: Report) -> str:
    report.exchanges = [Exchange(one.partner, one.bytes, one.bytes_per_second, 2e-5, False) for one in report.exchanges]
    return "error node1: messages to or from it arrive changed"


@pytest.mark.parametrize("spoil", [value for name, value in list(globals().items()) if name.startswith("spoil_")])
def test_one_trouble_of_one_node_is_told_once_and_names_that_node_alone(spoil):
    cluster = Cluster(5, 2)
    reports = cluster.reports()
    expected = spoil(reports[2])
    nodes, texts = named(cluster, reports)
    assert nodes == ["node1"]
    (text,) = texts
    assert text.startswith(expected)


def halt(report: Report, order: int, text: str, alone: bool = False) -> None:
    report.state, report.phase = "unfinished", Phase(order=order, text=text, alone=alone, seconds=12.0)


def test_the_node_that_does_not_answer_is_named_and_not_those_that_wait_for_it():
    cluster = Cluster(4, 2)
    reports = cluster.reports()
    for report in reports:
        halt(report, 6, "an exchange")
    assert named(cluster, [report for report in reports if report.host != "node2"])[0] == ["node2"]
    nodes, texts = named(cluster, [report for report in reports if report.rank != 5])
    assert nodes == ["node2"]
    assert "rank 5 does not answer" in texts[0]


def test_who_hangs_in_work_of_its_own_is_named_and_not_those_that_wait_for_it():
    cluster = Cluster(4)
    reports = cluster.reports()
    for report in reports:
        halt(report, 3, "connecting to all ranks")
    halt(reports[3], 1, "computing on its GPU", alone=True)
    assert named(cluster, reports) == (["node3"], ["error node3: rank 3 has been in computing on its GPU for 12 s"])


def test_two_nodes_that_do_not_get_past_their_exchange_are_both_named():
    cluster = Cluster(6)
    reports = cluster.reports()
    for report in reports:
        halt(report, 9, "an exchange with others")
    halt(reports[1], 7, "an exchange with rank 4 on node4")
    halt(reports[4], 7, "an exchange with rank 1 on node1")
    assert named(cluster, reports)[0] == ["node1", "node4"]


def test_if_all_wait_in_the_same_place_no_node_is_blamed():
    cluster = Cluster(3)
    reports = cluster.reports()
    for report in reports:
        halt(report, 3, "connecting to all ranks")
    assert named(cluster, reports) == (
        [],
        ["error none of the ranks gets on: rank 0 has been in connecting to all ranks for 12 s"],
    )


def test_the_error_line_excludes_all_blamed_nodes_once():
    cluster = Cluster(6)
    reports = cluster.reports()
    for rank in (1, 4):
        reports[rank].software["torch"] = "2.9.0"
    reports[4].software["Python"] = "3.10.0"
    line = in_one_line(judge(reports, cluster.hosts, THRESHOLD), cluster.hosts)
    assert "\n" not in line
    assert line.endswith("(--exclude=node1,node4 leaves them out)")


def test_the_same_trouble_of_many_nodes_is_told_once():
    cluster = Cluster(12)
    reports = cluster.reports()
    for report in reports[2:8]:
        report.machine.disk.error = "Permission denied"
    (finding,) = judge(reports, cluster.hosts, THRESHOLD)
    text = "node2, node3, node4, node5 and 2 more: cannot write train.run_dir in /scratch/run: Permission denied"
    assert in_one_line([finding], cluster.hosts) == f"{text} (--exclude=node[2-7] leaves them out)"
    assert in_one_line([finding], finding.nodes) == text  # of all nodes none can be left out


def test_a_table_of_many_nodes_shows_the_conspicuous_ones_and_the_range(capsys, tmp_path):
    cluster = Cluster(1000, 4)
    cluster.speed["node617"] = 0.3
    reports = cluster.reports()
    start = time.monotonic()
    findings = judge(reports, cluster.hosts, THRESHOLD)
    show(reports, cluster.hosts, findings, 12.0)
    write_json(tmp_path / "out.json", reports, cluster.hosts, findings, 0, 12.0)
    assert time.monotonic() - start < 20  # of the half minute that the whole may take; other processes may slow it
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 20
    assert [line.split()[0] for line in lines if re.match(r"node\d|minimum|median|maximum", line)] == [
        "node617",
        "minimum",
        "median",
        "maximum",
    ]
    document = json.loads((tmp_path / "out.json").read_text())
    assert (document["exit_code"], len(document["ranks"]), len(document["nodes"])) == (0, 4000, 1000)
    assert len(document["pairs"]) == 16 * 500


def test_code_hashes_change_with_any_file_and_with_nothing_else(tmp_path):
    for folder in ("megagpt/model", "launch", "tools", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "megagpt/model/gpt.py").write_text("a = 1\n")
    (tmp_path / "tests/test_it.py").write_text("b = 1\n")
    before = facts.code_hashes(tmp_path)
    (tmp_path / "tests/test_it.py").write_text("b = 2\n")
    assert facts.code_hashes(tmp_path) == before
    (tmp_path / "megagpt/model/gpt.py").write_text("a = 2\n")
    after = facts.code_hashes(tmp_path)
    assert facts.software("", after)["code"] != facts.software("", before)["code"]
    assert list(after) == ["megagpt/model/gpt.py"]


def test_the_disk_is_measured_above_a_folder_that_does_not_exist_and_nothing_is_left(tmp_path):
    found = facts.disk(tmp_path / "runs/new", 1 << 20)
    assert (found.folder, found.error) == (str(tmp_path), "")
    assert found.write_bytes_per_second is not None
    assert math.isfinite(found.write_bytes_per_second)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told():
    assert facts.disk(Path("/proc/run"), 1 << 16).error != ""


def test_data_files_have_their_size_or_the_reason(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"12345")
    config = RunConfig.model_validate({"data": {"train": [{"path": str(tmp_path / "train")}]}})
    assert facts.data_files(config) == {
        str(tmp_path / "train.bin"): 5,
        str(tmp_path / "train.idx"): "no such file or directory",
    }


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_nvidia_smi_is_read_as_far_as_it_tells(tmp_path, monkeypatch):
    script = """case "$1" in
--query-gpu=*) echo "GPU-11-22, 570.1, 0, Not Active"; echo "GPU-33-44, 570.1, [N/A], Active";;
--query-compute-apps=*) echo "GPU-11-22, 4242, 1024"; echo "GPU-33-44, 4343, [N/A]";;
esac"""
    nvidia_smi(tmp_path, monkeypatch, script)
    assert facts.gpu_states() == (
        [
            GpuState(uuid="11-22", driver="570.1", uncorrected_errors=0, slowed_down=False),
            GpuState(uuid="33-44", driver="570.1", uncorrected_errors=None, slowed_down=True),
        ],
        "",
    )
    assert facts.gpu_processes() == [GpuProcess(uuid="11-22", pid=4242, bytes=1 << 30)]


def test_what_nvidia_smi_complains_of_is_kept(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, "echo 'Unable to determine the device handle for GPU0000:41:00.0'; exit 15")
    assert facts.gpu_states() == (
        [],
        "nvidia-smi fails: Unable to determine the device handle for GPU0000:41:00.0",
    )
    monkeypatch.setattr(facts, "_NVIDIA_SMI_SECONDS", 0.2)
    nvidia_smi(tmp_path, monkeypatch, "exec sleep 5")
    assert facts.gpu_states() == ([], "nvidia-smi does not answer within 0 s")
