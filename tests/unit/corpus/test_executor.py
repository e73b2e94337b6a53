"""Workers: results in order, errors with their place, deaths that are told, and nobody left behind."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megagpt.corpus.executor import LocalPool, Progress, run_stage
from megagpt.corpus.workspace import Receipt, open_workspace, read_receipt, write_folder
from megagpt.errors import UserError


@dataclass(frozen=True)
class SquareTask:
    """Writes and counts the square of a number, or does what its name says."""

    number: int
    act: str = ""

    def __str__(self) -> str:
        return f"number {self.number}"

    def run(self, folder: Path) -> Receipt:
        if self.act == "wait":
            time.sleep(60)
        if self.act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.act == "exit":
            os._exit(7)
        if self.act == "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "square"))
        if self.act == "user":
            raise UserError("a.jsonl: gone")
        if self.act == "memory":
            raise MemoryError
        if self.act == "bug":
            raise KeyError("oops")
        (folder / "square").write_text(str(self.number**2))
        return {"sum": self.number**2}


def run(tasks: list[SquareTask], folder: Path, workers: int = 2) -> list[Progress]:
    seen: list[Progress] = []
    with LocalPool(workers) as pool:
        run_stage(pool, folder / "squares", tasks, seen.append)
    return seen


@pytest.fixture(autouse=True)
def _nobody_is_left_behind() -> Iterator[None]:
    others = set(multiprocessing.active_children())  # process groups that other tests keep alive
    yield
    assert set(multiprocessing.active_children()) <= others


def test_each_task_leaves_its_folder_and_the_counts_add_up(tmp_path: Path) -> None:
    seen = run([SquareTask(i) for i in range(20)], tmp_path, workers=3)
    assert [int((tmp_path / f"squares/{i:06d}/square").read_text()) for i in range(20)] == [i**2 for i in range(20)]
    assert (seen[-1].done, seen[-1].reused, seen[-1].counts["sum"]) == (20, 0, sum(i**2 for i in range(20)))
    assert [progress.done for progress in seen] == sorted({progress.done for progress in seen})


def test_finished_tasks_are_not_run_again(tmp_path: Path) -> None:
    run([SquareTask(i) for i in range(4)], tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("squares/*/square")}
    seen = run([*(SquareTask(i) for i in range(4)), SquareTask(4)], tmp_path)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (seen[-1].done, seen[-1].reused, seen[-1].counts["sum"]) == (5, 4, 30)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("disk", r"^stage squares, number 1: .*square: No space left on device; free space for .*, and run the same"),
        ("user", r"^stage squares, number 1: a\.jsonl: gone$"),
        ("memory", r"^stage squares, number 1: out of memory; .*fewer --workers"),
        ("die", r"^stage squares, number 1: a worker was killed by SIGKILL; run the same command again"),
        ("exit", r"^stage squares, number 1: a worker was gone with exit code 7; run the same command again"),
    ],
)
def test_a_failure_ends_the_run_at_once_and_says_first_where_it_was(tmp_path: Path, act: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        run([SquareTask(0, "wait"), SquareTask(1, act)], tmp_path)
    assert time.monotonic() - start < 10
    assert not (tmp_path / "squares/000001").exists()


def test_a_bug_keeps_its_traceback_and_says_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stage squares, number 1: KeyError: 'oops'") as caught:
        run([SquareTask(0, "wait"), SquareTask(1, "bug")], tmp_path)
    assert "in run" in str(caught.value.__cause__)


@pytest.mark.slow
def test_workers_end_when_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from megagpt.corpus.executor import LocalPool, run_stage
        from tests.unit.corpus.test_executor import SquareTask
        if __name__ == "__main__":
            with LocalPool(2) as pool:
                run_stage(pool, Path(sys.argv[1]), [SquareTask(0, "wait"), SquareTask(1, "wait")], lambda _: None)
    """)
    (tmp_path / "main.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, tmp_path / "main.py", tmp_path / "squares"], env=environment)
    try:
        wait_until(lambda: len(workers_at(tmp_path)) == 2)
        workers = workers_at(tmp_path)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def workers_at(folder: Path) -> list[int]:
    """The process ids in the names of the folders that are being written."""
    return [int(path.name.rpartition(".")[2]) for path in folder.glob("squares/.0*")]


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# The work folder


def test_a_folder_appears_only_when_its_writing_succeeded(tmp_path: Path) -> None:
    def fail(folder: Path) -> Receipt:
        (folder / "half").write_text("x")
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        write_folder(tmp_path / "a", fail)
    assert list(tmp_path.iterdir()) == []
    write_folder(tmp_path / "a", SquareTask(3).run)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "a",
        "a/receipt.json",
        "a/square",
    ]
    receipt = read_receipt(tmp_path / "a")
    assert receipt is not None
    assert receipt["sum"] == 9


def test_remains_of_killed_tasks_are_removed_and_results_stay(tmp_path: Path) -> None:
    (tmp_path / "extract/000000").mkdir(parents=True)
    (tmp_path / "extract/.000001.host.17").mkdir()
    with open_workspace(tmp_path) as folder:
        assert [path.name for path in (folder / "extract").iterdir()] == ["000000"]


@pytest.mark.slow
def test_two_runs_of_one_plan_do_not_share_the_work_folder_and_a_killed_one_lets_go_of_it(tmp_path: Path) -> None:
    script = "import sys, time; from pathlib import Path; from megagpt.corpus.workspace import open_workspace\n"
    script += "with open_workspace(Path(sys.argv[1])): print('open', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another run of the same plan"), open_workspace(tmp_path / "run"):
            pass
    finally:
        other.kill()
        other.communicate()
    with open_workspace(tmp_path / "run"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_work_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match=r"work folder .*file/work: File exists"),
        open_workspace(tmp_path / "file/work"),
    ):
        pass
