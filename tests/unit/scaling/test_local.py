"""Runs on this machine, under the real torchrun but with a stand-in for launch.train: ends, errors, interrupts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megagpt.errors import ConfigError, UserError
from megagpt.scaling.experiments import StudyFolder
from megagpt.scaling.local import check_machine, run_all, settle
from megagpt.scaling.study import load_study, plan
from tests.unit.scaling.fake_studies import create, write_study

ROOT = Path(__file__).parents[3]

# What torchrun finds as launch.train from the folder of the test: it finishes on 1 rank, fails on 2, hangs on 4.
STAND_IN = """
import json, os, pathlib, signal, sys, time
ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
run_dir = pathlib.Path(sys.argv[2].partition("=")[2])
if ranks == 1 or pathlib.Path("mended").exists():
    if rank == 0:
        cores = sorted(os.sched_getaffinity(0))
        with open(run_dir / "metrics.jsonl", "w") as file:
            print(json.dumps({"kind": "start", "step": 0, "world_size": ranks, "cores": cores}), file=file)
            print(json.dumps({"kind": "stop", "step": 30, "reason": "finished"}), file=file)
elif ranks == 2:
    if rank == 1:
        sys.exit("error: out of luck" if time.sleep(0.5) else print("error: out of luck") or 3)
    time.sleep(60)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (run_dir / f"pid_{rank}").write_text(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").touch()
    (tmp_path / "launch" / "train.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_failed_run_is_data_and_is_tried_again(workplace):
    overrides = {"train.device": "cpu"}
    study = load_study(write_study(workplace, ranks=[1, 2], cores_per_rank=1, overrides=overrides))
    folder, lines = create(workplace / "out", "strong", study), []
    settle(folder)
    run_all(folder, lines.append)
    one, two = folder.entries
    assert [one.state, two.state] == ["finished", "failed"]
    assert (two.last.exit_code, two.last.error) == (3, "out of luck"), "of the rank, not of torchrun"
    assert any("exit code 3: out of luck" in line for line in lines)
    assert '"cores": [0]' in (one.run_dir(one.last) / "metrics.jsonl").read_text() or os.sched_getaffinity(0) != {0, 1}

    (workplace / "mended").touch()
    folder = create(workplace / "out", "strong", study)
    run_all(folder, lines.append)
    assert [len(entry.stored.attempts) for entry in folder.entries] == [1, 2]
    assert [entry.state for entry in folder.entries] == ["finished", "finished"]


def _processes(run_dir: Path) -> list[int]:
    """By the files that ranks have written, and whether the processes still are what they were."""
    pids = [int(file.read_text()) for file in run_dir.glob("pid_*")]
    return [pid for pid in pids if str(run_dir).encode() in _command_line(pid)]


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_an_interrupted_study_leaves_no_process_behind(workplace):
    write_study(workplace, ranks=[4], overrides={"train.device": "cpu"})
    expected = {signal.SIGINT: (130, "error: interrupted\n"), signal.SIGTERM: (143, "error: terminated\n")}
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{workplace}:{ROOT}"}
    studies = {
        number: subprocess.Popen(
            [sys.executable, "-m", "tools.scaling", "strong", "study.yaml", "--output", number.name],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for number in expected
    }  # fmt: skip
    try:
        for number, study in studies.items():
            deadline = time.monotonic() + 60
            while len(list(workplace.glob(f"{number.name}/entries/*/attempt_1/pid_*"))) < 4:
                assert study.poll() is None, study.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            (run_dir,) = workplace.glob(f"{number.name}/entries/*/attempt_1")
            assert len(_processes(run_dir)) == 4
            study.send_signal(number)
        for number, study in studies.items():
            _, errors = study.communicate(timeout=60)
            assert (study.returncode, errors) == expected[number]
            (entry,) = StudyFolder.open(workplace / number.name).entries
            assert (entry.state, entry.last.error) == ("failed", "interrupted")
            assert _processes(entry.run_dir(entry.last)) == []
    finally:
        for study in studies.values():
            study.kill()


def test_a_run_that_goes_on_without_its_study_is_not_disturbed(workplace):
    folder = create(workplace / "out", "strong", load_study(write_study(workplace, ranks=[1, 2])))
    first, second = folder.entries
    alive, dead = first.begin(), second.begin()
    words = [f"train.run_dir={first.run_dir(alive)}"]
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words])
    try:
        while words[0].encode() not in _command_line(process.pid):
            time.sleep(0.01)
        settle(folder)
        assert [first.state, second.state] == ["running", "failed"]
        assert dead.error == "the command that ran the study was killed"
        with pytest.raises(UserError, match=f"still runs.*{process.pid}"):
            run_all(folder, print)
    finally:
        process.kill()
        process.wait()
    settle(folder)
    assert first.state == "failed"


def test_what_this_machine_cannot_do_is_told_at_once(workplace):
    cores = len(os.sched_getaffinity(0))
    path = write_study(workplace, ranks=[1, 64], cores_per_rank=2 * cores, overrides={"train.device": "cpu"})
    study = load_study(path)
    with pytest.raises(ConfigError) as caught:
        check_machine(study, plan(study, "strong"))
    assert "2 things that this machine cannot do" in str(caught.value)
    assert f"64 ranks with cores_per_rank {2 * cores} need {128 * cores} CPU cores" in str(caught.value)

    study = load_study(path, ["cores_per_rank=null", "ranks_per_node=32"])
    with pytest.raises(ConfigError, match=r"64 ranks on 2 nodes.*--slurm"):
        check_machine(study, plan(study, "strong"))
