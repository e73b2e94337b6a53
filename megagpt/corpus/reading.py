"""From files to documents, by what a file is said to hold or its name tells.

A .jsonl file holds one JSON object a line; Parquet and Arrow files one document a row; an HTML file or a page of a WARC
archive is the text of its main content, a page of a wiki's dump that of its wikitext; any other file is UTF-8 text, one
document or, by the file's `text_unit`, one a line or paragraph. What cannot be read as a document comes out as a
BadRecord with its position, in order; nothing is guessed at, and nothing larger than a document may be is held in
memory.
"""

import contextlib
import functools
import io
import json
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import IO, Any

import orjson

from megagpt.corpus.columnar import read_arrow, read_parquet
from megagpt.corpus.compression import DAMAGED_ERRORS, FrameReader, decompressed
from megagpt.corpus.hub import open_hub_file
from megagpt.corpus.mediawiki import read_mediawiki
from megagpt.corpus.records import (
    BINARY,
    DAMAGED,
    EMPTY,
    NO_FILE,
    NOT_SUPPORTED,
    NULL,
    TOO_LARGE,
    BadRecord,
    BadRecordError,
    Document,
    ReadCount,
    checked,
    decode_utf8,
    too_large,
)
from megagpt.corpus.sources import Piece, SourceFile, one_line
from megagpt.corpus.web import main_text, read_warc
from megagpt.errors import UserError

DEFAULT_MAX_BYTES = 50 << 20
"""Most bytes of a document in its file."""

_BUFFER_BYTES = 1 << 18
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_EMPTY_LINES = (b"\n", b"\r\n")
_SNIFFED_BYTES = 8000  # as git decides: a NUL among the first bytes makes a file binary
_DEEPEST_JSON = "depth limit exceeded"  # orjson's, at 1024; how deep the standard library goes depends on its version


def read_piece(
    piece: Piece, text_key: str, count: ReadCount, max_bytes: int = DEFAULT_MAX_BYTES
) -> Generator[Document | BadRecord, None, None]:
    """The documents that begin in `piece`, in order, with what could not be read in between; `count` grows with them.

    Pieces that cover a file give each of its records once, wherever they are cut. A record of more than `max_bytes` is
    passed over as a BadRecord.
    OSError: the file cannot be read. UserError: it is not what was planned, or the hub does not give it.
    """
    if piece.file.obstacle:
        yield BadRecord(0, None, NO_FILE, piece.file.obstacle)
        return
    if piece.file.is_table:
        if piece.start == 0:
            yield BadRecord(0, None, NOT_SUPPORTED, "a table; write the texts in it to .jsonl or Parquet")
        return
    with _open(piece) as raw:
        if piece.file.size == 0:
            yield BadRecord(0, None, EMPTY, "the file has no bytes")
            return
        stream = decompressed(raw, piece.file.compression)
        try:
            yield from _read_stream(stream, piece, text_key, count, max_bytes)
        finally:
            if piece.file.kind != "parquet":  # which is not read from its beginning to its end
                count.stored_bytes = max(0, min(raw.tell(), piece.stop) - piece.start)
            if isinstance(stream, FrameReader) and piece.file.kind in ("jsonl", "text", "html"):  # which reads ahead
                count.stored_bytes = count.stored_bytes * count.bytes // max(1, stream.given)


def _read_stream(
    stream: IO[bytes], piece: Piece, text_key: str, count: ReadCount, max_bytes: int
) -> Iterator[Document | BadRecord]:
    match piece.file.kind:
        case "jsonl":
            to_text = functools.partial(_parse_line, text_key=text_key)
            yield from _read_lines(_buffered(stream), piece, to_text, count, max_bytes)
        case "parquet":
            yield from read_parquet(stream, piece, text_key, count, max_bytes)
        case "arrow":
            yield from read_arrow(stream, piece, text_key, count, max_bytes)
        case "warc":
            yield from read_warc(stream, count, max_bytes)
        case "mediawiki":
            yield from read_mediawiki(stream, count, max_bytes)
        case "html":
            yield _read_whole(_buffered(stream), count, max_bytes, main_text)
        case "text":
            yield from _read_text(_buffered(stream), piece, count, max_bytes)


@contextlib.contextmanager
def _open(piece: Piece) -> Iterator[IO[bytes]]:
    file = piece.file
    if file.is_on_hub:
        with open_hub_file(file, piece.stop - piece.start) as content:
            yield content
        return
    with open(file.name, "rb", buffering=_BUFFER_BYTES) as raw:
        _check_unchanged(file, raw)
        yield raw
        _check_unchanged(file, raw)


