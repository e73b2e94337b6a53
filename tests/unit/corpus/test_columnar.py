"""Parquet and Arrow: every row comes out once with its number, wherever the file is cut, and damage is named."""

import io
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus.finding import find_files
from megagpt.corpus.plan import cut_into_chunks
from megagpt.corpus.reading import read_piece
from megagpt.corpus.records import BadRecord, Document, ReadCount
from megagpt.errors import UserError
from tests.unit.corpus.test_reading import GOOD_TEXT, read, texts

BAD_ROWS = [(None, "wrong type"), ("", "empty"), (" \n", "empty"), ("a\0b", "NUL character")]
KINDS = ["parquet", "feather", "arrow"]


def write(path: Path, column: Any, rows_at_once: int = 10) -> Path:
    """A file with columns `id` and `text`, in row groups or record batches of this many rows."""
    column = column if isinstance(column, pa.Array) else pa.array(column, pa.string())
    table = pa.table({"id": range(len(column)), "text": column})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows_at_once)
    else:
        open_writer = pa.ipc.new_file if path.suffix == ".feather" else pa.ipc.new_stream
        with open_writer(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=rows_at_once)
    return path


def outcomes(records: list[Document | BadRecord]) -> list[tuple[int, str]]:
    return [(record.position, record.text if isinstance(record, Document) else record.reason) for record in records]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(GOOD_TEXT.map(lambda text: (text, text)) | st.sampled_from(BAD_ROWS), max_size=30),
    st.integers(1, 8),
    st.integers(1, 500),
)
def test_every_row_comes_out_once_in_order_with_its_number_wherever_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, kind: str, rows: list[Any], rows_at_once: int, chunk_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("columnar") / f"a.{kind}"
    write(path, [text for text, _ in rows], rows_at_once)
    assert outcomes(read(path, chunk_bytes)) == [(row, outcome) for row, (_, outcome) in enumerate(rows)]


