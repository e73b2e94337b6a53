"""The real command makes the same bytes for any number of workers and ranks and any cut into chunks, parts, ranges."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.unit.corpus.test_pipeline import contents, removed_of
from tests.unit.corpus.texts import document, edited, write_jsonl

ROOT = Path(__file__).parents[2]
MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent))

pytestmark = pytest.mark.slow


def run(*command: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of all fates in files of several kinds, and two configurations with all options on."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(7)
    texts = [document(rng, rng.choice([3, 20, 60, 200])) for _ in range(500)]
    texts += [edited(text, rng, 1) for text in texts[:200] if len(text) > 300]
    texts += texts[100:160] * 2
    rng.shuffle(texts)
    write_jsonl(folder / "in/a.jsonl", texts[:300])
    write_jsonl(folder / "in/b.jsonl", texts[300:600])
    with open(folder / "in/b.jsonl", "a") as file:
        file.write('broken\n{"text": 1}\n')
    (folder / "in/c.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts[600:]).encode())
    )
    for number in range(30):
        (folder / f"in/{number}.txt").write_text(document(rng, 50))
    (folder / "in/empty.txt").write_text("")
    for name, shuffle in (("shuffled", True), ("ordered", False)):
        options = {
            "input": [str(folder / "in")],
            "tokenizer": "bytes",
            "max_bad": 0.1,
            "shuffle": shuffle,
            "seed": 3,
            "validation_fraction": 0.1,
            "splits": {"test": 0.1},
            "dedup": {"verification": "exact", "threshold": 0.7, "shingle_size": 3},
            "filter": {"enabled": True, "min_words": 10, "min_stop_words": None, "max_top_2gram": None},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(options))
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path) -> dict[str, dict[str, bytes]]:
    """What one worker makes of each configuration, with parts larger than the corpus."""
    results = {}
    for name in ("shuffled", "ordered"):
        output = corpus / "expected" / name
        result = run(
            sys.executable,
            "-m",
            "tools.preprocess",
            "--config",
            corpus / f"{name}.yaml",
            "--output",
            output,
            "--workers",
            1,
        )
        assert (result.returncode, result.stderr) == (0, "")
        results[name] = contents(output)
    assert {line["stage"] for line in removed_of(corpus / "expected/shuffled")} == {"filter", "exact", "near"}
    assert len({path for files in results.values() for path in files}) == 13
    return results


def small_parts(corpus: Path, name: str, output: Path, chunk_mb: float, *more: object) -> list[object]:
    options = yaml.safe_load((corpus / f"{name}.yaml").read_text()) | {"execution": {"chunk_mb": chunk_mb}}
    config = output.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(options))
    return [sys.executable, "-m", "tests.distributed.small_parts", "--config", config, "--output", output, *more]


@pytest.mark.parametrize(
    ("name", "workers", "chunk_mb"),
    [("shuffled", 1, 1.0), ("shuffled", 2, 0.02), ("shuffled", 5, 0.1), ("ordered", 2, 0.05)],
)
def test_neither_workers_nor_the_cut_change_a_byte(
    corpus: Path, expected: dict[str, dict[str, bytes]], tmp_path: Path, name: str, workers: int, chunk_mb: float
) -> None:
    result = run(*small_parts(corpus, name, tmp_path / "out", chunk_mb, "--workers", workers, "--keep-work"))
    assert (result.returncode, result.stderr) == (0, "")
    work = next((tmp_path / "out.work").iterdir())
    parts, chunks, ranges, writes = (
        len(list(work.glob(pattern))) for pattern in ("extract/*/part_*", "extract/*", "exact/*", "write/*")
    )
    assert parts > chunks or chunk_mb < 0.05
    assert min(parts, ranges, writes - 3) >= 3
    assert any(path.name.endswith("00001") for path in work.glob("bands/*/pairs.*"))
    assert contents(tmp_path / "out") == expected[name]


@pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec beside python: pip install 'megagpt[mpi]'")
@pytest.mark.parametrize(("ranks", "chunk_mb"), [(1, 0.1), (2, 0.05), (4, 0.02)])
def test_neither_ranks_nor_the_cut_change_a_byte(
    corpus: Path, expected: dict[str, dict[str, bytes]], tmp_path: Path, ranks: int, chunk_mb: float
) -> None:
    command = small_parts(corpus, "shuffled", tmp_path / "out", chunk_mb, "--executor", "mpi")
    result = run(MPIEXEC, "-n", ranks, *command)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "out") == expected["shuffled"]
