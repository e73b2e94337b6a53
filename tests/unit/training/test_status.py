"""How a run stands follows from its folder and Slurm's answer: each state, what is left, what would be lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.errors import UsageError
from megagpt.training.lock import read_lock
from megagpt.training.status import SlurmAnswer, SlurmJob, check_is_run, judge, read_sources
from tests.unit.training.simulated import (
    BEGIN,
    EVALUATE_EVERY,
    EVALUATION_SECONDS,
    EVERY,
    STEPS,
    TOKENS_A_STEP,
    SimulatedRun,
)

ROOT = Path(__file__).parents[3]
PENDING = SlurmAnswer(SlurmJob("123", "PENDING", "Priority"))
RUNNING = SlurmAnswer(SlurmJob("123", "RUNNING", node_count=1, nodes="node1"))
GONE, NO_SQUEUE = SlurmAnswer(), SlurmAnswer(problem="squeue is not installed here")


@pytest.fixture
def run(tmp_path):
    return SimulatedRun(tmp_path / "run")


def status_of(run, answer=None, at=None):
    return judge(read_sources(run.folder, "run"), answer, run.now if at is None else at)


def running_job(start):
    return SlurmAnswer(SlurmJob("123", "RUNNING", node_count=1, nodes="node1", start=start))


# ---- states


def test_a_run_by_hand_is_starting_running_stale_in_turn_and_then_as_its_stop_says(run):
    run.start()
    run.write()
    assert [status_of(run, at=run.now + wait).state for wait in (1, 500, 700)] == ["starting", "starting", "stale"]
    run.train(to=150)
    run.write()
    assert [status_of(run, at=run.now + wait).state for wait in (1, 100, 1000)] == ["running", "running", "stale"]
    assert "16m40s" in status_of(run, at=run.now + 1000).detail
    for reason, state in (("SIGUSR1", "stopped"), ("failed: the disk is full", "failed"), ("finished", "finished")):
        run.records = [record for record in run.records if record["kind"] != "stop"]
        run.stop(reason)
        run.write()
        status = status_of(run, at=run.now + 10_000)
        assert (status.state, status.detail) == (state, {"finished": ""}.get(reason, reason.removeprefix("failed: ")))


def test_a_pause_as_long_as_evaluations_take_is_not_stale(run):
    run.start()
    run.step_seconds = 0.1
    run.train(to=300)
    run.write()
    assert status_of(run, at=run.now + 4 * EVALUATION_SECONDS).state == "running"
    assert status_of(run, at=run.now + 6 * EVALUATION_SECONDS).state == "stale"


def test_before_its_first_evaluation_a_run_may_be_silent_for_longer(run):
    run.start()
    run.step_seconds = 0.1
    run.train(to=50)
    run.write()
    assert status_of(run, at=run.now + 400).state == "running"
    assert status_of(run, at=run.now + 700).state == "stale"


def test_the_queue_comes_before_what_the_folder_says(run):
    run.start(job="123")
    run.train(to=100)
    run.stop("SIGUSR1")
    run.end_job("123", 85, "requeue", "time limit")
    run.write(100)
    run.wait(1000)
    states = {"PENDING": "waiting", "REQUEUED": "waiting", "REQUEUE_HOLD": "held", "SPECIAL_EXIT": "held"}
    for word, state in states.items():
        assert status_of(run, SlurmAnswer(SlurmJob("123", word))).state == state
    for reason in ("JobHeldUser", "JobHeldAdmin", "JobHoldMaxRequeue", "launch_failed_requeued_held"):
        held = status_of(run, SlurmAnswer(SlurmJob("123", "PENDING", reason)))
        assert (held.state, held.detail) == ("held", reason)
    assert status_of(run, PENDING).detail == "Priority"
    assert status_of(run, SlurmAnswer(SlurmJob("123", "SUSPENDED"))).state == "waiting"


def test_without_the_job_in_the_queue_its_last_decision_counts(run):
    run.start(job="123")
    run.train(to=100)
    run.write(100)
    log = run.folder / "logs" / "123" / "restarts.jsonl"
    started = log.read_text()
    cases = [
        (0, "done", "finished"),
        (85, "requeue", "stopped"),
        (1, "stop", "failed"),
        (86, "stop", "failed"),
        (85, "hold", "held"),
    ]
    for answer in (GONE, NO_SQUEUE, SlurmAnswer(SlurmJob("123", "COMPLETED"))):
        for code, decision, state in cases:
            log.write_text(started)
            run.end_job("123", code, decision, "the reason")
            status = status_of(run, answer)
            assert (status.state, status.detail) == (state, "" if state == "finished" else "the reason")


def test_a_job_that_runs_again_after_a_stop_is_starting_until_it_writes_steps(run):
    run.start(job="123")
    run.train(to=100)
    run.stop("SIGUSR1")
    run.end_job("123", 85, "requeue", "time limit")
    run.write(100)
    assert status_of(run, running_job(run.now - 100)).state == "stopped"  # not over, but the script has spoken
    run.wait(1000)
    again = running_job(run.now)
    run.wait(5)
    assert status_of(run, again).state == "starting"
    run.start(job="123", restart=1)
    run.write()
    assert status_of(run, again).state == "starting"
    run.train(to=120)
    run.write()
    assert status_of(run, again).state == "running"


def test_a_job_that_is_gone_without_a_word_is_told_from_one_that_may_be_running(run):
    run.start(job="123")
    run.train(to=100)
    run.write(100)
    assert status_of(run, RUNNING).state == "running"
    assert status_of(run, NO_SQUEUE).state == "running"
    assert status_of(run, NO_SQUEUE, at=run.now + 10_000).state == "stale"
    for answer in (GONE, SlurmAnswer(SlurmJob("123", "NODE_FAIL")), SlurmAnswer(SlurmJob("123", "TIMEOUT"))):
        assert status_of(run, answer).state == "ended silently"
    assert "NODE_FAIL" in status_of(run, SlurmAnswer(SlurmJob("123", "NODE_FAIL"))).detail


def test_a_folder_with_nothing_but_a_beginning_has_not_started(tmp_path):
    run = SimulatedRun(tmp_path / "run")
    run.write()
    (run.folder / "metrics.jsonl").write_text("")
    status = status_of(run)
    assert (status.state, status.training.step, status.total_steps, status.notes) == ("not started", 0, STEPS, [])
    (run.folder / "metrics.jsonl").unlink()
    run.write_job("123", event="start", restart=0, step=0, nodes="node1")
    assert status_of(run, PENDING).state == "waiting"
    assert status_of(run, RUNNING).state == "starting"


# ---- the lock, held by a process as a run holds it

HOLD = """
import sys, time
from pathlib import Path
from megagpt.training.run_folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_the_lock_shows_who_is_alive_without_being_in_anyones_way(run):
    run.start()
    run.train(to=100)
    run.stop("SIGTERM")
    run.write(100)
    assert read_lock(run.folder) is None
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        lock = read_lock(run.folder)
        assert lock.is_held
        assert lock.is_near
        assert status_of(run, at=lock.since + 1).state == "starting"  # again, after its stop
        os.utime(run.folder / ".lock", (run.now - 500, run.now - 500))
        assert status_of(run).state == "stopped"  # the same process, at its end
        run.records.pop()
        run.write()
        assert status_of(run).state == "running"
        assert read_lock(run.folder).is_held, "to look must not take the lock away"
        holder.communicate("\n")
    assert not read_lock(run.folder).is_held
    status = status_of(run)
    assert status.state == "ended silently", "its process was on this machine and is gone"
    (run.folder / ".lock").write_text("process 1 on another-host\n")
    assert status_of(run).state == "running", "the lock of another node may not be visible here"


