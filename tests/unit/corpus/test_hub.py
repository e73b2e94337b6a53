"""Data sets of the Hugging Face hub: streamed, in pieces, and a clear error within seconds when that cannot be."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megagpt.corpus.sources import SourceFile
from tests.unit.corpus.hub_server import COMMIT, Hub, serving

ROOT = Path(__file__).parents[3]
READ = """
import json, sys, time
import datasets
from megagpt.corpus.finding import find_files
from megagpt.corpus.plan import cut_into_chunks
from megagpt.corpus.reading import read_piece
from megagpt.corpus.records import ReadCount
from megagpt.errors import UserError
for name in sys.argv[1:-1]:
    start = time.monotonic()
    try:
        files = find_files([name])
        pieces = [piece for chunk in cut_into_chunks(files, int(sys.argv[-1])) for piece in chunk.pieces]
        records = [record for piece in pieces for record in read_piece(piece, "text", ReadCount())]
        texts = [getattr(record, "text", str(record)) for record in records]
        print(json.dumps({"files": [file.name for file in files], "pieces": len(pieces), "texts": texts}))
    except UserError as error:
        print(json.dumps({"error": str(error), "seconds": time.monotonic() - start}))
"""
README = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/train-*.jsonl
  - split: test
    path: small/test.jsonl
- config_name: large
  data_files: large/*.parquet
---
"""

pytestmark = pytest.mark.slow


def lines(name: str, count: int) -> bytes:
    return b"".join(json.dumps({"text": f"{name} {number} {'x' * 500}"}).encode() + b"\n" for number in range(count))


def parquet(name: str, count: int) -> bytes:
    stream = io.BytesIO()
    column = [f"{name} {number} {os.urandom(2000).hex()}" for number in range(count)]
    pq.write_table(pa.table({"other": [os.urandom(4000) for _ in column], "text": column}), stream, row_group_size=100)
    return stream.getvalue()


