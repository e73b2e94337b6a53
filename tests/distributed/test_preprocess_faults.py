"""What goes wrong in a run of tools.preprocess: it ends within seconds in one line, and the same command goes on."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.unit.corpus.test_pipeline import contents
from tests.unit.corpus.texts import document, edited, write_jsonl

ROOT = Path(__file__).parents[2]
SECONDS_TO_END = 10

pytestmark = pytest.mark.slow


def command(*arguments: object, module: str = "tools.preprocess") -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    """The leader of a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Exit code, output and errors of a run that must end soon, with all of its processes."""
    output, errors = process.communicate(timeout=60)
    wait_until(lambda: not group(process.pid), 5)
    return process.returncode, output, errors


def group(leader: int) -> list[int]:
    """The processes of a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def workers_at(folder: Path) -> list[int]:
    """The process ids of the workers that are at a task."""
    return [int(path.name.rpartition(".")[2]) for path in folder.glob("*.work/*/*/.0*")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of lines, with near-duplicates."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(4)
    texts = [document(rng, rng.randrange(20, 500)) for _ in range(600)]
    texts += [edited(text, rng, 1) for text in texts[:150]]
    write_jsonl(folder / "a.jsonl", texts[:350])
    write_jsonl(folder / "b.jsonl", texts[350:])
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What comes of it when nothing goes wrong."""
    output = tmp_path_factory.mktemp("expected") / "out"
    code, _, errors = finish(start(command(*arguments_for(corpus, output))))
    assert (code, errors) == (0, "")
    return contents(output)


def arguments_for(corpus: Path, output: Path, *more: object) -> list[object]:
    """Of a run of many small tasks."""
    config = output.with_name("config.yaml")
    config.write_text("execution: {chunk_mb: 0.05, workers: 2}\n")
    return ["--config", config, "--input", corpus, "--output", output, "--tokenizer", "bytes", *more]


# Kills of everything


def test_killed_at_random_moments_nothing_is_redone_and_no_byte_differs(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, number_of_kills: int
) -> None:
    rng = random.Random(20)
    output = tmp_path / "out"
    run = command(*arguments_for(corpus, output))
    finished: dict[Path, tuple[int, int]] = {}
    seconds = 1.0  # what the work after the start takes, about
    reused = ends = 0
    for kill in range(number_of_kills):
        process = start(run)
        if kill % 4 == 3:  # while the dataset is joined and published
            wait_until(lambda: list(tmp_path.glob(".out.*")) != [tmp_path / ".out.lock"] or output.exists())
            time.sleep(rng.uniform(0, 0.05))
        else:
            wait_until(lambda: (tmp_path / ".out.lock").exists() or process.poll() is not None)  # noqa: B023
            time.sleep(rng.uniform(0, seconds))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        now = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in receipts(tmp_path)}
        if output.exists():
            ends += 1
            code, said, errors = finish(start(run))  # removes what is left of the work
            assert (code, errors) == (0, "")
            assert "already finished" in said
            assert contents(output) == expected
            assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "out"]
            for path in output.iterdir():
                path.unlink()
            output.rmdir()
            now = {}
        else:
            assert {path: now.get(path) for path in finished} == finished
            reused += len(finished)
        finished = now
    code, said, errors = finish(start(run))
    assert (code, errors) == (0, "")
    if finished:
        assert "from an earlier run" in said
    assert contents(output) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "out"]
    assert reused > 5 * number_of_kills


def receipts(folder: Path) -> list[Path]:
    """Of all finished tasks."""
    return [path for path in folder.glob("out.work/*/*/*/receipt.json") if not path.parent.name.startswith(".")]


# Workers that die or stand still


@contextlib.contextmanager
def stopped_worker(corpus: Path, folder: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A run of which one worker is stopped in the middle of the stage `extract`, and that worker's process id."""
    process = start(command(*arguments_for(corpus, folder / "out")))
    try:
        while True:
            wait_until(lambda: list(folder.glob("out.work/*/extract/.0*/position")) or process.poll() is not None)
            assert process.poll() is None, "too fast to be caught"
            for path in folder.glob("out.work/*/extract/.0*/position"):
                worker = int(path.parent.name.rpartition(".")[2])
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    os.kill(worker, signal.SIGSTOP)
                    wait_until(lambda: psutil.Process(worker).status() == psutil.STATUS_STOPPED)  # noqa: B023
                    if path.read_bytes():
                        yield process, worker
                        return
                    os.kill(worker, signal.SIGCONT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGTERM])