# ---- numbers


def test_the_time_left_is_what_the_rest_of_the_run_takes(run):
    run.start()
    run.train(to=500)
    run.write(500)
    then, left = run.now, status_of(run).time_left
    run.train(to=STEPS)
    assert left.productive_seconds == pytest.approx(run.now - then)
    assert left.productive_end == pytest.approx(run.now)


def test_at_the_overall_rate_waits_count_as_they_did_so_far(run):
    run.start()
    run.train(to=200)
    run.stop("SIGTERM")
    run.wait(5000)
    run.start()
    run.train(to=500)
    run.write(500)
    status = status_of(run)
    assert status.time_left.overall_seconds == pytest.approx((run.now - BEGIN - 20) * (STEPS - 500) / 500)
    assert status.time_left.productive_seconds < status.time_left.overall_seconds - 4000


def test_a_run_that_began_at_another_runs_checkpoint_has_not_done_the_steps_before(run):
    run.step = 400
    run.start()
    run.train(to=500)
    run.write(500)
    assert status_of(run).time_left.overall_seconds == pytest.approx((run.now - BEGIN - 20) * (STEPS - 500) / 100)


def test_a_waiting_job_ends_so_long_after_its_expected_start_and_a_finished_run_has_no_time_left(run):
    run.start(job="123")
    run.train(to=900)
    run.stop("SIGUSR1")
    run.write(900)
    start = run.now + 3600
    left = status_of(run, SlurmAnswer(SlurmJob("123", "PENDING", start=start))).time_left
    assert left.productive_end == pytest.approx(start + left.productive_seconds)
    assert status_of(run, PENDING).time_left.productive_end is None
    run.records.pop()
    run.train(to=STEPS)
    run.stop("finished")
    run.write()
    assert status_of(run).time_left.productive_seconds is None


