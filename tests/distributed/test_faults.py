"""Signals, kills, hangs and full disks, sent to real processes of the launch command."""

import random
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from launch import supervisor
from megagpt.config import save_config
from megagpt.training import saving
from megagpt.training.checkpoint import complete_checkpoints, newest_checkpoint, verify_checksums
from megagpt.training.run import train
from megagpt.training.supervision import HANG, LOST, REQUEUE, Supervisor
from tests.distributed.jobs import losses, tiny_config, train_and_report
from tests.distributed.launched import Job, manifest, records, start

pytestmark = pytest.mark.slow

STEPS = 100


@pytest.fixture(scope="module")
def config_file(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "config.yaml"
    config = tiny_config(
        corpus,
        path.parent / "run",
        model={"dropout": 0.1},
        train={"steps": STEPS, "micro_batch_size": 2},
        parallel={"zero_stage": 2},
        checkpoint={"every": 10},
        evaluation={"every": 20},
    )
    save_config(config, path)
    return path


@pytest.fixture(scope="module")
def whole(config_file, tmp_path_factory) -> list[tuple]:
    """What an undisturbed run logs."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    job = start(config_file, run_dir)
    assert job.wait() == [0, 0], job.output()
    return exact(run_dir)


def exact(run_dir: Path) -> list[tuple]:
    """What a disturbance must not change by a bit: each step's numbers, each evaluation's."""
    keys = ("step", "loss", "lr", "grad_norm", "tokens", "targets")
    return [
        (record["kind"], *(record.get(key) for key in keys))
        for record in records(run_dir)
        if record["kind"] in ("train", "validation")
    ]


def steps_done(run_dir: Path) -> int:
    return max((record["step"] for record in records(run_dir, "train")), default=0)


def catches_signals(pid: int) -> bool:
    """Whether a process has come so far that it handles SIGTERM and SIGUSR1."""
    caught = int(Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0], 16)
    return all(caught >> number - 1 & 1 for number in (signal.SIGTERM, signal.SIGUSR1))


def finish(config_file: Path, run_dir: Path, *overrides: str) -> None:
    job = start(config_file, run_dir, *overrides)
    assert job.wait() == [0, 0], job.output()


def test_signals_at_any_moment_stop_all_ranks_with_a_checkpoint_and_nothing_is_lost(config_file, whole, tmp_path):
    run_dir, moments = tmp_path / "run", random.Random(1)
    for number, ranks in (
        (signal.SIGTERM, [0, 1]),
        (signal.SIGUSR1, [1]),
        (signal.SIGUSR1, [0]),
        (signal.SIGTERM, [1]),
    ):
        before = steps_done(run_dir)
        job = start(config_file, run_dir)
        if before:  # at first before the first step
            job.wait_until(lambda before=before: steps_done(run_dir) > before)
            time.sleep(moments.uniform(0, 0.3))
        else:
            job.wait_until(lambda job=job: all(catches_signals(process.pid) for process in job.ranks))
            time.sleep(moments.uniform(0, 0.2))
        job.send(number, ranks)
        assert job.wait() == [REQUEUE, REQUEUE], job.output()
        newest = newest_checkpoint(run_dir / "checkpoints")
        if newest:  # a signal before the first step has nothing to save
            assert manifest(newest)["step"] == steps_done(run_dir) > 0
            assert records(run_dir, "stop")[-1]["reason"] == signal.Signals(number).name
    finish(config_file, run_dir)
    assert exact(run_dir) == whole


def test_an_evaluation_that_a_signal_cuts_off_is_made_when_the_run_goes_on(config_file, tmp_path):
    run_dir, settings = tmp_path / "run", ["evaluation.every=3", "train.steps=6", "train.micro_batch_size=1"]
    settings.append("schedule.name=constant")
    job = start(config_file, run_dir, *settings)
    job.wait_until(lambda: steps_done(run_dir) == 3)  # logged before the evaluation begins
    job.send(signal.SIGTERM)
    assert job.wait() == [REQUEUE, REQUEUE], job.output()
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None
    assert manifest(checkpoint)["evaluation_due"] is (not records(run_dir, "validation"))
    finish(config_file, run_dir, *settings)
    assert [record["step"] for record in records(run_dir, "validation")] == [3, 6]


class SignalledWhileSaving(Supervisor):
    """Asks to stop once the first checkpoint is being saved, on rank 1."""

    def __init__(self) -> None:
        self._saving = False

    def beat(self, phase: str, patient: bool = False) -> None:
        self._saving = self._saving or phase.endswith(": checkpoint")

    def stop_requested(self) -> int:
        return signal.SIGUSR1 if self._saving and dist.get_rank() == 1 else 0


def train_signalled_while_saving(config) -> str:
    return train(config, torch.device("cpu"), Console(quiet=True), SignalledWhileSaving())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_in_which_a_signal_comes_is_the_checkpoint_of_the_stop(asynchronous, two_ranks, corpus, tmp_path):
    config = tiny_config(corpus, tmp_path / "run", checkpoint={"every": 6, "asynchronous": asynchronous})
    assert two_ranks.run(train_signalled_while_saving, config) == ["stopped", "stopped"]
    assert [path.name for path in complete_checkpoints(tmp_path / "run/checkpoints")] == ["step_00000006"]
    assert steps_done(tmp_path / "run") == 6


def test_a_second_signal_ends_the_process_at_once(config_file, tmp_path):
    run_dir = tmp_path / "run"
    job = start(config_file, run_dir)
    job.wait_until(lambda: len(complete_checkpoints(run_dir / "checkpoints")) > 0)
    job.send(signal.SIGSTOP, [1])  # so that no step can end
    job.send(signal.SIGTERM, [0])
    time.sleep(1.2)  # what comes sooner counts as the same signal
    job.send(signal.SIGUSR1, [0])
    began = time.monotonic()
    job.ranks[0].join(10)
    assert job.ranks[0].exitcode == REQUEUE, job.output()
    assert time.monotonic() - began < 5
    assert "second signal SIGUSR1" in job.output()
    job.kill()
    finish(config_file, run_dir)


def with_little_patience() -> None:
    """In a rank: what never notices that another rank is gone is left after a second instead of ten."""
    supervisor._GRACE_SECONDS = 1.0


def test_random_kills_of_one_rank_end_the_others_and_lose_nothing(config_file, whole, tmp_path, number_of_kills):
    run_dir, moments = tmp_path / "run", random.Random(2)
    kills = 0
    settings = ["checkpoint.every=2"]  # so that many a kill meets a save
    while kills < number_of_kills:
        before = steps_done(run_dir)
        job = start(config_file, run_dir, *settings, prepare=with_little_patience)
        job.wait_until(lambda before=before, job=job: steps_done(run_dir) != before or not job.running)
        time.sleep(moments.uniform(0, 0.15))
        victim = moments.randrange(2)
        if steps_done(run_dir) >= STEPS - 4:
            break
        job.send(signal.SIGKILL, [victim])
        began = time.monotonic()
        codes = job.wait(60)
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == LOST, job.output(1 - victim)
        assert time.monotonic() - began < 30
        assert f"rank {victim} on" in job.output(1 - victim)
        assert "was lost" in job.output(1 - victim)
        assert "Traceback" not in job.output(1 - victim)
        for checkpoint in complete_checkpoints(run_dir / "checkpoints"):
            verify_checksums(checkpoint)
        kills += 1
    job.kill()
    finish(config_file, run_dir, *settings)
    assert exact(run_dir) == whole
    assert kills == number_of_kills


def test_a_rank_that_hangs_makes_all_write_their_stacks_and_exit(config_file, tmp_path):
    run_dir = tmp_path / "run"
    job = start(config_file, run_dir, "faults.step_timeout=5")
    job.wait_until(lambda: steps_done(run_dir) > 2)
    job.send(signal.SIGSTOP, [1])
    job.ranks[0].join(20)
    job.send(signal.SIGCONT, [1])
    assert job.wait(20) == [HANG, HANG], job.output()
    for rank in (0, 1):
        text = (run_dir / f"logs/hang_rank_{rank}.txt").read_text()
        assert "collectives begun" in text
        assert "phase: step" in text
        assert "trainer.py" in text or rank == 1  # the main thread's stack, unless its collective failed before
        # Rank 1, once it goes on, may notice by itself or hear of it.
        assert re.search("rank 0 on .* made no progress" if rank == 0 else "made no progress", job.output(rank))
    finish(config_file, run_dir)


def limited(size: int) -> None:
    """No file of this process may grow beyond `size` bytes: what a full disk looks like to a program."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def train_on_a_small_disk(config, size: int) -> list[dict]:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    limited(size)
    try:
        return train_and_report(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited[1], unlimited[1]))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_the_disk_refuses_is_logged_and_training_goes_on_if_that_is_wanted(
    asynchronous, two_ranks, corpus, tmp_path
):
    def config(run_dir: Path, steps: int, **checkpoint: object):
        return tiny_config(
            corpus,
            run_dir,
            schedule={"name": "constant", "warmup_steps": 2},
            train={"steps": steps},
            checkpoint={"every": 4, "asynchronous": asynchronous, **checkpoint},
        )

    reference = losses(two_ranks.run(train_and_report, config(tmp_path / "whole", 12))[0])
    two_ranks.run(train_and_report, config(tmp_path / "run", 4))
    going_on = config(tmp_path / "run", 12, on_error="continue")
    with pytest.raises(AssertionError, match=r"cannot write a checkpoint into .*run/checkpoints: .*GB free there"):
        two_ranks.run(train_on_a_small_disk, going_on, 100_000)  # the last save is never optional
    assert losses(records(tmp_path / "run")) == reference
    failures = [r for r in records(tmp_path / "run", "event") if r["event"] == "checkpoint_failed"]
    assert failures[0]["step"] in (8, 9, 10)
    folder = tmp_path / "run/checkpoints"
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000004"]
    verify_checksums(folder / "step_00000004")
    assert losses(two_ranks.run(train_and_report, going_on)[0]) == reference


