"""launch.status as its user runs it: one screen or one line a run, Slurm asked once, or the reason said in words."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from launch import squeue, status
from launch.squeue import ask_slurm
from megagpt.errors import UsageError
from tests.unit.training.simulated import STEPS, SimulatedRun

ROOT = Path(__file__).parents[3]
FAKE_SQUEUE = """#!/bin/sh
printf '%s\\n' "$*" >> "$RECORD"
env | grep '^SQUEUE_' >> "$RECORD"
cat "$ANSWER"
{end}
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A squeue on PATH that answers with the lines given to it and writes down how it was called."""

    def answers(*lines, end="exit 0"):
        tool = tmp_path / "bin" / "squeue"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(FAKE_SQUEUE.replace("{end}", end))
        tool.chmod(0o755)
        (tmp_path / "answer").write_text("".join(f"{line}\n" for line in lines))

    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("ANSWER", str(tmp_path / "answer"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    answers.calls = lambda: (tmp_path / "record").read_text().splitlines() if (tmp_path / "record").exists() else []
    answers()
    return answers


@pytest.fixture
def run(tmp_path):
    """A run of Slurm's job 123 that is at step 300 right now."""
    simulated = SimulatedRun(tmp_path / "runs" / "small")
    simulated.start(job="123")
    simulated.train(to=300)
    shift = time.time() - simulated.now
    simulated.records = [record | {"time": record["time"] + shift} for record in simulated.records]
    log = simulated.folder / "logs" / "123" / "restarts.jsonl"
    log.write_text(json.dumps(json.loads(log.read_text()) | {"time": simulated.records[0]["time"] - 20}) + "\n")
    simulated.now += shift
    simulated.write(200)
    return simulated


def shown(capsys, *arguments, **options):
    status.main([Path(argument) for argument in arguments], **options)
    return capsys.readouterr().out


def command(*arguments, **options):
    words = [sys.executable, "-m", "launch.status", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60, **options)


def test_everything_about_a_run_is_on_one_plain_screen(run, slurm, capsys):
    slurm("123|123|RUNNING|None|2|node[1-2]|1-02:03:04|2026-01-01T00:00:00")
    text = shown(capsys, run.folder)
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert text.isascii(), "no colours, no lines drawn, whatever the terminal can show"
    for expected in (
        "State       running on 2 ranks",
        "30.0%, step 300 of 1,000",
        "14.4k of 48k tokens",
        "4.7000 at step 300",
        "5.2000 on wiki at step 300",
        "24 tokens/s, 2 s a step",
        "26m50s of training",  # 700 steps of 2 s, 7 evaluations of 30 s
        "50.0% of the time",
        "step_00000200, 0s old",
        "would lose 100 steps, 3m50s of work",
        "Restarts    none",
        "123: RUNNING, 2 nodes node[1-2], 1-02:03:04 left",
    ):
        assert expected in text
    now = datetime.now().timestamp()
    assert re.search(rf"until (\d+-\d+-\d+ )?{datetime.fromtimestamp(now + 1610):%H:%M}", text)


def test_slurm_is_asked_once_for_all_jobs_without_the_users_own_filters(run, slurm, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SQUEUE_STATES", "PD")
    other, by_hand = SimulatedRun(tmp_path / "runs" / "other"), SimulatedRun(tmp_path / "runs" / "by_hand")
    other.start(job="124")
    by_hand.start()
    for one in (other, by_hand):
        one.train(to=100)
        one.write()
    slurm("124|124|PENDING|Resources|4||2:00:00|N/A", "a greeting", "123|123|PENDING|JobHeldUser|4||2:00:00|N/A")
    header, *lines = shown(capsys, run.folder, other.folder, by_hand.folder).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["small", "held", "300"],
        ["other", "waiting", "100"],
        ["by_hand", "stale", "100"],
    ]
    assert header.split()[:3] == ["run", "state", "step"]
    (call,) = slurm.calls()
    assert re.search(r"--jobs=(123,124|124,123)\b", call)
    assert "--states=all" in call


def test_slurm_is_not_asked_about_a_run_that_it_did_not_start(run, slurm, capsys):
    (run.folder / "logs" / "123" / "restarts.jsonl").unlink()
    assert "Slurm" not in shown(capsys, run.folder)
    assert slurm.calls() == []