def test_what_would_be_lost_is_the_time_since_the_checkpoints_step_and_nothing_while_there_is_none_beyond_it(run):
    run.start()
    run.train(to=300)
    saved_at = run.now
    run.write(200, 300)
    assert status_of(run).unsaved.seconds == 0
    run.train(to=450)
    run.write()
    run.wait(7)
    unsaved = status_of(run).unsaved
    assert unsaved.steps == 150
    assert unsaved.seconds == pytest.approx(run.now - saved_at)
    run.stop("failed: a reason")
    run.write()
    assert status_of(run).unsaved.seconds == pytest.approx(run.now - 7 - saved_at), "after its end it loses no more"


def test_without_a_checkpoint_all_work_would_be_lost_and_one_between_two_records_saves_a_part(run):
    run.start()
    run.train(to=50)
    run.write()
    assert (status_of(run).checkpoint, status_of(run).unsaved.steps) == (None, 50)
    assert status_of(run).unsaved.seconds == pytest.approx(50 * run.step_seconds)
    other = SimulatedRun(run.folder.with_name("other"))
    other.start()
    other.train(to=50)
    other.write(44)
    assert status_of(other).unsaved.seconds == pytest.approx(6 * other.step_seconds)


def test_speed_is_that_since_the_last_start_at_whatever_number_of_ranks(run):
    run.start(ranks=2)
    run.train(to=600)
    run.stop("SIGTERM")
    run.write(600)
    run.step_seconds = 0.5
    run.start(ranks=8)
    run.write()
    assert status_of(run).training.step_seconds == 2.0, "until there are newer ones"
    run.train(to=620)
    run.write()
    status = status_of(run)
    assert (status.ranks, status.training.step_seconds) == (8, 0.5)
    assert status.training.tokens_per_second == TOKENS_A_STEP / 0.5
    assert (status.training.step, status.training.tokens) == (620, 620 * TOKENS_A_STEP)
    assert (status.training.loss, status.training.loss_step) == (5.0 - 0.62, 620)
    assert status.training.validation == {"wiki": (600, 5.5 - 0.6)}


# ---- restarts


def test_a_requeue_after_a_lost_node_or_an_unheard_signal_is_no_failure(run):
    run.start(job="7")
    run.train(to=100)
    run.end_job("7", 84, "requeue", "a node was lost")
    run.wait(60)
    run.start(job="7", restart=1)
    run.end_job("7", 143, "requeue", "asked to stop", restart=1)
    run.wait(60)
    run.start(job="7", restart=2)
    run.write(100)
    assert [(one.cause, one.reason) for one in status_of(run).restarts] == [
        ("silent", "a node was lost"),
        ("signal", "asked to stop"),
    ]


