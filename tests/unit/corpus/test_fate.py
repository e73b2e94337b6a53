"""Finding a document by its id: the fate of every record of a corpus, against what was put in."""

import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megagpt.corpus.fate import Fate, Kept, Removed, Unreadable, find_fates
from megagpt.data import origins
from megagpt.data.indexed import IndexedDataset
from megagpt.errors import UsageError, UserError
from tests.unit.corpus.test_pipeline import run
from tests.unit.corpus.texts import document, edited, write_jsonl


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of lines, rows and a file, with near and exact copies, empty texts and broken lines."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(9)
    texts = [document(rng, 200).strip() for _ in range(30)]
    write_jsonl(folder / "in/a.jsonl", [*texts, edited(texts[0], rng, 2), texts[1], "\x07", texts[2]])
    with open(folder / "in/a.jsonl", "a") as file:
        file.write('broken\n{"text": 1}\n')
    rows = [*(document(rng, 50).strip() for _ in range(5)), None, texts[3]]
    pq.write_table(pa.table({"text": rows}), folder / "in/b.parquet", row_group_size=3)
    (folder / "in/c.txt").write_text(document(rng, 60))
    run(folder, validation_fraction=0.3, max_bad=0.5, execution={"chunk_mb": 0.003})
    return folder


@pytest.fixture
def out(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the dataset, to spoil."""
    return Path(shutil.copytree(corpus / "out", tmp_path / "out"))


def names_of_all(corpus: Path) -> list[str]:
    """The ids of all records, by hand."""
    names, position = [], 0
    for line in (corpus / "in/a.jsonl").read_bytes().splitlines(keepends=True):
        names.append(f"0:{position}")
        position += len(line)
    return [*names, *(f"1:{row}" for row in range(7)), "2:0"]


def text_in(corpus: Path, fate: Fate) -> str:
    """The text that an id stands for, from the input."""
    if fate.id.file == 0:
        return json.loads((corpus / "in/a.jsonl").read_bytes()[fate.id.position :].split(b"\n")[0])["text"]
    if fate.id.file == 1:
        return pq.read_table(corpus / "in/b.parquet")["text"][fate.id.position].as_py()
    return (corpus / "in/c.txt").read_text().strip()


def text_at(kept: Kept) -> str:
    return bytes(IndexedDataset(kept.prefix).document(kept.number)[:-1].tolist()).decode()


@pytest.mark.parametrize("block", [7, origins._BLOCK])
def test_every_record_of_the_input_has_the_fate_that_it_was_made_for(
    corpus: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origins, "_BLOCK", block)
    fates = find_fates(corpus / "out", names_of_all(corpus))
    kept = [fate for fate in fates if isinstance(fate.outcome, Kept)]
    assert [fate.id for fate in kept] == [fates[number].id for number in (*range(30), *range(36, 41), 43)]
    for fate in kept:
        assert isinstance(fate.outcome, Kept)
        assert text_at(fate.outcome) == text_in(corpus, fate)
    assert {Path(fate.outcome.prefix).name for fate in kept if isinstance(fate.outcome, Kept)} == {
        "train",
        "validation",
    }
    for number, stage, original in ((30, "near", 0), (31, "exact", 1), (33, "exact", 2), (42, "exact", 3)):
        outcome = fates[number].outcome
        assert isinstance(outcome, Removed)
        assert (outcome.stage, outcome.survivor, outcome.kept) == (stage, fates[original].id, fates[original].outcome)
        assert outcome.survivor_file == str(corpus / "in/a.jsonl")
    assert fates[32].outcome == Removed("clean", "empty after cleaning", "", None, "", None, None)
    assert [fates[number].outcome for number in (34, 35, 41)] == [
        Unreadable("malformed JSON", "Expecting value at column 1", "line 35"),
        Unreadable("wrong type", "'text' is a number, not a string", "line 36"),
        Unreadable("wrong type", "'text' is null, not a string", "row 5"),
    ]
    assert [Path(fate.file).name for fate in fates[33:37]] == ["a.jsonl"] * 3 + ["b.parquet"]


def test_a_place_where_no_record_begins_has_no_fate(corpus: Path) -> None:
    assert [fate.outcome for fate in find_fates(corpus / "out", ["0:1", "1:7", "2:5"])] == [None] * 3


def test_a_file_is_named_by_its_index_its_path_or_the_end_of_it(corpus: Path, tmp_path: Path) -> None:
    names = ["2:0", f"{corpus}/in/c.txt:0", "c.txt:0", "in/c.txt:0"]
    assert len({fate.id for fate in find_fates(corpus / "out", names)}) == 1
    for name, text in (("c.txt", "one"), ("deep/c.txt", "other")):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_text(text)
    run(tmp_path)
    with pytest.raises(UsageError, match=r"--find c\.txt: 2 of its files end so; give the name of one"):
        find_fates(tmp_path / "out", ["c.txt:0"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("7", "--find 7: not an id; give FILE:POSITION"),
        ("0:x", "--find 0:x: not an id"),
        (":5", "--find :5: not an id"),
        ("0:-1", "--find 0:-1: not an id"),
        ("0:99999999999999999999", "not an id"),
        ("3:0", "sources.jsonl: lists 3 files, numbered from 0; there is no file 3"),
        ("none.txt:0", "--find none.txt: not among its files"),
    ],
)
def test_a_name_that_means_no_file_is_an_error(corpus: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        find_fates(corpus / "out", [name])


def compressed(content: bytes) -> bytes:
    """As the list is written: a frame that does not say how long it is."""
    target = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(target, closefd=False) as writer:
        writer.write(content)
    return target.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"garbage",
        compressed(b'{"id": "0:0", "file": "a"}\n'),
        compressed(b'{"id": "0:0", \n'),
        compressed(b'[1]\n{"id": "9:9"}\n'),
        compressed(b'{"id": "9:9"}'),
        compressed(b'{"id": "9:9"}\n' * 9)[:-3],
        compressed(b'{"id": "9:9"}\n') * 2,
        b"",
    ],
)
def test_a_damaged_list_is_an_error_and_never_an_answer(out: Path, content: bytes) -> None:
    (out / "removed.jsonl.zst").write_bytes(content)
    with pytest.raises(UserError, match=r"out/removed\.jsonl\.zst: not the list that tools\.preprocess wrote; copy it"):
        find_fates(out, ["0:0"])


def test_lists_longer_than_a_block_are_read_whole(out: Path) -> None:
    rng = np.random.default_rng(0)
    line = {"file": "f", "stage": "near", "reason": "r", "survivor": "0:0", "similarity": 0.5}
    details = [rng.bytes(60).hex() for _ in range(6000)]
    lines = [json.dumps({"id": f"0:{5 + number}", **line, "detail": text}) for number, text in enumerate(details)]
    (out / "removed.jsonl.zst").write_bytes(compressed("".join(f"{text}\n" for text in lines).encode()))
    numbers = [0, 1, 2999, 4321, 5999]
    for number, fate in zip(numbers, find_fates(out, [f"0:{5 + number}" for number in numbers]), strict=True):
        assert isinstance(fate.outcome, Removed)
        assert fate.outcome.detail == details[number]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.ids", b"\0" * 13, r"train\.ids: 13 bytes, but \d+ documents take \d+; copy it again"),
        ("train.ids", None, r"train\.ids: no such file; without it documents cannot be found"),
        ("sources.jsonl", None, r"sources\.jsonl: no such file; only datasets made by tools\.preprocess"),
        ("sources.jsonl", b"{}\n", r"sources\.jsonl: not a list of sources; copy it again"),
        ("quarantine.jsonl", None, r"quarantine\.jsonl: cannot be read: No such file"),
        ("quarantine.jsonl", b"a.jsonl\n", None),
        ("removed.jsonl.zst", None, r"removed\.jsonl\.zst: cannot be read: No such file"),
    ],
)
def test_a_list_that_is_missing_or_damaged_is_one_line(
    out: Path, name: str, content: bytes | None, message: str | None
) -> None:
    (out / name).unlink()
    if content is not None:
        (out / name).write_bytes(content)
    if message is None:
        assert find_fates(out, ["0:1"])[0].outcome is None
        return
    with pytest.raises(UserError, match=message):
        find_fates(out, ["0:1"])


def test_nothing_removed_is_a_list_of_nothing(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in/a.jsonl", ["one", "two"])
    run(tmp_path)
    assert all(isinstance(fate.outcome, Kept) for fate in find_fates(tmp_path / "out", ["0:0"]))
