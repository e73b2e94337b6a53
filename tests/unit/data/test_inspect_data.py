"""python -m tools.inspect_data: what it shows, and one line and an exit code for every error a user can cause."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megagpt.data.manifest import FileChecksum, Manifest
from megagpt.data.origins import ORIGIN
from tests.forked import run_module
from tests.unit.corpus.test_pipeline import run as preprocess
from tests.unit.corpus.texts import write_jsonl
from tests.unit.data.reference import index_bytes, write_dataset, write_stream
from tests.unit.data.test_manifest import BYTES, save_manifest

pytestmark = pytest.mark.slow


def inspect(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_module("tools.inspect_data", *arguments)


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


def test_learned_and_masked_tokens_of_a_loss_mask_are_counted(tmp_path: Path) -> None:
    write_stream(tmp_path / "train", 5, longest=1, mask=np.array([0, 1, 0, 1, 1]))
    result = inspect(tmp_path / "train", "--document", 2, "--document", 3, "--verify")
    assert result.returncode == 0, result.stderr
    assert "5 documents, 5 sequences, 5 tokens (uint16), 157 bytes" in result.stdout
    assert "verified: loss mask; 3 learned, 2 masked\n" in result.stdout
    assert "document 2: 1 tokens, 0 learned, 1 masked\n2\n" in result.stdout
    assert "document 3: 1 tokens, 1 learned, 0 masked\n3\n" in result.stdout


def test_a_document_that_only_one_dataset_of_a_folder_has_is_shown(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", [[104], [105]])
    write_dataset(tmp_path / "validation", [[104]])
    result = inspect(tmp_path, "--document", 1)
    assert result.returncode == 0, result.stderr
    assert "document 1: 1 tokens\n105\n" in result.stdout
    assert "document 1: not here, there are 1, numbered from 0" in result.stdout


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A dataset made by the pipeline: two documents in the order of the input, a copy and a broken line."""
    write_jsonl(tmp_path / "in/a.jsonl", ["one", "two", "one"])
    with open(tmp_path / "in/a.jsonl", "a") as file:
        file.write("broken\n")
    preprocess(tmp_path, shuffle=False, validation_fraction=0, max_bad=0.5)
    return tmp_path


def test_a_document_is_found_by_its_id_whatever_became_of_it(corpus: Path) -> None:
    starts = [0, 25, 50, 75]
    assert (corpus / "in/a.jsonl").read_bytes()[75:] == b"broken\n"
    result = inspect(corpus / "out", *(word for start in starts for word in ("--find", f"a.jsonl:{start}")))
    assert (result.returncode, result.stderr) == (0, "")
    name = corpus / "in/a.jsonl"
    assert result.stdout == (
        f"0:0 ({name}): kept, document 0 of train\n  document 0: 4 tokens\none<|endoftext|>\n"
        f"0:25 ({name}): kept, document 1 of train\n  document 1: 4 tokens\ntwo<|endoftext|>\n"
        f"0:50 ({name}): removed by stage exact: same text; in its stead stays 0:0 ({name}), document 0 of train, "
        "similarity 1.0\n"
        f"0:75 ({name}): could not be read: malformed JSON (Expecting value at column 1), line 4\n"
    )


def test_a_document_that_is_not_found_is_an_error_after_those_that_are(corpus: Path) -> None:
    result = inspect(corpus / "out/train", "--find", "0:1", "--find", "0:0", "--tokens", 1)
    assert result.returncode == 1
    assert result.stdout.endswith("kept, document 0 of train\n  document 0: 4 tokens, the first 1:\no\n")
    assert result.stderr.startswith("error: --find 0:1: no document began there; ")
    assert result.stderr.count("\n") == 1


def test_a_document_of_the_dataset_tells_where_it_came_from(corpus: Path) -> None:
    result = inspect(corpus / "out", "--document", 1, "--verify")
    assert result.returncode == 0, result.stderr
    assert f"document 1 (id 0:25, {corpus}/in/a.jsonl): 4 tokens\ntwo" in result.stdout
    assert "verified: every document has an id, and its file is one of 1" in result.stdout


def test_ids_that_do_not_fit_are_an_error_when_the_dataset_is_verified(corpus: Path) -> None:
    ids, sums = corpus / "out/train.ids", json.loads((corpus / "out/manifest.json").read_text())
    sums["checksums"].pop("train.ids")
    (corpus / "out/manifest.json").write_text(json.dumps(sums))
    content = ids.read_bytes()
    for changed, message in (
        (content[:-1], f"{ids}: 23 bytes, but 2 documents take 24; copy it again"),
        (
            np.array([(0, 0), (1, 0)], ORIGIN).tobytes(),
            f"{ids}: names file 1, but sources.jsonl beside it lists 1; copy",
        ),
    ):
        ids.write_bytes(changed)
        result = inspect(corpus / "out", "--verify")
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert message in result.stderr


def test_a_dataset_of_another_program_says_that_it_has_no_ids(dataset: Path) -> None:
    result = inspect(dataset, "--find", "0:0")
    assert result.returncode == 1
    assert f"{dataset}/removed.jsonl.zst: cannot be read: No such file" not in result.stderr
    assert f"{dataset}/sources.jsonl: no such file; only datasets made by tools.preprocess know" in result.stderr


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
