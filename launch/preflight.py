"""python -m launch.preflight: which node of this job is broken, slow or different? Run as training is, a process a GPU.

Each rank measures in a thread of its own, which may hang in a driver or wait for ever for a dead rank; its main thread
answers rank 0 all the same. After `--seconds` rank 0 asks those that are not done where they are: who does not even
answer is named, else who is behind the others. A process whose measuring thread hangs ends by os._exit.
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.environment import discover, is_first_task
from launch.meeting import another_client
from launch.process import Meeting, meet
from megagpt.config.loading import load_config, load_section
from megagpt.config.schema import RunConfig, Section, TrainConfig
from megagpt.errors import AgreedError, UserError
from tools.command import fail, run_command, single_command

if TYPE_CHECKING:
    from torch.distributed import Store

    from launch.preflight_facts import Report

PROGRAM = "python -m launch.preflight"

_ROOT = Path(__file__).parents[1]
_POLL_SECONDS = 0.25
_FAILURE_SECONDS = 2.0  # after a first failure, for the others to notice theirs
_ANSWER_SECONDS = 3.0
_LOST_SECONDS = 15.0  # beyond the budget: rank 0 itself must be gone


class WithoutFile(Section):
    """What can be said without a configuration file."""

    train: TrainConfig = TrainConfig(run_dir=".", precision="fp32")


def main(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml] [section.key=value]",
            help="Configuration and changes as for training; without a file only train.device and train.run_dir count.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write all results as JSON.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for missing ranks.")] = 300.0,
    seconds: Annotated[
        float, typer.Option(min=2, help="Seconds for all measurements; who is not done then is named.")
    ] = 20.0,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="A speed below this share of the others' median is slow.")
    ] = 0.5,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings, too.")] = False,
) -> None:
    """Find the broken, slow or different node of a job before training does, by name.

    Takes the arguments of launch.train and is started in the same way, one process a GPU:

        srun --ntasks-per-node 8 --gpus-per-node 8 python -m launch.preflight configs/gpt2_1.5b.yaml

        torchrun --nproc-per-node 2 -m launch.preflight train.device=cpu --output runs/preflight.json

    Exit code 0: fine, perhaps with warnings; 1: broken, with one error line that names node and reason and what to give
    sbatch's --exclude; 2: wrong usage.
    """
    start = time.monotonic()
    try:
        place = discover()
        config, train = _configuration(words or [])
    except UserError as error:  # found by all ranks
        sys.exit(fail(str(error), error.exit_code) if is_first_task() else error.exit_code)
    try:
        meeting = meet(place, train, timeout)
    except UserError as error:
        if place.rank == 0 and output:
            _write_refusal(output, error, time.monotonic() - start)
        # Before the ranks have met it is most likely of all of them: once a node is enough.
        speaks = place.rank == 0 if isinstance(error, AgreedError) else place.local_rank == 0
        text = f"[rank {place.rank} on {socket.gethostname()}] {error}" if place.rank else str(error)
        sys.exit(fail(text, error.exit_code) if speaks else error.exit_code)
    measurement = Measurement(meeting, config, train, seconds)
    if meeting.place.rank:
        code = _follow(meeting, measurement, seconds)
    else:
        code = _lead(meeting, measurement, seconds, threshold, strict, output, start)
    measurement.end(code)


def _configuration(words: Sequence[str]) -> tuple[RunConfig | None, TrainConfig]:
    if words and "=" not in words[0]:
        config = load_config(words[0], words[1:])
        return config, config.train
    return None, load_section(WithoutFile, None, words).train


class Measurement:
    """What this rank finds out, in a thread; `report` has at any time what is known so far."""

    def __init__(self, meeting: Meeting, config: RunConfig | None, train: TrainConfig, seconds: float) -> None:
        """Starts at once. seconds: for all."""
        from launch.preflight_facts import Phase, Report

        self._meeting, self._config, self._train, self._seconds = meeting, config, train, seconds
        self._hosts = hosts_of(meeting)
        self._entered = time.monotonic()
        self._marker: Path | None = None
        place = meeting.place
        phase = Phase(order=0, text="the start", alone=True)
        self._report = Report(rank=place.rank, host=self._hosts[place.rank], pid=os.getpid(), phase=phase)
        self.over = threading.Event()
        threading.Thread(target=self._run, name="preflight", daemon=True).start()

    def report(self) -> "Report":
        """A copy of what is known now."""
        phase = self._report.phase.model_copy(update={"seconds": time.monotonic() - self._entered})
        return self._report.model_copy(update={"phase": phase})

    def end(self, code: int) -> None:
        """End the process with `code`."""
        if self._marker:
            self._marker.unlink(missing_ok=True)
        sys.stdout.flush()
        if self.over.is_set() and self._report.state == "done":
            sys.exit(code)
        os._exit(code)  # the thread hangs, or libraries would wait for ranks that are gone

    def _enter(self, order: int, text: str, alone: bool = False) -> None:
        from launch.preflight_facts import Phase

        self._entered = time.monotonic()
        self._report.phase = Phase(order=order, text=text, alone=alone)

    def _run(self) -> None:
        from launch.preflight_facts import one_line

        try:
            self._look_around()
            self._meet_others()
            self._report.state = "done"
        except Exception as error:  # noqa: BLE001 - whatever it is, rank 0 tells it
            self._report.error = one_line(error)
            self._report.state = "failed"
        self.over.set()

    def _look_around(self) -> None:
        """What concerns no other rank, so that a rank that hangs here is known to be the guilty one."""
        from launch import preflight_facts as facts
        from megagpt.config.yaml12 import dump
        from megagpt.scaling.device_check import check_device

        report, device, place = self._report, self._meeting.device, self._meeting.place
        self._enter(0, "reading versions and code", alone=True)
        leader = self._hosts.index(report.host) == place.rank
        code = facts.code_hashes(_ROOT) if leader else {}
        report.software = facts.software(dump(self._config.model_dump()) if self._config else "", code)
        self._enter(1, f"computing on its {device.type.upper().replace('CUDA', 'GPU')}", alone=True)
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)  # of this thread
        report.gpu = facts.gpu_of(device)
        report.device_check = check_device(device, self._seconds * 0.05)
        run_dir, nodes = Path(self._train.run_dir), len(set(self._hosts))
        if leader:
            self._enter(2, f"reading data files and writing {run_dir}", alone=True)
            report.machine = facts.machine(self._config, run_dir, device.type, nodes, self._hosts[0], code)
        if place.rank == 0:
            name = ""
            if self._config and report.machine and not report.machine.disk.error:
                name = f".preflight-shared-{secrets.token_hex(8)}"
                self._marker = facts.existing(run_dir) / name
                self._marker.touch()
            self._meeting.store.set("preflight/marker", name)

    def _meet_others(self) -> None:
        import torch.distributed as dist

        from launch.preflight_facts import existing
        from megagpt.scaling.fabric import Fabric

        report, device, place, store = (
            self._report,
            self._meeting.device,
            self._meeting.place,
            self._meeting.store,
        )
        self._enter(3, "connecting to all ranks")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=timedelta(seconds=self._seconds + 2 * _LOST_SECONDS),  # rank 0 has ended all by then
        )
        fabric = Fabric(device, list(ranks_by_host(self._hosts).values()))
        report.clock = fabric.connect()
        marker = store.get("preflight/marker").decode()
        if marker and report.machine:
            report.sees_run_dir = (existing(Path(self._train.run_dir)) / marker).exists()
        self._enter(4, "an all-reduce of its node")
        report.within_node = fabric.within_node(self._seconds * 0.05)
        for exchange in fabric.between_nodes(self._seconds * 0.2, self._enter_step):
            report.exchanges = [*report.exchanges, exchange]
        self._enter(1_000, "the collectives of all ranks")
        report.collectives = fabric.among_all(self._seconds * 0.1)
        dist.destroy_process_group()

    def _enter_step(self, number: int, partner: int | None) -> None:
        what = "waiting for the first exchanges of others"
        if partner is not None:
            what = f"an exchange with rank {partner} on {self._hosts[partner]}"
        self._enter(5 + number, what)


def hosts_of(meeting: Meeting) -> list[str]:
    """The node of every rank."""
    return [one.host for one in meeting.everybody]


def ranks_by_host(hosts: Sequence[str]) -> dict[str, list[int]]:
    """The ranks of every node."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    return ranks


