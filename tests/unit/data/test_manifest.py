"""The manifest: read as written, garbage refused, and every disagreement with the files named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagpt.data.indexed import IndexedDataset
from megagpt.data.manifest import FileChecksum, Manifest, SplitInfo, TokenizerInfo, common_tokenizer
from megagpt.errors import UsageError, UserError
from megagpt.tokenizer import load_tokenizer
from tests.unit.data.reference import write_dataset, write_stream

BYTES = load_tokenizer("bytes")


def save_manifest(prefix: Path, **changes: Any) -> Manifest:
    """Write a manifest for the dataset at `prefix`: tokenizer `bytes`, with changes to its fields."""
    dataset = IndexedDataset(prefix)
    tokenizer = TokenizerInfo(
        name="bytes", vocab_sha256=BYTES.vocab_sha256, vocab_size=BYTES.vocab_size, eod_id=BYTES.eod_id
    )
    split = SplitInfo(documents=dataset.num_documents, sequences=len(dataset), tokens=dataset.num_tokens)
    files = [Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx")]
    manifest = Manifest(
        tokenizer=tokenizer.model_copy(update=changes),
        splits={prefix.name: split},
        checksums={file.name: FileChecksum.of(file) for file in files},
        counts={"documents read": 3},
        config={"seed": 0},
        plan_hash="c0ffee",
    )
    manifest.save(prefix.parent)
    return manifest


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", [[1, 2], [3]])
    saved = save_manifest(tmp_path / "train")
    assert Manifest.load(tmp_path) == Manifest.of(IndexedDataset(tmp_path / "train")) == saved
    assert json.loads((tmp_path / "manifest.json").read_text())["splits"] == {
        "train": {"documents": 2, "sequences": 2, "tokens": 3}
    }
    assert not (tmp_path / "manifest.json.tmp").exists()


def test_a_checksum_is_the_published_hash_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    # XXH3_128bits of nothing with seed 0, as xxhash's own specification tests have it.
    assert FileChecksum.of(tmp_path / "file") == FileChecksum(size=0, xxh3_128="99aa06d3014798d86001c324468d497f")


def test_datasets_of_other_programs_have_no_manifest(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", [[1]])
    assert Manifest.load(tmp_path) is None
    assert Manifest.of(IndexedDataset(tmp_path / "train")) is None
    save_manifest(tmp_path / "train")
    write_dataset(tmp_path / "other", [[1]])
    assert Manifest.of(IndexedDataset(tmp_path / "other")) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON (Expecting property name"),
        (b"\xff\xfe", "not valid JSON ("),
        (b"[1]", "not a dataset manifest: the whole file: "),
        (b"{}", "not a dataset manifest: tokenizer: Field required; copy the dataset again"),
        (
            b'{"format_version": 2, "anything": 1}',
            "format_version 2 is not known here, 1 is the newest; update MegaGPT",
        ),
        (b'{"format_version": "1.0"}', "not a dataset manifest: format_version: Input should be 1"),
    ],
)
def test_what_is_no_manifest_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        Manifest.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/manifest.json: {message}")
    assert "\n" not in str(caught.value)


def test_files_that_do_not_belong_to_the_manifest_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", [[1, 2], [3]])
    save_manifest(tmp_path / "train")
    write_dataset(tmp_path / "train", [[1, 2, 3]])
    with pytest.raises(UserError) as caught:
        Manifest.of(IndexedDataset(tmp_path / "train"))
    assert str(caught.value) == (
        f"{tmp_path}/train.idx: holds 1 documents, 1 sequences, 3 tokens, but manifest.json beside it says 2, 2, 3; "
        "copy the whole dataset again"
    )


def test_a_loss_mask_that_was_not_copied_with_its_dataset_is_missed(tmp_path: Path) -> None:
    write_stream(tmp_path / "train", 3, mask=np.array([0, 1, 1]))
    manifest = save_manifest(tmp_path / "train")
    checksums = {**manifest.checksums, "train.mask": FileChecksum.of(tmp_path / "train.mask")}
    manifest.model_copy(update={"checksums": checksums}).save(tmp_path)
    assert Manifest.of(IndexedDataset(tmp_path / "train")) is not None
    (tmp_path / "train.mask").unlink()
    with pytest.raises(
        UserError, match=r"train\.mask: no such file, but manifest\.json beside it lists it; copy the who"
    ):
        Manifest.of(IndexedDataset(tmp_path / "train"))


def test_a_manifest_of_many_datasets_is_read_once_for_all_of_them(tmp_path: Path, monkeypatch) -> None:
    """Or a thousand datasets of one folder would take half a minute."""
    prefixes = [write_dataset(tmp_path / str(number), [[1]]) for number in range(3)]
    splits = {str(number): SplitInfo(documents=1, sequences=1, tokens=1) for number in range(3)}
    saved = save_manifest(tmp_path / "0").model_copy(update={"splits": splits})
    saved.save(tmp_path)
    loaded, load = [], Manifest.load
    monkeypatch.setattr(Manifest, "load", lambda folder: loaded.append(folder) or load(folder))
    assert common_tokenizer([IndexedDataset(prefix) for prefix in prefixes]) == saved.tokenizer
    assert loaded == [tmp_path]


def test_one_changed_token_is_found_by_the_checksums(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", [[1, 2], [3]])
    manifest = save_manifest(tmp_path / "train")
    manifest.verify_files(tmp_path)
    write_dataset(tmp_path / "train", [[1, 2], [4]])
    with pytest.raises(
        UserError, match=r"train\.bin: 6 bytes with xxh3_128 [0-9a-f]{32}, but manifest\.json .* again$"
    ):
        manifest.verify_files(tmp_path)


def test_the_tokenizer_is_found_by_name_or_copy_and_its_vocabulary_is_checked(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", [[1]])
    assert save_manifest(tmp_path / "train").load_tokenizer(tmp_path).decode([104, 105]) == "hi"
    other = save_manifest(tmp_path / "train", vocab_sha256="0" * 64)
    with pytest.raises(
        UserError, match=r"the vocabulary of tokenizer bytes has sha256 \w{12}\.\.\., the dataset was ma"
    ):
        other.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"own\.tiktoken"):
        save_manifest(tmp_path / "train", file="own.tiktoken").load_tokenizer(tmp_path)


def test_one_tokenizer_must_fit_all_datasets_and_the_model(tmp_path: Path) -> None:
    datasets = []
    for name, changes in (("a", {}), ("b", {"name": "else", "vocab_sha256": "1" * 64}), ("foreign", None)):
        datasets.append(IndexedDataset(write_dataset(tmp_path / name / "train", [[1]])))
        if changes is not None:
            save_manifest(tmp_path / name / "train", **changes)
    own, other, foreign = datasets
    info = common_tokenizer([foreign, own, foreign, own], vocab_size=257)
    assert info
    assert (info.name, info.vocab_size) == ("bytes", 257)
    assert common_tokenizer([foreign]) is None
    with pytest.raises(UsageError) as caught:
        common_tokenizer([own, foreign, other])
    assert str(caught.value) == (
        f"{tmp_path}/b/train: made with tokenizer else (111111111111...), but {tmp_path}/a/train with bytes "
        f"({BYTES.vocab_sha256[:12]}...); use datasets of one tokenizer"
    )
    with pytest.raises(UsageError) as caught:
        common_tokenizer([own], vocab_size=256)
    assert str(caught.value) == (
        f"{tmp_path}/a/train: its tokenizer bytes has 257 ids, but the model knows 256; set model.vocab_size to 257 or "
        "more, or choose another dataset"
    )
