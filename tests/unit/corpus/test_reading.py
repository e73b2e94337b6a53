"""Reading: every good document comes out once with its position, and everything else is named."""

import bz2
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus.plan import cut_into_chunks
from megagpt.corpus.reading import _read_lines, read_piece
from megagpt.corpus.records import BadRecord, Document, ReadCount
from megagpt.corpus.sources import Piece, SourceFile, find_files
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


def read(path: Path, chunk_bytes: int = 1 << 30, text_key: str = "text") -> list[Document | BadRecord]:
    """All records of a file, read in chunks of this size."""
    records: list[Document | BadRecord] = []
    for chunk in cut_into_chunks(find_files([str(path)]), chunk_bytes):
        for piece in chunk.pieces:
            records += read_piece(piece, text_key, ReadCount())
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


# Compression


_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def compress(content: bytes, suffix: str) -> bytes:
    """`content` in two frames, those of .xz with padding between them."""
    if suffix in _COMPRESS:
        padding = bytes(8) if suffix == ".xz" else b""
        return _COMPRESS[suffix](content[:100]) + padding + _COMPRESS[suffix](content[100:])
    compressor = zstandard.ZstdCompressor()
    streamed = io.BytesIO()
    with compressor.stream_writer(streamed, closefd=False) as writer:
        writer.write(content[100:])
    return compressor.compress(content[:100]) + streamed.getvalue()


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_compressed_files_of_several_frames_give_the_documents_of_their_content(tmp_path: Path, suffix: str) -> None:
    expected = [f"document {i} {os.urandom(50).hex()}" for i in range(3000)]
    content = b"".join(line_of(text, True) + b"\n" for text in expected)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(content, suffix))
    records = read(tmp_path / f"a.jsonl{suffix}", chunk_bytes=100)
    assert texts(records) == expected
    assert [record.position for record in records[:2]] == [0, content.index(b"\n") + 1]
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(content, suffix))
    assert texts(read(tmp_path / f"a.txt{suffix}")) == [content.decode()]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("cut", [1, 5, 2000])
def test_of_a_compressed_file_cut_short_the_documents_before_the_cut_stay_and_the_cut_is_named(
    tmp_path: Path, suffix: str, cut: int
) -> None:
    expected = [f"document {i} {os.urandom(500).hex()}" for i in range(1000)]
    content = b"".join(line_of(text, True) + b"\n" for text in expected)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(content, suffix)[:-cut])
    *documents, bad = read(tmp_path / f"a.jsonl{suffix}")
    found = texts(documents)
    assert len(found) == len(documents) > 700
    assert found == expected[: len(found)]
    assert isinstance(bad, BadRecord)
    assert bad.reason == "damaged compression"
    assert bad.position == sum(len(line_of(text, True)) + 1 for text in found)
    assert bad.line == len(found) + 1
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(content, suffix)[:-cut])
    (bad,) = read(tmp_path / f"a.txt{suffix}")
    assert isinstance(bad, BadRecord)
    assert bad.reason == "damaged compression"


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_named(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b'{"text": "plain"}\n')
    (bad,) = read(tmp_path / f"a.jsonl{suffix}")
    assert isinstance(bad, BadRecord)
    assert (bad.reason, bad.position) == ("damaged compression", 0)


# Finding


def names(tmp_path: Path, *inputs: str) -> list[str]:
    return [
        os.path.relpath(file.name, tmp_path) for file in find_files([str(tmp_path / pattern) for pattern in inputs])
    ]


def test_folders_patterns_and_files_give_each_file_once_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/c/1.jsonl", "a.txt", ".hidden/x.txt", "b/.x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    everything = ["a.txt", "b/2.txt", "b/c/1.jsonl"]
    assert names(tmp_path, ".") == everything
    assert names(tmp_path, "b", "a.txt", "*.txt", "b/*.txt") == everything
    assert names(tmp_path, "**/*.jsonl") == ["b/c/1.jsonl"]
    assert names(tmp_path, "b") == everything[1:]