REPOSITORIES: dict[str, dict[str, bytes]] = {
    "org/json": {"a/train.json": lines("json", 3)},
    "org/plain": {"train.jsonl": lines("train", 3000), "test.jsonl": lines("test", 3), "README.md": b"# Plain\n"},
    "org/configs": {
        "README.md": README.encode(),
        "small/train-0.jsonl": lines("small 0", 2),
        "small/train-1.jsonl": lines("small 1", 2),
        "small/test.jsonl": lines("small test", 1),
        "large/0.parquet": parquet("large", 3000),
    },
    "org/script": {"script.py": b"import datasets\n", "README.md": b"# Made by a script\n"},
    "org/images": {"train/a.png": b"\x89PNG", "train/b.png": b"\x89PNG", "README.md": b"# Pictures\n"},
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(REPOSITORIES) as hub:
        yield hub


def read(
    hub: Hub | None, tmp_path: Path, name: str, chunk_bytes: int = 1 << 30, environment: Mapping[str, str] = {}
) -> dict[str, Any]:
    """What a process of its own reads of an input."""
    (found,) = read_each(hub, tmp_path, [name], chunk_bytes, environment)
    return found


def read_each(
    hub: Hub | None,
    tmp_path: Path,
    inputs: Sequence[str],
    chunk_bytes: int = 1 << 30,
    environment: Mapping[str, str] = {},
) -> list[dict[str, Any]]:
    """What a process of its own reads of each input (the libraries take the hub's address when they are imported)."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    variables |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    variables["HF_ENDPOINT"] = hub.url if hub else "http://127.0.0.1:9"  # where nothing listens
    command = [sys.executable, "-c", READ, *inputs, str(chunk_bytes)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def texts_of(content: bytes) -> list[str]:
    return [json.loads(line)["text"] for line in content.splitlines()]


def test_a_data_set_of_lines_is_read_in_pieces_at_one_commit_its_split_train_by_default(
    hub: Hub, tmp_path: Path
) -> None:
    expected = texts_of(REPOSITORIES["org/plain"]["train.jsonl"])
    found, test, other = read_each(hub, tmp_path, ["hf:org/plain", "hf:org/plain:test", "hf:org/json"], 200_000)
    assert found["texts"] == expected
    assert found["pieces"] > 5
    assert found["files"] == [f"hf://datasets/org/plain@{COMMIT}/train.jsonl"]
    assert test["texts"] == texts_of(REPOSITORIES["org/plain"]["test.jsonl"])
    assert list((tmp_path / "home").rglob("*.jsonl")) == []
    assert other["texts"] == texts_of(REPOSITORIES["org/json"]["a/train.json"])


def test_of_a_parquet_file_the_chosen_column_is_streamed_by_row_groups(hub: Hub, tmp_path: Path) -> None:
    content = REPOSITORIES["org/configs"]["large/0.parquet"]
    found = read(hub, tmp_path, "hf:org/configs:large", chunk_bytes=len(content) // 4)
    assert found["texts"] == pq.read_table(io.BytesIO(content))["text"].to_pylist()
    assert found["pieces"] > 3
    assert max(stop - start for _, start, stop in hub.ranges) <= 8 << 20


def test_configurations_and_splits_are_chosen_by_name_and_a_wrong_name_is_told_those_there_are(
    hub: Hub, tmp_path: Path
) -> None:
    files = REPOSITORIES["org/configs"]
    both = texts_of(files["small/train-0.jsonl"]) + texts_of(files["small/train-1.jsonl"])
    default = "there is no default configuration; choose one of small, large, as in hf:org/configs:small"
    wrong = {
        "hf:org/configs": default,
        "hf:org/configs:huge:train": "there is no configuration 'huge'; choose one of small, large",
        "hf:org/configs:small:dev": "there is no split 'dev' of configuration 'small'; choose one of train, test",
        "hf:org/plain:dev": "there is no split 'dev'; choose one of train, test",
        "hf:a:b:c:d": "is not of the form hf:NAME",
    }
    train, test, *errors = read_each(hub, tmp_path, ["hf:org/configs:small", "hf:org/configs:small:test", *wrong])
    assert train["texts"] == both
    assert test["texts"] == texts_of(files["small/test.jsonl"])
    for message, found in zip(wrong.values(), errors, strict=True):
        assert message in found["error"]


def test_what_cannot_be_read_as_text_is_one_error(hub: Hub, tmp_path: Path) -> None:
    wrong = {
        "hf:org/nothing": "the hub has no such dataset; check the name",
        "hf:org/script": "cannot be read from the hub: Dataset scripts are no longer supported",
        "hf:org/images": "its files are of the kind imagefolder; only json, parquet",
    }
    for (name, message), found in zip(wrong.items(), read_each(hub, tmp_path, list(wrong)), strict=True):
        assert f"input {name}: {message}" in found["error"]
        assert "\n" not in found["error"]


@pytest.mark.parametrize("offline", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_the_error_comes_at_once_and_says_what_to_do(tmp_path: Path, offline: dict[str, str]) -> None:
    found = read(None, tmp_path, "hf:org/plain", environment=offline)
    assert found["seconds"] < 10
    assert "input hf:org/plain: the Hugging Face hub cannot be reached" in found["error"]
    assert "hf download org/plain --repo-type dataset --local-dir FOLDER" in found["error"]


def test_a_connection_that_breaks_once_is_tried_again_and_one_that_stays_broken_ends_within_seconds(
    hub: Hub, tmp_path: Path
) -> None:
    hub.breaks_at, hub.breaks_left = 1_000_000, 1
    assert read(hub, tmp_path, "hf:org/plain")["texts"] == texts_of(REPOSITORIES["org/plain"]["train.jsonl"])
    assert hub.breaks_left == 0
    hub.breaks_left = 10**9
    for found in read_each(hub, tmp_path, ["hf:org/plain", "hf:org/configs:large"]):
        assert found["seconds"] < 12
        assert f"@{COMMIT}/" in found["error"]
        assert re.search(r"bytes \d+ to \d+ cannot be read from the hub: ", found["error"])
        assert "run the same command again to go on" in found["error"]


def test_a_run_that_the_network_ended_is_continued_by_the_same_command(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("execution: {chunk_mb: 0.2, workers: 1}\ndedup: {method: exact}\n")
    arguments = ("--config", "config.yaml", "--input", "hf:org/plain", "--tokenizer", "bytes", "--output")
    whole = preprocess(hub, tmp_path, *arguments, "whole")
    assert (whole.returncode, whole.stderr) == (0, "")
    hub.breaks_at = 1_000_000
    broken = preprocess(hub, tmp_path, *arguments, "out")
    assert broken.returncode == 1
    assert re.search(rf"^error: .*hf://datasets/org/plain@{COMMIT}/train.jsonl.* bytes \d+ to", broken.stderr, re.M)
    assert "Traceback" not in broken.stderr
    hub.breaks_at = None
    again = preprocess(hub, tmp_path, *arguments, "out")
    assert (again.returncode, again.stderr) == (0, "")
    assert "from an earlier run" in again.stdout
    for name in ("train.bin", "train.idx", "validation.bin", "validation.idx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def preprocess(hub: Hub, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command, run in `folder`."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    variables |= {"HF_HOME": str(folder / "home"), "HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tools.preprocess", *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)


def test_the_commit_is_what_tells_a_file_from_itself_before_a_change() -> None:
    one, other = (SourceFile(f"hf://datasets/a@{commit}/b.jsonl.gz", 1, 0, False) for commit in "12")
    assert one.identity != other.identity
    assert (one.kind, one.compression, one.is_on_hub) == ("jsonl", "gzip", True)
