"""python -m tools.inspect_data: what it shows, and one line and an exit code for every error a user can cause."""

import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.data.manifest import FileChecksum, Manifest
from tests.unit.data.reference import index_bytes, write_dataset
from tests.unit.data.test_manifest import BYTES, save_manifest

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


def inspect(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.inspect_data", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two documents of text under the tokenizer `bytes`, with a manifest."""
    write_dataset(tmp_path / "train", [[*BYTES.encode(text), BYTES.eod_id] for text in ("Hello wörld", "x" * 500)])
    save_manifest(tmp_path / "train")
    return tmp_path


def test_counts_lengths_origin_and_decoded_documents_are_shown(dataset: Path) -> None:
    result = inspect(dataset / "train", "--document", 0, "--document", 1, "--tokens", 50, "--verify")
    assert result.returncode == 0, result.stderr
    assert "2 documents, 2 sequences, 514 tokens (uint16), 1,110 bytes" in result.stdout
    assert "shortest 13, 10% 13, median 13, 90% 13, 99% 13, longest 501, mean 257.0" in result.stdout
    assert "tokenizer: bytes, 257 ids, end of document 256" in result.stdout
    assert "plan: c0ffee" in result.stdout
    assert "token ids are 32 to 256" in result.stdout
    assert "all files of the folder agree with the manifest's checksums" in result.stdout
    assert "document 0: 13 tokens\nHello wörld" in result.stdout
    assert "document 1: 501 tokens, the first 50:\n" + "x" * 50 + "\n" in result.stdout


def test_a_folder_shows_all_its_datasets_and_foreign_ones_show_ids_or_are_decoded_on_request(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write_dataset(tmp_path / name, [[104, 105]])
    result = inspect(tmp_path, "--document", 0, "--verify")
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path}/train\n" in result.stdout
    assert f"{tmp_path}/validation\n" in result.stdout
    assert result.stdout.count("document 0: 2 tokens\n104 105\n") == 2
    assert "no manifest describes this dataset" in result.stdout
    assert (
        "document 0: 2 tokens\nhi\n" in inspect(tmp_path / "train.bin", "--document", 0, "--tokenizer", "bytes").stdout
    )


def test_a_document_that_only_one_dataset_of_a_folder_has_is_shown(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", [[104], [105]])
    write_dataset(tmp_path / "validation", [[104]])
    result = inspect(tmp_path, "--document", 1)
    assert result.returncode == 0, result.stderr
    assert "document 1: 1 tokens\n105\n" in result.stdout
    assert "document 1: not here, there are 1, numbered from 0" in result.stdout


def test_help_shows_an_example_that_names_existing_options() -> None:
    result = inspect("--help")
    assert result.returncode == 0
    assert "python -m tools.inspect_data data/corpus/train --document 0" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{}/absent"], 1, "{}/absent.idx: no such file; a dataset is named by its prefix"),
        (["{}/empty"], 1, "{}/empty: no .idx file in this folder; name a dataset's folder or its prefix"),
        (
            ["{}/damaged"],
            1,
            "{}/damaged.idx: truncated: 50 bytes, but 1 sequences and 1 documents take 62; copy it again",
        ),
        (["{}/gap", "--verify"], 1, "{}/gap.idx: sequence 1: 1 tokens at byte 4, but the sequences before it end at"),
        (["{}/changed/train", "--verify"], 1, "{}/changed/train.bin: 4 bytes with xxh3_128 "),
        (["{}/wide/train", "--verify"], 1, "{}/wide/train.bin: token ids 1 to 500, but tokenizer bytes has 257; make"),
        (["{}/changed", "--document", "1"], 2, "--document 1: {}/changed/train has 1 documents, numbered from 0"),
        (["{}/report", "--verify"], 1, "{}/report/report.txt: 3 bytes with xxh3_128 "),
        (["{}/lost", "--verify"], 1, "{}/lost/report.txt: cannot be read: No such file"),
        (["{}/copy", "--document", "0"], 1, "{}/copy/own.tiktoken: no such file; it is the copy of tokenizer bytes"),
        (["{}/back"], 1, "{}/back.idx: document 1 ends before it begins; the index is damaged, copy it again"),
        (["{}/back", "--verify"], 1, "{}/back.idx: document 2 begins at sequence 1, before document 1"),
        (["{}/folder/train"], 1, "{}/folder/manifest.json: cannot be read: Is a directory"),
        (["{}/deep/train"], 1, "{}/deep/manifest.json: not valid JSON"),
        (["{}/train", "--document", "2"], 2, "--document 2: {}/train has 2 documents, numbered from 0"),
        (["{}/train", "--document", "-1"], 2, "--document -1: {}/train has 2 documents, numbered from 0"),
        (["{}/train", "--document", "0", "--tokenizer", "gtp2"], 2, "gtp2"),
        (["{}/train", "--tokens", "0"], 2, "Invalid value for '--tokens'"),
        (["{}/train", "--documents", "0"], 2, "No such option"),
        ([], 2, "Missing argument"),
    ],
)
def test_every_user_error_is_one_line_with_its_exit_code(
    dataset: Path, arguments: list[str], code: int, message: str
) -> None:
    (dataset / "empty").mkdir()
    (dataset / "damaged.idx").write_bytes(index_bytes([1], [0], [0, 1])[:50])
    (dataset / "damaged.bin").write_bytes(bytes(2))
    (dataset / "gap.idx").write_bytes(index_bytes([1, 1], [0, 4], [0, 1, 2]))
    (dataset / "gap.bin").write_bytes(bytes(6))
    (dataset / "back.idx").write_bytes(index_bytes([1, 1, 1], [0, 2, 4], [0, 2, 1, 3]))
    (dataset / "back.bin").write_bytes(bytes(6))
    for name in ("changed", "report", "lost", "copy", "folder", "deep"):
        write_dataset(dataset / name / "train", [[1, 2]])
        save_manifest(dataset / name / "train")
    write_dataset(dataset / "wide/train", [[1, 500]])
    save_manifest(dataset / "wide/train")
    for name in ("report", "lost"):
        (dataset / name / "report.txt").write_text("old")
        manifest = Manifest.load(dataset / name)
        assert manifest
        checksums = {**manifest.checksums, "report.txt": FileChecksum.of(dataset / name / "report.txt")}
        manifest.model_copy(update={"checksums": checksums}).save(dataset / name)
    (dataset / "report/report.txt").write_text("new")
    (dataset / "lost/report.txt").unlink()
    save_manifest(dataset / "copy/train", file="own.tiktoken")
    (dataset / "folder/manifest.json").unlink()
    (dataset / "folder/manifest.json").mkdir()
    (dataset / "deep/manifest.json").write_text("[" * 100_000)
    (dataset / "changed" / "train.bin").write_bytes(b"\1\0\3\0")
    result = inspect(*(argument.format(dataset) for argument in arguments))
    assert result.returncode == code
    assert result.stderr.startswith("error: ")
    assert message.format(dataset) in result.stderr
    assert len(result.stderr.splitlines()) == 1
