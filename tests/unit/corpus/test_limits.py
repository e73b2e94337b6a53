"""Documents above --max-document-mb: passed over with their position and size, and never held in memory."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fastwarc.warc import WarcRecordType
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.records import BadRecord, Document
from tests.unit.corpus.test_columnar import KINDS, outcomes, write
from tests.unit.corpus.test_mediawiki import dump
from tests.unit.corpus.test_reading import read
from tests.unit.corpus.test_web import page, response, warc_record

ROOT = Path(__file__).parents[3]
LIMIT = 2000
LARGE = "x" * (LIMIT + 1)
MB = 1 << 20
WIKIS = ["pages-articles.xml.bz2", "pages-articles.xml.gz"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=10), st.integers(20, 50), st.integers(1, 100))
def test_lines_are_read_up_to_the_limit_exactly_wherever_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, chunk_bytes: int
) -> None:
    lines = [json.dumps({"text": "x" * size}).encode() + b"\n" for size in sizes]
    path = tmp_path_factory.mktemp("limit") / "a.jsonl"
    path.write_bytes(b"".join(lines))
    found = read(path, chunk_bytes, max_bytes=limit)
    assert [record.position for record in found] == [sum(map(len, lines[:number])) for number in range(len(lines))]
    assert [isinstance(record, Document) for record in found] == [len(line) <= limit for line in lines]
    details = [record.detail for record in found if isinstance(record, BadRecord)]
    large = [len(line) for line in lines if len(line) > limit]
    assert details == [f"{size} bytes, more than the {limit} that --max-document-mb allows" for size in large]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_above_the_limit_is_named_and_the_others_are_read(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"a.{kind}", ["one", LARGE, "three", LARGE[1:]])
    expected = [(0, "one"), (1, "too large"), (2, "three"), (3, LARGE[1:])]
    assert outcomes(read(path, max_bytes=LIMIT)) == expected


def test_a_page_of_an_archive_above_the_limit_is_named_and_a_picture_is_still_none(tmp_path: Path) -> None:
    blocks = [
        response(page("One.")),
        response(page(LARGE)),
        response(LARGE.encode(), content_type="image/png"),
        response(gzip.compress(page(LARGE * 1000)), more="Content-Encoding: gzip\r\n"),
        response(page("Five.")),
    ]
    records = [warc_record(block) for block in blocks]
    records.insert(1, warc_record(LARGE.encode(), WarcRecordType.conversion))
    (tmp_path / "a.warc").write_bytes(b"".join(records))
    found = [outcome for _, outcome in outcomes(read(tmp_path, max_bytes=LIMIT))]
    assert found == ["Heading\n\nOne.", "too large", "too large", "too large", "Heading\n\nFive."]


def test_an_article_above_the_limit_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "pages-articles.xml").write_bytes(dump([("A", "one"), ("B", LARGE), ("C", "é" * LIMIT), ("D", "two")]))
    found = [outcome for _, outcome in outcomes(read(tmp_path, max_bytes=LIMIT))]
    assert found == ["one", "too large", "too large", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.txt.gz"])
def test_a_file_above_the_limit_is_named_unless_it_was_met_and_is_binary(tmp_path: Path, name: str) -> None:
    content = LARGE.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert outcomes(read(tmp_path, max_bytes=LIMIT)) == [(0, "too large")]
    if name == "a.txt":
        (tmp_path / name).write_bytes(b"\0" + content)
        assert outcomes(read(tmp_path, max_bytes=LIMIT)) == [(0, "binary file")]
        assert outcomes(read(tmp_path / name, max_bytes=LIMIT)) == [(0, "too large")]


@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.jsonl", "a.txt.gz"])
def test_a_high_limit_alone_takes_no_memory(tmp_path: Path, name: str) -> None:
    content = b'{"text": "one"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    read(tmp_path)  # whatever is imported
    tracemalloc.start()
    try:
        (document,) = read(tmp_path, max_bytes=4 << 30)
        assert isinstance(document, Document)
        assert tracemalloc.get_traced_memory()[1] < 4 * MB
    finally:
        tracemalloc.stop()


def test_the_limit_has_a_limit() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 4096"):
        CorpusConfig(input=["a"], output="b", max_document_mb=5000)


# Memory

_MEASURE = """
import re, sys
from pathlib import Path
from megagpt.corpus.finding import find_files
from megagpt.corpus.reading import read_piece
from megagpt.corpus.records import BadRecord, ReadCount
from megagpt.corpus.sources import Piece
import pyarrow.parquet, mwparserfromhell, fastwarc.warc
def peak():  # and not getrusage's ru_maxrss, which begins with that of the process that this one was forked from
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
(file,) = find_files([sys.argv[1]])
for record in read_piece(Piece(file, 0, 0, file.size), "text", ReadCount()):
    print(record.reason if isinstance(record, BadRecord) else len(record.text), end=" ")