def test_a_parquet_file_is_cut_into_pieces_that_have_about_as_many_rows_each(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [f"document {i}" for i in range(400)], rows_at_once=5)
    chunks = cut_into_chunks(find_files([str(path)]), path.stat().st_size // 3 + 1)
    rows = [len(list(read_piece(piece, "text", ReadCount()))) for chunk in chunks for piece in chunk.pieces]
    assert len(rows) == 3
    assert max(rows) - min(rows) <= 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to_type", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_type_of_string_column_is_read(tmp_path: Path, kind: str, to_type: Any) -> None:
    column = pa.array(["one", "two", "one"]).cast(to_type)
    assert texts(read(write(tmp_path / f"a.{kind}", column))) == ["one", "two", "one"]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_not_utf8_are_a_bad_record_of_their_row_alone(tmp_path: Path, kind: str) -> None:
    column = pa.array([b"one", b"caf\xe9", b"three"]).view(pa.string())
    records = read(write(tmp_path / f"a.{kind}", column))
    assert outcomes(records) == [(0, "one"), (1, "invalid UTF-8"), (2, "three")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_or_wrong_column_is_one_bad_record_that_names_those_there_are(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"a.{kind}", ["one"] * 50)
    chunk_bytes = path.stat().st_size // 3
    missing = "no column 'content' among 'id', 'text'; choose the column with --text-key"
    assert read(path, chunk_bytes, "content") == [BadRecord(0, None, "missing column", missing)]
    wrong = "column 'id' is int64, not string; choose one of 'id', 'text' with --text-key"
    assert read(path, chunk_bytes, "id") == [BadRecord(0, None, "wrong type", wrong)]


def test_a_field_of_another_column_is_not_taken_for_the_column(tmp_path: Path) -> None:
    table = pa.table({"meta": [{"text": "wrong"}] * 3, "text": ["one", "two", "three"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts(read(tmp_path)) == ["one", "two", "three"]


def test_folders_that_datasets_saved_give_the_rows_of_their_data_files_alone(tmp_path: Path) -> None:
    train = datasets.Dataset.from_dict({"text": [f"train {i}" for i in range(25)]})
    test = datasets.Dataset.from_dict({"text": [f"test {i}" for i in range(5)]})
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "saved", num_shards={"train": 2})
    write(tmp_path / "saved/train/cache-0123.arrow", ["a column that map() made"])
    assert [os.path.relpath(file.name, tmp_path / "saved") for file in find_files([str(tmp_path / "saved")])] == [
        "test/data-00000-of-00001.arrow",
        "train/data-00000-of-00002.arrow",
        "train/data-00001-of-00002.arrow",
    ]
    assert texts(read(tmp_path / "saved", chunk_bytes=100)) == [*test["text"], *train["text"]]
    entries: list[dict[str, object]] = [{"filename": name} for name in (5, "", "a\0", "../a")]
    for damaged in ({}, [5], *({"_data_files": [entry]} for entry in entries)):
        (tmp_path / "saved/train/state.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"train/state\.json: is not as datasets\.save_to_disk writes it"):
            find_files([str(tmp_path / "saved")])


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_whose_name_is_not_utf8_is_read(tmp_path: Path, kind: str) -> None:
    path = os.fsencode(write(tmp_path / f"a.{kind}", ["one"]))
    os.rename(path, name := path.replace(b"a.", b"caf\xe9."))
    assert texts(read(os.fsdecode(name))) == ["one"]


@pytest.mark.parametrize(
    "content", [b"garbage" * 100, b"PAR1", b"PAR1" + b"x" * 200 + b"PAR1", b"ARROW1" + b"\xff" * 99]
)
@pytest.mark.parametrize("kind", KINDS)
def test_garbage_is_one_bad_record_wherever_it_is_cut(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content)
    assert outcomes(read(path, chunk_bytes=50)) == [(0, "damaged file")]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_file_is_named_and_one_without_rows_is_no_problem(tmp_path: Path, kind: str) -> None:
    assert read(write(tmp_path / f"a.{kind}", [])) == []
    (tmp_path / f"b.{kind}").write_bytes(b"")
    assert outcomes(read(tmp_path / f"b.{kind}")) == [(0, "empty")]


def test_a_damaged_row_group_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    rng = random.Random(3)
    rows = [rng.randbytes(100).hex() for _ in range(50)]
    path = write(tmp_path / "a.parquet", rows, rows_at_once=10)
    content = bytearray(path.read_bytes())
    place = content.index(rows[20][:40].encode())
    content[place - 120 : place] = b"\xff" * 120  # header and dictionary of the third
    path.write_bytes(content)
    records = read(path, chunk_bytes=1000)
    assert texts(records) == rows[:20] + rows[30:]
    assert [outcome for outcome in outcomes(records) if outcome[1] not in rows] == [(20, "damaged file")]


def test_of_an_arrow_stream_cut_short_the_rows_before_the_cut_stay_and_the_cut_is_named(tmp_path: Path) -> None:
    rows = [f"document {i}" for i in range(50)]
    path = write(tmp_path / "a.arrow", rows)
    path.write_bytes(path.read_bytes()[:-100])
    assert outcomes(read(path)) == [*enumerate(rows[:40]), (40, "damaged file")]


@pytest.mark.parametrize("offset", [2**30, 2, -3])
@pytest.mark.parametrize("kind", ["feather", "arrow"])
def test_offsets_that_lead_astray_are_damage_and_never_followed(tmp_path: Path, kind: str, offset: int) -> None:
    path = write(tmp_path / f"a.{kind}", ["one", "two", "six"])
    good, wrong = struct.pack("<4i", 0, 3, 6, 9), struct.pack("<4i", 0, 3, offset, 9)
    assert path.read_bytes().count(good) == 1
    path.write_bytes(path.read_bytes().replace(good, wrong))
    assert outcomes(read(path)) == [(0, "damaged file")]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_gives_records(
    tmp_path_factory: pytest.TempPathFactory, kind: str, changes: list[tuple[float, int]]
) -> None:
    path = write(tmp_path_factory.mktemp("damage") / f"a.{kind}", ["one", "two", None, "four"], rows_at_once=2)
    content = bytearray(path.read_bytes())
    for place, byte in changes:
        content[int(place * (len(content) - 1))] = byte
    path.write_bytes(content)
    records = read(path, chunk_bytes=200)
    assert all(isinstance(record, Document | BadRecord) for record in records)


def test_compressed_columnar_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.parquet\.gz: parquet files cannot be read through gzip; decompress it"):
        find_files([str(tmp_path)])


def test_a_failing_disk_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FailingFile(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    path = write(tmp_path / "a.parquet", ["one"])
    monkeypatch.setattr("megagpt.corpus.reading.decompressed", lambda raw, _: FailingFile(raw.read()))
    with pytest.raises(OSError, match="Input/output error"):
        read(path)
