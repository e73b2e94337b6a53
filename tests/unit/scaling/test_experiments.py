"""The folder of a study: goes on with its own runs, refuses others by name, keeps failures."""

import json
import multiprocessing

import pytest

from megagpt.errors import UsageError, UserError
from megagpt.scaling.experiments import StudyFolder, is_locked, last_error, locked
from megagpt.scaling.study import load_study
from tests.unit.scaling.fake_studies import create, finish, write_study


def test_a_study_goes_on_with_what_is_missing_or_failed(tmp_path):
    study = load_study(write_study(tmp_path, ranks=[1, 2, 4, 8]))
    first = create(tmp_path / "out", "strong", study)
    finish(first.entries[0], [1.0] * 30)
    attempt = first.entries[1].begin()
    first.entries[1].end(attempt, 3, keep_checkpoints=False, error="out of luck")
    first.entries[2].begin()  # still running

    again = create(tmp_path / "out", "strong", study)
    assert [entry.state for entry in again.entries] == ["finished", "failed", "running", "missing"]
    assert again.to_run() == [again.entries[1], again.entries[3]]
    second = again.entries[1].begin()
    assert again.entries[1].run_dir(second).name == "attempt_2"
    failed = StudyFolder.open(tmp_path / "out").entries[1].stored.attempts[0]
    assert (failed.state, failed.exit_code, failed.error) == ("failed", 3, "out of luck")


def test_a_study_may_grow(tmp_path):
    path = write_study(tmp_path, ranks=[2, 4])
    finish(create(tmp_path / "out", "strong", load_study(path)).entries[0], [1.0] * 30)
    grown = create(tmp_path / "out", "strong", load_study(path, ["ranks=[1,2,4]"]))
    assert [(entry.stored.ranks, entry.state) for entry in grown.entries] == [
        (1, "missing"), (2, "finished"), (4, "missing"),
    ]  # fmt: skip


def test_runs_of_another_configuration_are_refused_by_name(tmp_path):
    path = write_study(tmp_path)
    before = create(tmp_path / "out", "strong", load_study(path))
    with pytest.raises(UsageError) as caught:
        create(tmp_path / "out", "strong", load_study(path, ["optimizer.lr=0.5", "train.seed=7"]))
    assert before.entries[0].name in str(caught.value)
    assert "optimizer.lr 0.0003 there and 0.5 here, train.seed 0 there and 7 here" in str(caught.value)
    assert "and 3 more" in str(caught.value)
    with pytest.raises(UsageError, match="which this study does not have"):
        create(tmp_path / "out", "strong", load_study(path, ["ranks=[1,2]"]))
    with pytest.raises(UsageError, match="holds a strong study"):
        create(tmp_path / "out", "weak", load_study(path))


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="has files, but no study"), locked(tmp_path / "out"):
        pass
    with pytest.raises(UsageError, match="is a file"), locked(tmp_path / "out" / "thesis.tex"):
        pass
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="no study"):
        StudyFolder.open(tmp_path / "out")


@pytest.mark.parametrize("damage", ["", "{}", '{"curve": 1'])
def test_a_damaged_entry_is_named(tmp_path, damage):
    made = create(tmp_path / "out", "strong", load_study(write_study(tmp_path)))
    path = made.entries[2].path / "entry.json"
    path.write_text(damage, encoding="utf-8")
    with pytest.raises(UserError, match=str(path)):
        StudyFolder.open(tmp_path / "out")


def test_only_metrics_that_come_to_the_last_step_are_a_finished_run(tmp_path):
    made = create(tmp_path / "out", "strong", load_study(write_study(tmp_path)))
    finish(made.entries[0], [1.0] * 30)
    attempt = made.entries[1].begin()
    made.entries[1].end(attempt, 0, keep_checkpoints=False)
    assert [entry.state for entry in made.entries[:2]] == ["finished", "failed"]
    assert attempt.error == "it ended before its last step, without a word"


@pytest.mark.parametrize("keep", [True, False])
def test_checkpoints_of_finished_runs_go_and_nothing_else(tmp_path, keep):
    made = create(tmp_path / "out", "strong", load_study(write_study(tmp_path)))
    finish(made.entries[0], [1.0] * 30)
    attempt = made.entries[0].last
    checkpoints = made.entries[0].run_dir(attempt) / "checkpoints"
    checkpoints.mkdir()
    made.entries[0].end(attempt, 1, keep_checkpoints=False)
    assert checkpoints.exists(), "of a failed run they may say why"
    made.entries[0].end(attempt, 0, keep_checkpoints=keep)
    assert checkpoints.exists() == keep
    assert json.loads((made.entries[0].path / "entry.json").read_text())["attempts"][0]["state"] == "finished"


TORCHRUN = """
error: first
Traceback (most recent call last):
RuntimeError: in between
error: [rank 1 on node3] train.run_dir: No space left on device
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TORCHRUN, "[rank 1 on node3] train.run_dir: No space left on device"),
        ("Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory. Tried\nW12 torchrun: closing\n",
         "torch.OutOfMemoryError: CUDA out of memory. Tried"),
        ("step 1\nslurmstepd: error: *** JOB 5 ON n1 CANCELLED DUE TO TIME LIMIT ***\nsrun: error: n1: Killed\n",
         "slurmstepd: error: *** JOB 5 ON n1 CANCELLED DUE TO TIME LIMIT ***"),
        ("step 1\nstep 2\n", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_error_of_a_log_is_the_line_that_says_most(tmp_path, text, expected):
    (tmp_path / "log").write_text(text, encoding="utf-8")
    assert last_error(tmp_path / "log") == expected


def _hold(folder, ready, done):
    with locked(folder):
        ready.set()
        done.wait(30)


def test_one_command_at_a_time_runs_a_study(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, done))
    other.start()
    try:
        assert ready.wait(30)
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match=f"process {other.pid} on"), locked(tmp_path):
            pass
    finally:
        done.set()
        other.join()
    assert not is_locked(tmp_path)
    with locked(tmp_path):
        pass