def _check_unchanged(file: SourceFile, raw: IO[bytes]) -> None:
    status = os.fstat(raw.fileno())
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise UserError(f"{one_line(file.name)}: changed while the run was reading it; run the command again")


def _buffered(stream: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(stream, _BUFFER_BYTES) if isinstance(stream, io.RawIOBase) else stream


# Lines and paragraphs


def _read_lines(
    stream: IO[bytes], piece: Piece, to_text: Callable[[bytes], str], count: ReadCount, max_bytes: int
) -> Iterator[Document | BadRecord]:
    position = piece.start
    stop = piece.stop if piece.file.is_splittable else None  # of a file that is not, the content may be longer
    if piece.start > 0:
        stream.seek(piece.start - 1)
        passed, is_whole = _pass_line(stream, piece.stop - piece.start + 1)  # of a line that began before the piece
        if not is_whole:
            return  # it goes on in the next piece, or ends the file
        position += passed - 1
    try:
        while stop is None or position < stop:
            line = stream.readline(max_bytes + 1)
            if not line:
                break
            size = len(line)
            if is_large := size > max_bytes:
                size += _pass_line(stream)[0] if not line.endswith(b"\n") else 0
            count.lines += 1
            count.bytes += size
            if is_large or not line.isspace():
                try:
                    if is_large:
                        raise too_large(max_bytes, size)
                    content = line.removeprefix(_BYTE_ORDER_MARK) if position == 0 else line
                    yield Document(position, checked(to_text(content)))
                except BadRecordError as bad:
                    yield BadRecord(position, count.lines, *bad.args)
            position += size
    except DAMAGED_ERRORS as error:
        yield BadRecord(position, count.lines + 1, DAMAGED, f"{error} after this byte of its content")


def _pass_line(stream: IO[bytes], limit: int | None = None) -> tuple[int, bool]:
    """Read to the end of the line, at most `limit` bytes; their number, and whether the line's end was found."""
    passed = 0
    while limit is None or passed < limit:
        part = stream.readline(_BUFFER_BYTES if limit is None else min(_BUFFER_BYTES, limit - passed))
        passed += len(part)
        if part.endswith(b"\n"):
            return passed, True
        if not part:
            break
    return passed, False


def _line_of_text(line: bytes) -> str:
    return decode_utf8(line.removesuffix(b"\n").removesuffix(b"\r"))


def _read_paragraphs(
    stream: IO[bytes], piece: Piece, count: ReadCount, max_bytes: int
) -> Iterator[Document | BadRecord]:
    """Runs of lines that are not empty: an empty one is a line feed, alone or after a carriage return."""
    stop = piece.stop if piece.file.is_splittable else None
    position = piece.start
    try:
        if piece.start > 0:
            position += _pass_paragraph(stream, piece)
        while stop is None or position < stop:
            content, size, passed = _next_paragraph(stream, max_bytes)
            if not passed:
                break
            count.bytes += passed
            if size:
                try:
                    if size > max_bytes:
                        raise too_large(max_bytes, size)
                    content = content.removeprefix(_BYTE_ORDER_MARK) if position == 0 else content
                    yield Document(position, checked(_line_of_text(content)))
                except BadRecordError as bad:
                    yield BadRecord(position, None, *bad.args)
            position += passed
    except DAMAGED_ERRORS as error:
        yield BadRecord(position, None, DAMAGED, f"{error} after this byte of its content")


def _pass_paragraph(stream: IO[bytes], piece: Piece) -> int:
    """The bytes of a piece that belong to what began before it, with the empty line after that."""
    back = min(piece.start, 3)  # enough to see an empty line before the piece
    stream.seek(piece.start - back)
    before = stream.read(back)
    if before.endswith((b"\n\n", b"\n\r\n")) or before in _EMPTY_LINES:
        return 0
    is_inside_end = before.endswith(b"\n\r") or before == b"\r"
    empty = (b"\n",) if is_inside_end else _EMPTY_LINES
    may_be_empty = is_inside_end or before.endswith(b"\n")
    passed = 0
    while passed < piece.stop - piece.start:
        part = stream.readline(_BUFFER_BYTES)
        passed += len(part)
        if not part or (may_be_empty and part in empty):
            break
        may_be_empty, empty = part.endswith(b"\n"), _EMPTY_LINES
    return passed


def _next_paragraph(stream: IO[bytes], max_bytes: int) -> tuple[bytes, int, int]:
    """A paragraph if it is no larger than `max_bytes`, its size, and the bytes passed, with the empty line after it."""
    content, size, passed, is_line_begin = io.BytesIO(), 0, 0, True
    while part := stream.readline(_BUFFER_BYTES):
        passed += len(part)
        if is_line_begin and part in _EMPTY_LINES:
            break
        size += len(part)
        is_line_begin = part.endswith(b"\n")
        if size <= max_bytes:
            content.write(part)
    return content.getvalue(), size, passed


def _parse_line(line: bytes, text_key: str) -> str:
    """The text in one line of JSON."""
    values = parse_object(line)
    if text_key not in values:
        raise BadRecordError("missing key", f"no key {text_key!r} among {', '.join(map(repr, list(values)[:5]))}")
    if values[text_key] is None:
        raise BadRecordError("wrong type", f"{text_key!r} is {NULL}")
    if not isinstance(values[text_key], str):
        raise BadRecordError("wrong type", f"{text_key!r} is {json_type(values[text_key])}, not a string")
    return values[text_key]


def parse_object(line: bytes) -> dict[str, Any]:
    """The object in one line of JSON, as the standard library reads it; orjson is several times faster.

    BadRecordError: there is none.
    """
    try:
        values: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if error.msg.startswith(_DEEPEST_JSON):
            raise BadRecordError("malformed JSON", "nested too deeply") from None
        values = _parse_slowly(line)
    if not isinstance(values, dict):
        raise BadRecordError("wrong type", f"the line is {json_type(values)}, not an object")
    return values


def _parse_slowly(line: bytes) -> Any:
    """Values that orjson refuses (NaN, numbers out of range, lone surrogates), or what is wrong."""
    try:
        return json.loads(decode_utf8(line))
    except json.JSONDecodeError as error:
        raise BadRecordError("malformed JSON", f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise BadRecordError("malformed JSON", str(error)) from None


def json_type(value: Any) -> str:
    """What JSON calls a value of this type, with its article."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# Texts


def _read_text(stream: IO[bytes], piece: Piece, count: ReadCount, max_bytes: int) -> Iterator[Document | BadRecord]:
    """A file of text by its unit; one that was met in a folder may be binary."""
    file = piece.file
    if file.text_unit == "file":
        to_text = _text_or_binary if file.found_in_folder else _plain_text
        record = _read_whole(stream, count, max_bytes, to_text, file.found_in_folder)
        if isinstance(record, BadRecord) and record.reason == TOO_LARGE:
            advice = "if it holds many texts, give --text-unit line or paragraph"
            record = replace(record, detail=f"{record.detail}; {advice}")
        yield record
        return
    try:
        is_binary = file.found_in_folder and _is_binary(_beginning(stream, file))
    except DAMAGED_ERRORS as error:
        yield BadRecord(0, None, DAMAGED, str(error))
        return
    if is_binary:
        if piece.start == 0:
            yield BadRecord(0, None, BINARY, "NUL among its first bytes")
    elif file.text_unit == "line":
        yield from _read_lines(stream, piece, _line_of_text, count, max_bytes)
    else:
        yield from _read_paragraphs(stream, piece, count, max_bytes)


def _beginning(stream: IO[bytes], file: SourceFile) -> bytes:
    """Some of the first bytes of the content, which are read again afterwards."""
    if file.compression != "none":
        assert isinstance(stream, io.BufferedReader)
        return stream.peek(_SNIFFED_BYTES)
    content = stream.read(_SNIFFED_BYTES)
    stream.seek(0)
    return content


def _read_whole(
    stream: IO[bytes], count: ReadCount, max_bytes: int, to_text: Callable[[bytes], str], may_be_binary: bool = False
) -> Document | BadRecord:
    try:
        content = _read_at_most(stream, max_bytes + 1)
    except DAMAGED_ERRORS as error:
        return BadRecord(0, None, DAMAGED, str(error))
    count.bytes += len(content)
    try:
        if len(content) > max_bytes and not (may_be_binary and _is_binary(content)):
            raise too_large(max_bytes)
        return Document(0, checked(to_text(content)))
    except BadRecordError as bad:
        return BadRecord(0, None, *bad.args)


def _read_at_most(stream: IO[bytes], size: int) -> bytes:
    """The next bytes, in parts: to read `size` at once would allocate them, however few there are."""
    content = io.BytesIO()
    while part := stream.read(min(_BUFFER_BYTES, size - content.tell())):
        content.write(part)
    return content.getvalue()


def _is_binary(content: bytes) -> bool:
    return 0 in content[:_SNIFFED_BYTES]


def _text_or_binary(content: bytes) -> str:
    if _is_binary(content):
        raise BadRecordError(BINARY, "NUL among its first bytes")
    return _plain_text(content)


def _plain_text(content: bytes) -> str:
    return decode_utf8(content.removeprefix(_BYTE_ORDER_MARK))