def _follow(meeting: Meeting, measurement: Measurement, seconds: float) -> int:
    """Ranks other than 0: report when done or asked; the exit code that rank 0 says."""
    from torch.distributed import DistError

    hosts, rank = hosts_of(meeting), meeting.place.rank
    elsewhere = next((other for other, host in enumerate(hosts) if host != hosts[0]), 1)
    lost = f"rank 0 on {hosts[0]} does not answer: its process died or is stopped, or its node is down"

    def give_up() -> None:
        if rank == elsewhere:
            fail(lost, 1)
        os._exit(1)

    timer = threading.Timer(seconds + _LOST_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        store = another_client(meeting.store)  # the thread's may be busy waiting
        while not measurement.over.wait(_POLL_SECONDS) and not store.check(["preflight/ask"]):
            pass
        report = measurement.report()
        store.set(f"preflight/report/{rank}", report.model_dump_json())
        store.add("preflight/failed", int(report.state == "failed"))
        store.add("preflight/reported", 1)
        store.wait(["preflight/code"], timedelta(seconds=seconds + _LOST_SECONDS))
        code = int(store.get("preflight/code"))
        store.add("preflight/left", 1)
    except DistError:
        give_up()
    return code


def _lead(
    meeting: Meeting,
    measurement: Measurement,
    seconds: float,
    threshold: float,
    strict: bool,
    output: Path | None,
    start: float,
) -> int:
    """Rank 0: hear all, judge, tell."""
    from launch.preflight_report import show, write_json
    from launch.preflight_verdict import in_one_line, judge

    store = another_client(meeting.store)  # the thread's may be busy waiting
    hosts = hosts_of(meeting)
    reports = _collect(store, measurement, len(hosts), seconds)
    findings = judge(reports, hosts, threshold)
    if strict:
        findings = [replace(finding, level="error") for finding in findings]
    errors = [finding for finding in findings if finding.level == "error"]
    code, took = int(bool(errors)), time.monotonic() - start
    show(reports, hosts, findings, took)
    sys.stdout.flush()
    if errors:
        fail(in_one_line(errors, hosts), code)
    if output:
        try:
            write_json(output, reports, hosts, findings, code, took)
        except OSError as error:
            code = fail(f"--output: cannot write {output}: {error.strerror}", 1)
    store.set("preflight/code", str(code))
    until = time.monotonic() + _ANSWER_SECONDS
    while store.add("preflight/left", 0) < len(reports) - 1 and time.monotonic() < until:
        time.sleep(0.02)  # its store ends with this process
    return code


def _collect(store: "Store", measurement: Measurement, ranks: int, seconds: float) -> list["Report"]:
    """The reports of all ranks that answer, by rank."""
    from launch.preflight_facts import Report

    def await_all(until: float) -> bool:
        """Whether all have reported in time; a failure shortens it, since most others will fail or wait for ever."""
        while (reported := store.add("preflight/reported", 0)) < ranks - 1 or not measurement.over.is_set():
            failed = store.add("preflight/failed", 0) or measurement.report().state == "failed"
            until = min(until, time.monotonic() + _FAILURE_SECONDS) if failed else until
            if time.monotonic() > until:
                return reported == ranks - 1
            time.sleep(_POLL_SECONDS / 5)
        return True

    if not await_all(time.monotonic() + seconds):
        store.set("preflight/ask", "1")
        await_all(time.monotonic() + _ANSWER_SECONDS)
    present = [rank for rank in range(1, ranks) if store.check([f"preflight/report/{rank}"])]
    texts = [store.get(f"preflight/report/{rank}") for rank in present]
    return [measurement.report(), *(Report.model_validate_json(text) for text in texts)]


def _write_refusal(output: Path, error: UserError, seconds: float) -> None:
    from launch.preflight_report import write_json
    from launch.preflight_verdict import Finding

    with contextlib.suppress(OSError):  # the error itself is printed
        write_json(output, [], [], [Finding("error", (), str(error))], error.exit_code, seconds)


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
