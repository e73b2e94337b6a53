"""Damage of any kind to files of every kind: never an exception, and never a good document lost before it."""

import bz2
import gzip
import itertools
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus.records import BadRecord, Document
from tests.unit.corpus.test_mediawiki import dump
from tests.unit.corpus.test_reading import read
from tests.unit.corpus.test_web import page, response, warc_record

TEXTS = [f"Document {number}: {'some words of it ' * (number % 7)}é日" for number in range(40)]
_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: zstandard.ZstdCompressor().compress(content),
    ".bz2": lambda content: bz2.compress(content),
    ".xz": lambda content: lzma.compress(content),
}


def lines() -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in TEXTS)


def columnar(kind: str) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"text": TEXTS})
    if kind == "parquet":
        pq.write_table(table, sink, row_group_size=7)
    else:
        with (pa.ipc.new_file if kind == "feather" else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    return sink.getvalue().to_pybytes()


WARC = b"".join(warc_record(response(page(text))) for text in TEXTS)
_PLAIN = {
    "a.jsonl": lines(),
    "a.txt": "\n".join(TEXTS).encode(),
    "a.html": page("\n".join(TEXTS)),
    "a.warc": WARC,
    "pages-articles.xml": dump([("A", text) for text in TEXTS]),
}
FILES = {name + suffix: compress(content) for name, content in _PLAIN.items() for suffix, compress in _COMPRESS.items()}
FILES |= {f"a.{kind}": columnar(kind) for kind in ("parquet", "feather", "arrow")}
# Members of one record each, as crawlers write them.
FILES["b.warc.gz"] = b"".join(gzip.compress(warc_record(response(page(text)))) for text in TEXTS)

CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3)


def damaged(content: bytes, changes: list[tuple[float, int]]) -> bytes:
    """`content` with some bytes changed."""
    result = bytearray(content)
    for place, difference in changes:
        result[int(place * (len(content) - 1))] ^= difference
    return bytes(result)


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def check(records: list[Document | BadRecord]) -> None:
    """What holds of any records: their positions grow, and what is wrong is said in a line."""
    assert all(one.position <= other.position for one, other in itertools.pairwise(records))
    for record in records:
        assert record.position >= 0
        if isinstance(record, Document):
            record.text.encode()
            assert record.text.strip()
            assert "\0" not in record.text
        else:
            assert record.reason


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(FILES)), CHANGES, st.floats(0, 1), st.integers(50, 3000))
def test_changed_and_cut_files_give_records_and_the_same_ones_wherever_they_are_cut_into_pieces(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: Any, end: float, chunk_bytes: int
) -> None:
    content = FILES[name]
    content = damaged(content, changes)[: max(1, int(end * 1.3 * len(content)))]
    path = write(tmp_path_factory.mktemp("damage"), name, content)
    records = read(path, chunk_bytes)
    check(records)
    whole = read(path)
    assert [(type(record), record.position) for record in records] == [
        (type(record), record.position) for record in whole
    ]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.binary(max_size=400), st.integers(1, 100))
def test_any_bytes_are_read_without_an_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes, chunk_bytes: int
) -> None:
    check(read(write(tmp_path_factory.mktemp("any"), name, content), chunk_bytes))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=3), st.integers(50, 3000))
def test_of_changed_lines_all_others_stay(
    tmp_path_factory: pytest.TempPathFactory, changes: Any, chunk_bytes: int
) -> None:
    content = damaged(FILES["a.jsonl"], changes)
    path = write(tmp_path_factory.mktemp("lines"), "a.jsonl", content)
    before, after = FILES["a.jsonl"].split(b"\n"), content.split(b"\n")
    unchanged = {json.loads(line)["text"] for line in before if line and line in after}
    assert unchanged <= {record.text for record in read(path, chunk_bytes) if isinstance(record, Document)}


@pytest.mark.parametrize("name", [name for name in FILES if "a.jsonl." in name or "xml." in name])
def test_of_a_compressed_file_every_document_before_a_cut_comes_out(tmp_path: Path, name: str) -> None:
    whole = [record.text for record in read(write(tmp_path, name, FILES[name])) if isinstance(record, Document)]
    assert len(whole) == len(TEXTS)
    for size in range(1, len(FILES[name]), 37):
        content = FILES[name][:size]
        *documents, bad = read(write(tmp_path, name, content))
        assert isinstance(bad, BadRecord)
        assert bad.reason == "damaged compression"
        found = [record.text for record in documents if isinstance(record, Document)]
        assert found == whole[: len(documents)]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(TEXTS) - 1), st.floats(0, 1), st.integers(1, 255))
def test_of_an_archive_of_members_a_damaged_one_costs_its_own_page_alone(
    tmp_path_factory: pytest.TempPathFactory, number: int, place: float, difference: int
) -> None:
    members = [gzip.compress(warc_record(response(page(text)))) for text in TEXTS]
    members[number] = damaged(members[number], [(place, difference)])
    path = write(tmp_path_factory.mktemp("members"), "b.warc.gz", b"".join(members))
    records = read(path)
    check(records)
    found = [record.text for record in records if isinstance(record, Document)]
    expected = [f"Heading\n\n{text.strip()}" for text in TEXTS]
    assert set(expected[:number] + expected[number + 1 :]) <= set(found)