def test_the_fields_of_squeues_answer_are_read_as_slurm_writes_them(slurm):
    slurm(
        "123|123|RUNNING|None|2|node[1-2,7]|UNLIMITED|2026-02-03T04:05:06",
        "131|130_1|PENDING|Priority|1||1:00|N/A",
        "132|132|PENDING|Dependency|1||INVALID|2026-02-03T04:05:06",
    )
    answers = ask_slurm(["123", "130_1", "132", "133"])
    moment = datetime(2026, 2, 3, 4, 5, 6).timestamp()
    running, task, waiting = (answers[job_id].job for job_id in ("123", "130_1", "132"))
    assert (running.state, running.reason, running.node_count, running.nodes) == ("RUNNING", "", 2, "node[1-2,7]")
    assert (running.time_left, running.start) == ("UNLIMITED", moment)
    assert (task.id, task.reason, task.nodes, task.start) == ("131", "Priority", "", None)
    assert (waiting.time_left, waiting.start) == ("", moment)
    assert (answers["133"].job, answers["133"].problem) == (None, None)


def test_what_keeps_slurm_from_answering_is_said_and_the_rest_is_shown(run, slurm, monkeypatch, capsys, tmp_path):
    refused = "echo 'slurm_load_jobs error: {}' >&2; exit 1"
    slurm(end=refused.format("Invalid job id specified"))
    text = shown(capsys, run.folder)
    assert "ended silently: Slurm no longer knows its job 123" in text
    assert "123: Slurm does not know it any more" in text
    slurm(end=refused.format("Unable to contact slurm controller"))
    text = shown(capsys, run.folder)
    assert "squeue fails: slurm_load_jobs error: Unable to contact slurm controller" in " ".join(text.split())
    assert "running on 2 ranks" in text
    slurm(end="exec sleep 60")
    monkeypatch.setattr(squeue, "TIMEOUT_SECONDS", 0.3)
    assert "squeue has not answered" in shown(capsys, run.folder)
    (tmp_path / "bin" / "squeue").chmod(0o644)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    text = shown(capsys, run.folder)
    assert "123: squeue is not installed here" in text
    assert "running on 2 ranks" in text
    assert ask_slurm(["12;rm"])["12;rm"].problem == "is no id of a Slurm job"


def test_json_has_the_same_numbers_an_object_a_line(run, slurm, capsys, tmp_path):
    other = SimulatedRun(tmp_path / "runs" / "other")
    other.start()
    other.write()
    first, second = map(json.loads, shown(capsys, run.folder, other.folder, as_json=True).splitlines())
    assert (first["name"], first["training"]["step"], first["total_steps"]) == ("small", 300, STEPS)
    assert first["checkpoint"]["step"] == 200
    assert first["time_left"]["productive_seconds"] == pytest.approx(1610)
    assert (second["state"], second["job_id"], second["training"]["loss"]) == ("stale", None, None)


def test_a_restart_and_its_reason_are_shown(run, slurm, capsys):
    run.end_job("123", 85, "requeue", "SIGUSR1 180 s before the time limit")
    run.start(job="123", restart=1)
    run.train(to=320)
    run.write()
    slurm("123|123|RUNNING|None|1|node1|1:00|2026-01-01T00:00:00")
    text = " ".join(shown(capsys, run.folder).split())
    assert "1: 1 stopped by a signal" in text
    assert "from step 300 in job 123, stopped by a signal: SIGUSR1 180 s before the time limit" in text


@pytest.mark.slow
def test_the_command_needs_no_torch_and_changes_nothing_in_the_folder(run, slurm):
    before = {path: path.stat().st_mtime_ns for path in [run.folder, *run.folder.rglob("*")]}
    program = "import runpy, sys; sys.argv[0] = 'status'; sys.modules['torch'] = sys.modules['deepspeed'] = None\n"
    program += "runpy.run_module('launch.status', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program, str(run.folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 300 of 1,000" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in [run.folder, *run.folder.rglob("*")]}


@pytest.mark.slow
def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(run):
    done = command(run.folder.parent / "smal")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: \S+/smal: no such run folder; did you mean \S+/small\?\n", done.stderr)


def test_of_several_what_is_there_but_no_run_is_left_out_and_what_is_not_there_is_an_error(run, slurm, capsys):
    notes = run.folder.parent / "notes.txt"
    notes.write_text("")
    status.main([run.folder, notes])
    output = capsys.readouterr()
    assert output.err == f"left out, no runs: {notes}\n"
    assert "step 300 of" in output.out
    for wrong in ([run.folder, run.folder.parent / "larg"], [run.folder, run.folder], [notes, notes.parent]):
        with pytest.raises(UsageError):
            status.main(wrong)


@pytest.mark.slow
def test_watching_follows_the_run_until_interrupted(run, slurm):
    words = [sys.executable, "-m", "launch.status", str(run.folder), "--watch", "1", "--json"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert json.loads(watching.stdout.readline())["training"]["step"] == 300
        run.train(to=400)
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in run.records if record["step"] > 300))
        steps = [json.loads(watching.stdout.readline())["training"]["step"] for _ in range(2)]
        assert steps[-1] == 400
        os.kill(watching.pid, signal.SIGINT)
        _, errors = watching.communicate(timeout=20)
    assert (watching.returncode, errors) == (0, "")