def test_links_are_followed_and_a_link_back_up_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.txt").write_text("x")
    (tmp_path / "a/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/up").symlink_to(tmp_path / "a")
    (tmp_path / "a/own.txt").write_text("x")
    assert names(tmp_path, "a") == ["a/link/x.txt", "a/own.txt"]


def test_a_file_that_several_names_lead_to_is_read_once_by_the_name_that_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/c0ffee").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").symlink_to("../blobs/c0ffee")
    assert names(tmp_path, ".") == ["data/a.jsonl"]
    (tmp_path / "link").symlink_to("data")
    assert names(tmp_path, "data", "./data/", "link/../data", "link/*") == ["link/a.jsonl"]


def test_a_path_through_a_link_and_back_leads_where_the_system_says(tmp_path: Path) -> None:
    for name in ("a/inner", "b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b/x.txt").write_text("wrong")
    (tmp_path / "a/x.txt").write_text("right")
    (tmp_path / "b/link").symlink_to("../a/inner")
    (file,) = find_files([f"{tmp_path}/b/link/../x.txt"])
    assert Path(file.name).read_text() == "right"


def test_what_is_no_file_in_a_folder_is_listed_and_stops_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "x.txt").write_text("x")
    found = read(tmp_path)
    assert [record.reason for record in found if isinstance(record, BadRecord)] == ["not a file"] * 3
    assert [record.text for record in found if isinstance(record, Document)] == ["x"]


def test_the_line_that_a_piece_begins_in_is_not_read_beyond_the_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "%s"}\n' % ("x" * 50_000), '{"text": "short"}\n']
    path.write_text("".join(lines))
    (file,) = find_files([str(path)])
    taken = 0
    found: list[Document | BadRecord] = []
    for piece in [piece for chunk in cut_into_chunks([file], 100) for piece in chunk.pieces]:
        stream = CountingStream(path.read_bytes())
        found += _read_lines(stream, piece, "text", ReadCount())
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


def test_messages_stay_on_one_line_whatever_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_files([f"{tmp_path}/a\nb.txt"])
    assert "\n" not in str(caught.value)


def test_a_name_with_characters_of_patterns_is_a_file_if_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert names(tmp_path, "a[1].txt") == ["a[1].txt"]


def test_inputs_that_lead_nowhere_are_errors_that_name_them(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name, message in (
        ("no.txt", "no such file"),
        ("*.csv", "no such file, folder or match"),
        ("empty", "holds no files"),
        ("pipe", "not a regular file"),
        ("dangling", "cannot be read: No such file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            find_files([str(tmp_path / name)])
        assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_changed_since_the_plan_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    (file,) = find_files([str(path)])
    path.write_text("longer")
    with pytest.raises(UserError, match=r"a\.txt: changed while"):
        list(read_piece(Piece(file, 0, 0, file.size), "text", ReadCount()))


@given(
    st.lists(st.tuples(st.sampled_from([".jsonl", ".txt", ".jsonl.gz"]), st.integers(0, 50)), max_size=10),
    st.integers(1, 60),
)
def test_chunks_cover_every_file_once_and_in_order(files: list[tuple[str, int]], chunk_bytes: int) -> None:
    sources = [SourceFile(f"{i}{suffix}", size, 0, False) for i, (suffix, size) in enumerate(files)]
    pieces = [piece for chunk in cut_into_chunks(sources, chunk_bytes) for piece in chunk.pieces]
    for index, source in enumerate(sources):
        own = [piece for piece in pieces if piece.file_index == index]
        assert [piece.start for piece in own] == [0, *(piece.stop for piece in own[:-1])]
        assert own[-1].stop == source.size
        assert len(own) == 1 or source.is_splittable
    assert [piece.file_index for piece in pieces] == sorted(piece.file_index for piece in pieces)
