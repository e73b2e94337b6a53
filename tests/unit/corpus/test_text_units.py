"""Large files of text: by lines or paragraphs, wherever they are cut, in the memory of one document."""

import gzip
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus.finding import find_files
from megagpt.corpus.plan import cut_into_chunks
from megagpt.corpus.reading import read_piece
from megagpt.corpus.records import HARMLESS, BadRecord, Document, ReadCount
from megagpt.corpus.sources import Piece, TextUnit
from tests.unit.corpus.test_columnar import outcomes
from tests.unit.corpus.test_reading import read, texts

PARTS = st.lists(
    st.sampled_from(["\n", "\r\n", "\r", "a", "bc", "é", " ", "\n\n", "\r\n\r\n", "words of text"]), max_size=30
)


def split_lines(content: bytes) -> list[tuple[int, bytes]]:
    """Position and content of each line that is not blank."""
    lines = [(line.start(), line[1]) for line in re.finditer(rb"([^\n]*?)\r?(?:\n|\Z)", content)]
    return [(position, line) for position, line in lines if line.strip()]


def split_paragraphs(content: bytes) -> list[tuple[int, bytes]]:
    """Position and content of each run of lines without two line ends in a row."""
    runs = re.finditer(rb"(?:(?!\r?\n)[^\n]+(?:\n|\Z))+", content)
    return [(run.start(), re.sub(rb"\r?\n?\Z", b"", run[0])) for run in runs if run[0].strip()]


@pytest.mark.parametrize("unit", ["line", "paragraph"])
@settings(max_examples=250, deadline=None)
@given(PARTS.map("".join), st.integers(1, 40), st.sampled_from(["", ".gz"]))
def test_pieces_cut_anywhere_give_the_documents_that_another_splitter_gives(
    tmp_path_factory: pytest.TempPathFactory, unit: TextUnit, text: str, chunk_bytes: int, suffix: str
) -> None:
    content = text.encode()
    path = tmp_path_factory.mktemp("units") / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    expected = (split_lines if unit == "line" else split_paragraphs)(content)
    records = read(path, chunk_bytes, text_unit=unit)
    found = [(record.position, record.text.encode()) for record in records if isinstance(record, Document)]
    assert found == expected
    assert {record.reason for record in records if isinstance(record, BadRecord)} <= HARMLESS


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_every_short_text_is_cut_in_two_anywhere(tmp_path: Path, unit: TextUnit) -> None:
    path = tmp_path / "a.txt"
    for size in range(1, 7):
        for letters in itertools.product(b"\n\ra", repeat=size):
            path.write_bytes(bytes(letters))
            (file,) = find_files([str(path)], text_unit=unit)
            expected = (split_lines if unit == "line" else split_paragraphs)(bytes(letters))
            for cut in range(1, size):
                pieces = (Piece(file, 0, 0, cut), Piece(file, 0, cut, size))
                records = [record for piece in pieces for record in read_piece(piece, "text", ReadCount())]
                found = [(record.position, record.text.encode()) for record in records if isinstance(record, Document)]
                assert found == expected, (letters, cut)


@pytest.mark.parametrize("unit", ["line", "paragraph"])
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(20, 50), st.integers(1, 100))
def test_documents_are_read_up_to_the_limit_exactly_wherever_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, unit: TextUnit, sizes: list[int], limit: int, chunk_bytes: int
) -> None:
    end = b"\n" if unit == "line" else b"\n\n"
    path = tmp_path_factory.mktemp("limit") / "a.txt"
    path.write_bytes(b"".join(b"x" * size + end for size in sizes))
    found = read(path, chunk_bytes, max_bytes=limit, text_unit=unit)
    assert [record.position for record in found] == [sum(sizes[:n]) + n * len(end) for n in range(len(sizes))]
    assert [isinstance(record, Document) for record in found] == [size + 1 <= limit for size in sizes]
    details = [record.detail.partition(" ")[0] for record in found if isinstance(record, BadRecord)]
    assert details == [str(size + 1) for size in sizes if size + 1 > limit]


def test_text_is_cut_unless_it_is_one_document_or_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a line\n" * 100)
    pieces = {}
    for unit in ("file", "line", "paragraph"):
        files = find_files([str(tmp_path)], text_unit=unit)
        pieces[unit] = len(cut_into_chunks(files, 10))
    assert pieces == {"file": 1, "line": 70, "paragraph": 70}
    (one,), (other,) = (find_files([str(tmp_path)], text_unit=unit) for unit in ("file", "line"))
    assert one.identity != other.identity
    assert other.can_begin_anywhere
    assert not one.can_begin_anywhere


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_a_binary_file_met_in_a_folder_is_one_record_wherever_it_is_cut(tmp_path: Path, unit: TextUnit) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x89PNG\n\0\n\n" * 20)
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"\x89PNG\n\0\n\n" * 20))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbffine\n\ncaf\xe9")
    found = outcomes(read(tmp_path, 10, text_unit=unit))
    assert found == [(0, "binary file"), (0, "binary file"), (0, "fine"), (9, "invalid UTF-8")]


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_of_a_compressed_text_cut_short_the_documents_before_the_cut_stay(tmp_path: Path, unit: TextUnit) -> None:
    rows = [f"document {number * 7919}" for number in range(5000)]
    content = gzip.compress("\n\n".join(rows).encode())
    (tmp_path / "a.txt.gz").write_bytes(content[: len(content) // 2])
    *documents, bad = read(tmp_path, text_unit=unit)
    assert texts(documents) == rows[: len(documents)]
    assert len(documents) > 1000
    assert isinstance(bad, BadRecord)
    assert bad.reason == "damaged compression"


def test_a_text_that_is_too_large_for_one_document_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a line\n" * 100)
    (bad,) = read(tmp_path, max_bytes=50)
    assert isinstance(bad, BadRecord)
    assert "--text-unit line or paragraph" in bad.detail
