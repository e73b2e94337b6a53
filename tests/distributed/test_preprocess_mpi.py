"""Preprocessing under MPI: the same bytes as local processes, and no rank that waits for another for ever."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.corpus.test_pipeline import contents
from tests.unit.corpus.texts import document, edited, write_jsonl

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MPIEXEC = shutil.which("mpiexec", path=str(BIN))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec beside python: pip install 'megagpt[mpi]'"),
]


def run(*command: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | variables
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def preprocess(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "tools.preprocess", *arguments, "--tokenizer", "bytes"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(2)
    texts = [document(rng, 200) for _ in range(400)]
    write_jsonl(folder / "a.jsonl", [*texts, *(edited(text, rng, 1) for text in texts[:100])])
    return folder


@pytest.fixture(scope="module")
def local(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What two processes of one machine make of it."""
    folder = tmp_path_factory.mktemp("local") / "out"
    done = run(*preprocess("--input", corpus, "--output", folder, "--workers", 2))
    assert (done.returncode, done.stderr) == (0, "")
    return contents(folder)


def test_ranks_make_the_bytes_of_local_processes(corpus: Path, local: dict[str, bytes], tmp_path: Path) -> None:
    """Other numbers of ranks: test_preprocess_bytes.py."""
    (tmp_path / "config.yaml").write_text("execution: {chunk_mb: 0.05}\n")
    arguments = ("--config", tmp_path / "config.yaml", "--input", corpus, "--output", tmp_path / "mpi")
    mpi = run(MPIEXEC, "-n", 3, *preprocess(*arguments, "--executor", "mpi"))
    assert mpi.returncode == 0, mpi.stderr
    assert contents(tmp_path / "mpi") == local
    assert mpi.stdout.count("documents in") == 1


def test_an_error_is_told_once_and_first_and_ends_all_ranks(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\nbroken\n')
    start = time.monotonic()
    arguments = ("--input", tmp_path / "bad.jsonl", "--output", tmp_path / "out", "--executor", "mpi")
    result = run(MPIEXEC, "-n", 3, *preprocess(*arguments))
    assert time.monotonic() - start < 30
    assert result.returncode == 1
    assert result.stderr.startswith("error: 1 of 2 documents cannot be read")
    assert result.stderr.count("error: 1 of 2") == 1
    assert not (tmp_path / "out").exists()


def test_a_killed_rank_ends_the_run_within_seconds_and_the_same_command_goes_on(
    corpus: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("execution: {chunk_mb: 0.02}\n")
    common = (
        "--config",
        tmp_path / "config.yaml",
        "--input",
        corpus,
        "--output",
        tmp_path / "out",
        "--executor",
        "mpi",
    )
    command = list(map(str, (MPIEXEC, "-n", 3, *preprocess(*common))))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    working: list[Path] = []
    while not working and process.poll() is None:
        working = list(tmp_path.glob("out.work/*/*/.0*"))
    os.kill(int(working[0].name.rpartition(".")[2]), signal.SIGKILL)
    assert process.wait(timeout=10) != 0
    assert not (tmp_path / "out").exists()
    result = run(*command)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out") == local


def test_ranks_that_do_not_see_each_other_are_an_error_that_says_how_to_start(corpus: Path, tmp_path: Path) -> None:
    arguments = ("--input", corpus, "--output", tmp_path / "out", "--executor", "mpi")
    result = run(*preprocess(*arguments), SLURM_STEP_NUM_TASKS="4")
    assert result.returncode == 1
    assert "the launcher started 4 processes, but MPI sees only one" in result.stderr
    assert "srun --mpi=pmi2" in result.stderr


def test_without_a_launcher_one_process_does_the_work(corpus: Path, tmp_path: Path) -> None:
    result = run(*preprocess("--input", corpus, "--output", tmp_path / "out", "--executor", "mpi"))
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "out/train.bin").exists()