def test_every_restart_has_its_cause_whoever_wrote_it_down(run):
    run.start()
    run.train(to=100)
    run.stop("SIGTERM")
    run.wait(60)
    run.start(job="7")  # stopped by a signal before
    run.train(to=150)
    run.step = 100
    run.wait(60)
    run.start(job="7", restart=1)  # killed before
    run.train(to=200)
    run.end_job("7", 86, "requeue", "no progress for 1800 s", restart=1)
    run.wait(60)
    run.start(job="8")  # hung before
    run.train(to=250)
    run.step = 200
    run.end_job("8", 1, "requeue", "node2 is out of memory")
    run.wait(60)
    run.write_job("8", event="start", restart=1, step=200, nodes="node1")  # failed before; and itself before training
    run.end_job("8", 1, "stop", "the data are missing", restart=1)
    run.wait(60)
    run.start(job="9")
    run.train(to=230)
    run.step = 200
    run.wait(60)
    run.start()  # by hand, when the job was killed
    run.write(200)
    status = status_of(run)
    assert [restart.cause for restart in status.restarts] == [
        "signal",
        "silent",
        "hang",
        "failure",
        "failure",
        "silent",
    ]
    assert [restart.job for restart in status.restarts] == ["7", "7", "8", "8", "9", None]
    assert [restart.step for restart in status.restarts] == [100, 100, 200, 200, 200, 200]
    assert status.restarts[2].reason == "no progress for 1800 s"
    assert status.cause_counts == {"failure": 2, "signal": 1, "silent": 2, "hang": 1}
    assert status.job_id == "9"


def test_a_hang_by_hand_is_known_by_the_file_that_it_left(run):
    run.start()
    run.train(to=100)
    file = run.folder / "logs" / "hang_rank_1.txt"
    file.parent.mkdir(parents=True)
    file.write_text("no progress for 60 s in: step 101: data\nphase: step 101\n")
    os.utime(file, (run.now + 60, run.now + 60))
    run.write(100)
    status = status_of(run, at=run.now + 61)
    assert (status.state, status.detail) == ("failed", "no progress for 60 s in: step 101: data")
    run.wait(300)
    run.start()
    run.train(to=120)
    run.write()
    assert [restart.cause for restart in status_of(run).restarts] == ["hang"]
    assert status_of(run).state == "running"


# ---- files as they may be found


def test_lines_that_are_just_being_written_change_nothing(run):
    run.start(job="123")
    run.train(to=EVALUATE_EVERY + EVERY)
    run.write(100)
    before = status_of(run, RUNNING)
    for file in (run.folder / "metrics.jsonl", run.folder / "logs" / "123" / "restarts.jsonl"):
        whole = file.read_bytes()
        last = whole.splitlines(keepends=True)[-1]
        for length in (1, len(last) // 2, len(last) - 2):
            file.write_bytes(whole + last[:length])
            assert status_of(run, RUNNING) == before
        file.write_bytes(whole)


def test_what_is_damaged_is_noted_with_its_line_and_the_rest_is_shown(run):
    run.start(job="123")
    run.train(to=300)
    run.write(200, 300)
    (run.folder / "config.yaml").write_text("train: {stepz: 3}\n")
    (run.folder / "checkpoints" / "step_00000300" / "manifest.json").write_text("{")
    status = status_of(run)
    assert (status.checkpoint.step, status.training.step, status.total_steps) == (200, 300, None)
    assert any("step_00000300" in note for note in status.notes)
    assert any("train.stepz" in note and "\n" not in note for note in status.notes)
    (run.folder / "metrics.jsonl").write_text('{"kind": "start", "step": 0}\nnonsense\n')
    run.write_job("123", event="middle")
    notes = status_of(run).notes
    assert any("metrics.jsonl:2" in note for note in notes)
    assert any("restarts.jsonl:2" in note for note in notes)
    assert status_of(run).training.step == 200, "of the checkpoint"


def test_a_folder_that_is_no_run_is_refused_with_the_runs_that_may_be_meant(tmp_path, monkeypatch):
    for name in ("small", "large"):
        SimulatedRun(tmp_path / "runs" / name).write()
    check_is_run(tmp_path / "runs" / "small")
    for wrong, right in (("runs/smal", "runs/small?"), ("runs", "runs/large, runs/small"), ("smoll", "runs/small?")):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError) as caught:
            check_is_run(Path(wrong))
        assert str(caught.value).endswith(right)
    (tmp_path / "alone").mkdir()
    with pytest.raises(UsageError, match=r"train\.run_dir"):
        check_is_run(tmp_path / "alone" / "run")