def test_a_save_that_the_disk_refuses_stops_the_run_by_default(two_ranks, corpus, tmp_path):
    config = tiny_config(corpus, tmp_path / "run", checkpoint={"every": 4})
    with pytest.raises(AssertionError, match="AgreedError: cannot write a checkpoint into"):
        two_ranks.run(train_on_a_small_disk, config, 100_000)
    assert max(r["step"] for r in records(tmp_path / "run", "train")) < 20


def train_with_little_memory(config) -> list[dict]:
    """As train_and_report, but rank 1 finds no memory to write its second checkpoint."""
    write, calls = saving.write_file, []

    def failing(content, path, count):
        calls.append(path)
        if dist.get_rank() == 1 and "step_00000008" in str(path):
            raise MemoryError
        return write(content, path, count)

    saving.write_file = failing
    try:
        return train_and_report(config)
    finally:
        saving.write_file = write


def test_a_writer_that_dies_of_anything_leaves_no_incomplete_checkpoint(two_ranks, corpus, tmp_path):
    config = tiny_config(corpus, tmp_path / "run", checkpoint={"every": 4, "keep": 9, "on_error": "continue"})
    found = two_ranks.run(train_with_little_memory, config)[0]
    assert [r["step"] for r in found if r["kind"] == "checkpoint"] == [4, 12, 16, 20]
    (event,) = [r for r in found if r["kind"] == "event"]
    assert "MemoryError" in event["message"]
    for checkpoint in complete_checkpoints(tmp_path / "run/checkpoints"):
        verify_checksums(checkpoint)
        assert len(list((checkpoint / "random").iterdir())) == 2


def test_a_job_is_what_the_command_is(config_file, tmp_path):
    """The forks of launched.py end like the processes they stand for: a wrong key is one line and exit code 2."""
    job = Job(config_file, ["train.stepz=3"], 1, tmp_path / "out")
    assert job.wait() == [2]
    assert job.output().startswith("error: ")
    assert "train.steps" in job.output()
