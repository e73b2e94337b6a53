"""The books of a Slurm job: what follows from an exit code, and that a job which gets nowhere is held, not repeated."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from launch.job import HOLD, MAX_RESTARTS, app, decide, read_events, reason_to_hold
from megagpt.config import save_config
from tests.distributed.jobs import tiny_config


def starts(*steps: int) -> list[dict[str, object]]:
    """The notes of a job that started at these steps."""
    found: list[dict[str, object]] = []
    for step in steps:
        found += [{"event": "start", "step": step}, {"event": "end", "decision": "requeue"}]
    return found[:-1]


@pytest.mark.parametrize(
    ("code", "decision", "word"),
    [
        (0, "done", "finished"),
        (85, "requeue", "stop"),
        (128 + 10, "requeue", "stop"),  # SIGUSR1 before the process could listen
        (128 + 15, "requeue", "stop"),
        (84, "requeue", "node"),
        (86, "stop", "hang"),
        (128 + 9, "stop", "SIGKILL"),
        (1, "stop", "exit code 1"),
        (2, "stop", "exit code 2"),
    ],
)
def test_exit_codes_decide(code, decision, word):
    found, reason = decide(code, starts(0), step=10)
    assert found == decision
    assert word in reason


def test_three_restarts_without_a_newer_checkpoint_are_the_last():
    assert decide(85, starts(0, 0, 0), step=0)[0] == "requeue"
    decision, reason = decide(85, starts(0, 0, 0, 0), step=0)
    assert decision == "hold"
    assert "3 restarts without progress: the newest checkpoint is still that of step 0" in reason


def test_progress_at_the_very_end_counts():
    assert decide(85, starts(40, 40, 40, 40), step=41)[0] == "requeue"


def test_a_released_job_has_all_its_tries_again():
    held = [*starts(7, 7, 7, 7), {"event": "end", "decision": "hold"}]
    assert not reason_to_hold([*held, *starts(7, 7, 7)], 7)
    assert reason_to_hold([*held, *starts(7, 7, 7, 7)], 7)


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 4))
def test_a_job_is_held_exactly_after_more_than_three_starts_at_its_last_step(advances, last):
    steps = [sum(advances[:index]) for index in range(len(advances) + 1)]
    now = steps[-1] + last
    alike = 0
    for step in reversed(steps):
        if step != now:
            break
        alike += 1
    assert bool(reason_to_hold(starts(*steps), now)) == (alike > MAX_RESTARTS)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Calls launch.job as the batch script of job 12 does; returns exit code and stdout."""
    save_config(tiny_config(tmp_path, tmp_path / "run"), tmp_path / "config.yaml")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")

    def call(command: str, *arguments: object, restart: int = 0) -> tuple[int, str]:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        result = CliRunner().invoke(app, [command, str(tmp_path / "config.yaml"), *map(str, arguments)])
        code = getattr(result.exception, "exit_code", result.exit_code)
        call.stderr = result.stderr
        return code, result.stdout

    return call


def test_a_job_that_never_gets_anywhere_is_held_and_one_that_does_goes_on(job, tmp_path):
    logs = tmp_path / "run/logs/12"
    for restart in range(MAX_RESTARTS):
        assert job("begin", restart=restart) == (0, f"{logs} 1\n")
        assert job("end", 85, restart=restart)[1] == "requeue\n"
    assert job("begin", restart=3)[0] == 0
    assert job("end", 85, restart=3)[1].splitlines()[-1] == "hold"
    assert job("begin", restart=4)[0] == 0  # released
    checkpoint = tmp_path / "run/checkpoints/step_00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    assert job("end", 85, restart=4)[1] == "requeue\n"
    assert job("begin", restart=5)[0] == 0
    events = read_events(logs)
    assert [event["step"] for event in events if event["event"] == "start"] == [0, 0, 0, 0, 0, 5]
    assert {event["nodes"] for event in events if event["event"] == "start"} == {"node[1-2]"}


def test_restarts_by_slurm_alone_are_counted_too(job):
    for restart in range(MAX_RESTARTS + 1):  # a node fails each time: the script comes to no end
        assert job("begin", restart=restart)[0] == 0
    assert job("begin", restart=MAX_RESTARTS + 1)[0] == HOLD


@pytest.mark.parametrize(
    ("batch", "nodes", "tasks", "used"), [(32, 4, 1, 4), (32, 3, 1, 2), (256, 5, 8, 4), (256, 7, 8, 4), (12, 3, 2, 3)]
)
def test_nodes_over_which_the_batch_cannot_be_cut_stay_idle(job, monkeypatch, batch, nodes, tasks, used):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(nodes))
    _, output = job("begin", "--tasks", tasks, f"train.global_batch_size={batch}")
    assert output.splitlines()[-1].split()[-1] == str(used)
    idle = f"{nodes - used} of {nodes} nodes stay idle: a batch of {batch} sequences"
    assert (idle in job.stderr) == (used < nodes)


def test_a_batch_that_no_number_of_nodes_can_cut_is_told_for_all_of_them(job, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert job("begin", "--tasks", 3, "train.global_batch_size=32")[0] == 2


def test_a_typo_ends_the_job_before_anything_is_noted(job, tmp_path):
    code, _ = job("begin", "train.stepz=3")
    assert code == 2
    assert not (tmp_path / "run").exists()


def test_a_line_that_a_power_cut_left_unfinished_is_passed_over(job, tmp_path):
    job("begin")
    file = tmp_path / "run/logs/12/restarts.jsonl"
    whole = file.read_text()
    file.write_text(whole + json.dumps({"event": "start"})[:9])
    assert read_events(file.parent) == [json.loads(whole)]
