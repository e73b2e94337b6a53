"""From files to documents, by what the file's name says it is.

A .jsonl file holds one JSON object a line; Parquet and Arrow files one document a row; an HTML file or a page of a WARC
archive is the text of its main content; any other file is one document of UTF-8 text. What cannot be read as a document
comes out as a BadRecord with its position, in order; nothing is guessed at.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import IO, Any

from megagpt.corpus.columnar import read_arrow, read_parquet
from megagpt.corpus.compression import DAMAGED_ERRORS, decompressed
from megagpt.corpus.records import (
    BINARY,
    DAMAGED,
    EMPTY,
    NO_FILE,
    BadRecord,
    BadRecordError,
    Document,
    ReadCount,
    checked,
    decode_utf8,
)
from megagpt.corpus.sources import Piece, SourceFile, one_line
from megagpt.corpus.web import main_text, read_warc
from megagpt.errors import UserError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SNIFFED_BYTES = 8000  # as git decides: a NUL among the first bytes makes a file binary


def read_piece(piece: Piece, text_key: str, count: ReadCount) -> Iterator[Document | BadRecord]:
    """The documents that begin in `piece`, in order, with what could not be read in between; `count` grows with them.

    Pieces that cover a file give each of its records once, wherever they are cut.
    OSError: the file cannot be read. UserError: it is not what was planned, or has no column `text_key`.
    """
    if piece.file.obstacle:
        yield BadRecord(0, None, NO_FILE, piece.file.obstacle)
        return
    with open(piece.file.name, "rb") as raw:
        _check_unchanged(piece.file, os.fstat(raw.fileno()))
        if piece.file.size == 0:
            yield BadRecord(0, None, EMPTY, "the file has no bytes")
            return
        stream = decompressed(raw, piece.file.compression)
        match piece.file.kind:
            case "jsonl":
                yield from _read_lines(stream, piece, text_key, count)
            case "parquet":
                yield from read_parquet(stream, piece, text_key, count)
            case "arrow":
                yield from read_arrow(piece, text_key, count)
            case "warc":
                yield from read_warc(stream, count)
            case "html":
                yield _read_whole(stream, count, main_text)
            case "text":
                yield _read_whole(stream, count, lambda content: _plain_text(content, piece.file.found_in_folder))


def _check_unchanged(file: SourceFile, status: os.stat_result) -> None:
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise UserError(f"{one_line(file.name)}: changed while the run was reading it; run the command again")


def _read_lines(stream: IO[bytes], piece: Piece, text_key: str, count: ReadCount) -> Iterator[Document | BadRecord]:
    position = piece.start
    if piece.start > 0:
        stream.seek(piece.start - 1)
        rest = stream.readline(piece.stop - piece.start + 1)  # of a line that began before the piece
        if not rest.endswith(b"\n"):
            return  # it goes on in the next piece, or ends the file
        position += len(rest) - 1
    try:
        for line in stream:
            if piece.file.is_splittable and position >= piece.stop:
                break
            count.lines += 1
            count.bytes += len(line)
            if not line.isspace():
                content = line.removeprefix(_BYTE_ORDER_MARK) if position == 0 else line
                try:
                    yield Document(position, checked(_parse_line(content, text_key)))
                except BadRecordError as bad:
                    yield BadRecord(position, count.lines, *bad.args)
            position += len(line)
    except DAMAGED_ERRORS as error:
        yield BadRecord(position, count.lines + 1, DAMAGED, f"{error} after this byte of its content")


def _read_whole(stream: IO[bytes], count: ReadCount, to_text: Callable[[bytes], str]) -> Document | BadRecord:
    try:
        content = stream.read()
    except DAMAGED_ERRORS as error:
        return BadRecord(0, None, DAMAGED, str(error))
    count.bytes += len(content)
    try:
        return Document(0, checked(to_text(content)))
    except BadRecordError as bad:
        return BadRecord(0, None, *bad.args)


def _plain_text(content: bytes, may_be_binary: bool) -> str:
    if may_be_binary and 0 in content[:_SNIFFED_BYTES]:
        raise BadRecordError(BINARY, "NUL among its first bytes")
    return decode_utf8(content.removeprefix(_BYTE_ORDER_MARK))


def _parse_line(line: bytes, text_key: str) -> str:
    """The text in one line of JSON."""
    try:
        values: Any = json.loads(decode_utf8(line))
    except json.JSONDecodeError as error:
        raise BadRecordError("malformed JSON", f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise BadRecordError("malformed JSON", str(error)) from None
    if not isinstance(values, dict):
        raise BadRecordError("wrong type", f"the line is {_json_type(values)}, not an object")
    if text_key not in values:
        raise BadRecordError("missing key", f"no key {text_key!r} among {', '.join(map(repr, list(values)[:5]))}")
    if not isinstance(values[text_key], str):
        raise BadRecordError("wrong type", f"{text_key!r} is {_json_type(values[text_key])}, not a string")
    return values[text_key]


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