print((peak() - before) // 1024)
"""


def measure(path: Path) -> tuple[list[str], int]:
    """What a process of its own reads (reasons, lengths of texts), and the MiB by which its memory grew."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    *found, grown = done.stdout.split()
    return " ".join(found).replace("too large", "large").split(), int(grown)


def zstd_compress(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd_compress,
    ".bz2": lambda content: bz2.compress(content),
    ".xz": lambda content: lzma.compress(content, preset=0),
}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", _COMPRESS)
def test_a_line_of_400_mb_between_two_short_ones_takes_little_memory(tmp_path: Path, suffix: str) -> None:
    compress = _COMPRESS[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    with open(path, "wb") as file:
        file.write(compress(b'{"text": "one"}\n{"text": "'))
        part = compress(b" " * (50 * MB))
        for _ in range(8):
            file.write(part)
        file.write(compress(b'"}\n{"text": "three"}\n'))
    found, grown = measure(path)
    assert found == ["3", "large", "5"]
    assert grown < 300


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["a.txt.zst", "a.html.gz", "a.warc.zst", "pages-articles.xml.bz2", "pages-articles.xml.gz"]
)
def test_a_few_bytes_that_expand_to_400_mb_take_little_memory(tmp_path: Path, name: str) -> None:
    begin = {"a.warc.zst": warc_record(b"x" * 20 * MB)[:400], "pages-articles.xml.bz2": dump([("A", "x")])[:-50]}
    begin["pages-articles.xml.gz"] = dump([("A", "x")]).partition(b"</text>")[0]
    suffix = Path(name).suffix
    content = begin.get(name, b"") + b"x" * (400 * MB)
    (tmp_path / name).write_bytes(_COMPRESS[suffix](content))
    assert (tmp_path / name).stat().st_size < MB
    del content
    _, grown = measure(tmp_path / name)
    assert grown < 300


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False, "compression": "zstd"}, {"data_page_version": "2.0"}]
)
def test_rows_of_40_mb_are_held_one_at_a_time(tmp_path: Path, options: dict[str, Any]) -> None:
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())]), **options) as writer:
        for _ in range(3):
            rows = [letter * (40 * MB) for letter in "abcd"]
            writer.write_table(pa.table({"text": [*rows, *["short"] * 20]}), row_group_size=24)
    found, grown = measure(tmp_path / "a.parquet")
    assert found == [*[str(40 * MB)] * 4, *["5"] * 20] * 3
    assert grown < 700


@pytest.mark.slow
def test_a_large_value_that_is_stored_once_for_many_rows_is_held_in_a_few_of_them(tmp_path: Path) -> None:
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), ["x" * (20 * MB)])
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", compression="none")
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), pa.schema([("text", rows.type)])) as writer:
        writer.write_table(pa.table({"text": rows}))
    for name in ("a.parquet", "a.arrow"):
        found, grown = measure(tmp_path / name)
        assert found == [str(20 * MB)] * 256
        assert grown < 500
