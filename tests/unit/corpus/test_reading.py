"""Reading: every good document comes out once with its position, and everything else is named."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus.finding import find_files
from megagpt.corpus.plan import cut_into_chunks
from megagpt.corpus.reading import DEFAULT_MAX_BYTES, _read_lines, read_piece
from megagpt.corpus.records import BadRecord, Document, ReadCount
from megagpt.corpus.sources import Format, Piece, TextUnit
from megagpt.errors import UserError

GOOD_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30).filter(
    lambda text: not text.isspace()
)
BAD_LINES = [
    (b"{", "malformed JSON"),
    (b"not json", "malformed JSON"),
    (b'{"text": "cut of', "malformed JSON"),
    (b"[" * 100_000, "malformed JSON"),
    (b'{"text": 1' + b"0" * 5000 + b"}", "malformed JSON"),
    (b"[1, 2]", "wrong type"),
    (b'"text"', "wrong type"),
    (b"null", "wrong type"),
    (b'{"text": null}', "wrong type"),
    (b'{"text": 5}', "wrong type"),
    (b'{"text": ["a"]}', "wrong type"),
    (b'{"content": "a"}', "missing key"),
    (b"{}", "missing key"),
    (b'{"text": "caf\xe9"}', "invalid UTF-8"),
    (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b'{"text": "a\\u0000b"}', "NUL character"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n"}', "empty"),
]
ANY_NAMES = ["a.jsonl", "a.txt", "a.html", "a.warc", "a.parquet", "a.arrow"]
ANY_NAMES += ["a.jsonl.gz", "a.txt.zst", "a.jsonl.bz2", "a.txt.xz", "a.warc.gz"]
SHORT_BAD_LINES = [(line, reason) for line, reason in BAD_LINES if len(line) < 100]


def read(
    path: Path | str,
    chunk_bytes: int = 1 << 30,
    text_key: str = "text",
    max_bytes: int = DEFAULT_MAX_BYTES,
    format: Format = "auto",
    text_unit: TextUnit = "file",
) -> list[Document | BadRecord]:
    """All records of a file, read in chunks of this size."""
    records: list[Document | BadRecord] = []
    for chunk in cut_into_chunks(find_files([str(path)], format=format, text_unit=text_unit), chunk_bytes):
        for piece in chunk.pieces:
            records += read_piece(piece, text_key, ReadCount(), max_bytes)
    return records


def texts(records: list[Document | BadRecord]) -> list[str]:
    return [record.text for record in records if isinstance(record, Document)]


def line_of(text: str, ascii_only: bool) -> bytes:
    return json.dumps({"id": 1, "text": text}, ensure_ascii=ascii_only).encode()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(GOOD_TEXT, st.booleans()) | st.sampled_from(SHORT_BAD_LINES) | st.just(None), max_size=12),
    st.integers(1, 200),
    st.booleans(),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_no_good_document_is_lost_and_each_bad_line_is_named_wherever_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], chunk_bytes: int, ends_with_newline: bool, newline: bytes
) -> None:
    expected, content = [], b""
    for row in rows:
        if row is not None:
            is_good = isinstance(row[1], bool)
            expected.append((len(content), Document if is_good else BadRecord, row[0] if is_good else row[1]))
        content += (b" " if row is None else line_of(*row) if is_good else row[0]) + newline
    if not ends_with_newline:
        content = content.removesuffix(newline)
    path = tmp_path_factory.mktemp("reading") / "a.jsonl"
    path.write_bytes(content or newline)
    found = [
        (record.position, type(record), record.text if isinstance(record, Document) else record.reason)
        for record in read(path, chunk_bytes)
    ]
    assert found == expected


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 100), st.sampled_from(ANY_NAMES))
def test_any_bytes_are_read_without_an_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, chunk_bytes: int, name: str
) -> None:
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(content)
    for record in read(path, chunk_bytes):
        assert isinstance(record, Document | BadRecord)


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_each_kind_of_bad_line_has_its_reason_line_and_byte(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n\n' + line + b'\n{"text": "after"}\n')
    before, bad, after = read(path)
    assert texts([before, after]) == ["before", "after"]
    assert isinstance(bad, BadRecord)
    assert (bad.position, bad.line, bad.reason) == (20, 3, reason)


def test_the_detail_says_what_and_where(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"content": "a", "id": 1}\n{"text": 5}\n{"text": "a" "b"}\n{"text": "abc\xff"}\n')
    details = [record.detail for record in read(path) if isinstance(record, BadRecord)]
    assert details == [
        "no key 'text' among 'content', 'id'",
        "'text' is a number, not a string",
        "Expecting ',' delimiter at column 14",
        "invalid start byte at byte 13 of the record",
    ]


def test_the_text_key_can_be_another(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "a", "text": 1}\n')
    assert texts(read(path, text_key="content")) == ["a"]


def test_a_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n')
    assert texts(read(path)) == ["😀"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfhello\r\nworld\n", "hello\r\nworld\n"),
        (b"caf\xc3\xa9", "café"),
        (b"caf\xe9", "invalid UTF-8"),
        ("utf-16".encode("utf-16"), "invalid UTF-8"),
        (b"a\0b", "NUL character"),
        (b" \n ", "empty"),
        (b"", "empty"),
    ],
)
def test_a_text_file_is_one_document_or_has_a_reason(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(content)
    (record,) = read(path)
    assert (record.text if isinstance(record, Document) else record.reason) == expected
    assert record.position == 0


def test_a_byte_order_mark_before_json_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert texts(read(path)) == ["a"]


def test_a_binary_file_met_in_a_folder_is_no_bad_text_but_one_that_was_named_is(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\0\0")
    (met,) = find_files([str(tmp_path)])
    (named,) = find_files([str(tmp_path / "a.png")])
    reasons = [
        record.reason
        for file in (met, named)
        for record in read_piece(Piece(file, 0, 0, file.size), "text", ReadCount())
        if isinstance(record, BadRecord)
    ]
    assert reasons == ["binary file", "invalid UTF-8"]


def test_the_line_that_a_piece_begins_in_is_not_read_beyond_the_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "%s"}\n' % ("x" * 50_000), '{"text": "short"}\n']
    path.write_text("".join(lines))
    (file,) = find_files([str(path)])
    taken = 0
    found: list[Document | BadRecord] = []
    for piece in [piece for chunk in cut_into_chunks([file], 100) for piece in chunk.pieces]:
        stream = CountingStream(path.read_bytes())
        found += _read_lines(stream, piece, bytes.decode, ReadCount(), 1 << 20)
        taken += stream.taken
    assert [record.position for record in found] == [0, len(lines[0])]
    assert taken < 4 * file.size


class CountingStream(io.BytesIO):
    """Counts the bytes that lines take."""

    taken = 0

    def readline(self, limit: int | None = -1, /) -> bytes:
        line = super().readline(limit)
        self.taken += len(line)
        return line


def test_a_file_that_changed_since_the_plan_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    (file,) = find_files([str(path)])
    path.write_text("longer")
    with pytest.raises(UserError, match=r"a\.txt: changed while"):
        list(read_piece(Piece(file, 0, 0, file.size), "text", ReadCount()))