def test_a_worker_that_is_killed_ends_the_run_with_file_and_position(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    with stopped_worker(corpus, tmp_path) as (process, worker):
        os.kill(worker, number)
        os.kill(worker, signal.SIGCONT)
        begin = time.monotonic()
        code, _, errors = finish(process)
        assert time.monotonic() - begin < SECONDS_TO_END
    assert code == 1
    assert errors.count("\n") == 1
    if number != signal.SIGTERM:  # which the workers get from the run itself, too
        assert errors.startswith(f"error: stage extract, {corpus}/")
        assert ".jsonl, document at position " in errors
        assert f": a worker was killed by {number.name}; run the same command again to go on" in errors
    code, _, errors = finish(start(command(*arguments_for(corpus, tmp_path / "out"))))
    assert (code, errors) == (0, "")
    assert contents(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "out"]


def test_a_stopped_worker_is_waited_for(corpus: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    with stopped_worker(corpus, tmp_path) as (process, worker):
        time.sleep(2.5)
        assert process.poll() is None
        os.kill(worker, signal.SIGCONT)
        code, _, errors = finish(process)
    assert (code, errors) == (0, "")
    assert contents(tmp_path / "out") == expected


def test_a_stopped_worker_does_not_keep_a_run_from_ending_when_another_dies(corpus: Path, tmp_path: Path) -> None:
    with stopped_worker(corpus, tmp_path) as (process, stopped):
        wait_until(lambda: set(workers_at(tmp_path)) - {stopped})
        os.kill((set(workers_at(tmp_path)) - {stopped}).pop(), signal.SIGKILL)
        begin = time.monotonic()
        code, _, errors = finish(process)
        assert time.monotonic() - begin < SECONDS_TO_END
    assert code == 1
    assert f": a worker was killed by {signal.SIGKILL.name}; run the same command again to go on" in errors


@pytest.mark.parametrize(
    ("number", "everyone"),
    [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGHUP, True)],
)
def test_a_signal_to_the_run_ends_it_though_a_worker_is_stopped(
    corpus: Path, tmp_path: Path, number: signal.Signals, everyone: bool
) -> None:
    with stopped_worker(corpus, tmp_path) as (process, _):
        (os.killpg if everyone else os.kill)(process.pid, number)
        begin = time.monotonic()
        code, _, errors = finish(process)
        assert time.monotonic() - begin < SECONDS_TO_END
    said = "interrupted" if number == signal.SIGINT else "terminated; run the same command again to go on"
    assert (code, errors) == (128 + number, f"error: {said}\n")


def test_an_interrupt_while_libraries_are_imported_is_as_quiet(corpus: Path, tmp_path: Path) -> None:
    process = start(command(*arguments_for(corpus, tmp_path / "out")))
    wait_until(lambda: "_multiarray_umath" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGINT)
    code, _, errors = finish(process)
    assert (code, errors) == (130, "error: interrupted\n")


# Memory, disk, input


def test_too_little_memory_is_an_error_that_names_the_document(tmp_path: Path) -> None:
    texts = ["small", " ".join(map(str, range(4_000_000)))]
    corpus = write_jsonl(tmp_path / "in/a.jsonl", texts).parent
    limited = ["prlimit", f"--as={600 << 20}", *command(*arguments_for(corpus, tmp_path / "out"))]
    code, _, errors = finish(start(limited))
    assert (code, errors.count("\n")) == (1, 1)
    assert errors.startswith(f"error: stage extract, {corpus}/a.jsonl ")
    assert "out of memory; run the same command again with fewer --workers" in errors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_an_error_in_the_work_folder(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, small_disk: Path
) -> None:
    arguments = arguments_for(corpus, tmp_path / "out", "--work-dir", small_disk / "work")
    code, _, errors = finish(start(command(*arguments)))
    assert (code, errors.count("\n")) == (1, 1)
    assert errors.startswith("error: stage ")
    assert f"No space left on device; free space for {small_disk}/work/" in errors
    assert not (tmp_path / "out").exists()
    assert list(small_disk.glob("work/*/extract/0*/receipt.json"))
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    code, said, errors = finish(start(command(*arguments)))
    assert (code, errors) == (0, "")
    assert "from an earlier run" in said
    assert contents(tmp_path / "out") == expected


def test_a_full_disk_is_an_error_in_the_output_folder(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, small_disk: Path
) -> None:
    (small_disk / "other").write_bytes(bytes(1_500_000))
    arguments = arguments_for(corpus, tmp_path / "out", "--output", small_disk / "out", "--work-dir", tmp_path / "work")
    code, _, errors = finish(start(command(*arguments)))
    assert (code, errors.count("\n")) == (1, 1)
    assert errors.startswith(("error: output ", "error: "))
    assert f"{small_disk}/" in errors
    assert "No space left on device; free space " in errors
    assert [path.name for path in small_disk.iterdir()] == ["other"]
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    code, said, errors = finish(start(command(*arguments)))
    assert (code, errors) == (0, "")
    assert re.search(r"^write +2/2, 2 from an earlier run", said, re.MULTILINE)
    assert contents(small_disk / "out") == expected


@pytest.mark.parametrize("change", ["grows", "is deleted", "becomes a folder"])
def test_input_that_changes_during_the_run_is_an_error_that_names_it(tmp_path: Path, change: str) -> None:
    rng = random.Random(1)
    for name in "ab":
        write_jsonl(tmp_path / f"in/{name}.jsonl", [document(rng, 300) for _ in range(500)])
    last = tmp_path / "in/b.jsonl"
    with stopped_worker(tmp_path / "in", tmp_path) as (process, worker):
        if change == "grows":
            with open(last, "a") as file:
                file.write('{"text": "more"}\n')
        else:
            last.unlink()
            if change == "becomes a folder":
                last.mkdir()
        os.kill(worker, signal.SIGCONT)
        code, _, errors = finish(process)
    assert (code, errors.count("\n")) == (1, 1)
    assert errors.startswith("error: stage extract, ")
    told = {"grows": "changed while", "is deleted": "No such file", "becomes a folder": "Is a directory"}
    assert f": {last}" in errors
    assert told[change] in errors


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_an_error_that_names_it_and_the_run_goes_on_with_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in/a.jsonl", ["one"])
    secret = write_jsonl(tmp_path / "in/b.jsonl", ["two"])
    secret.chmod(0)
    run = command(*arguments_for(tmp_path / "in", tmp_path / "out"))
    code, _, errors = finish(start(run))
    assert (code, errors.count("\n")) == (1, 1)
    assert errors.startswith("error: stage extract, ")
    assert f": {secret}, reading on from position 0: Permission denied; mend that" in errors
    secret.chmod(0o644)
    code, _, errors = finish(start(run))
    assert (code, errors) == (0, "")
