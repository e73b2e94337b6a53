"""From files to documents: a .jsonl file holds one JSON object a line, any other file is one document of UTF-8 text.

A document's position is the byte offset of its line in the uncompressed file, or 0. What cannot be read as a document
comes out as a BadRecord with the same position, in order; nothing is skipped or guessed.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from megagpt.corpus.compression import DAMAGED_ERRORS, decompressed
from megagpt.corpus.sources import Piece, SourceFile
from megagpt.errors import UserError

EMPTY, BINARY, DAMAGED = "empty", "binary file", "damaged compression"
HARMLESS = frozenset({EMPTY, BINARY})
"""Reasons that leave out nothing that was text: listed, but not counted as bad."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SNIFFED_BYTES = 8000  # as git decides: a NUL among the first bytes makes a file binary


@dataclass(frozen=True)
class Document:
    """One text, not yet cleaned; it has no NUL and no lone surrogate."""

    position: int
    text: str


@dataclass(frozen=True)
class BadRecord:
    """Something that is not a document, and why."""

    position: int
    line: int | None
    """Number of its line among those of the piece, from 1; None: not about a line."""
    reason: str
    """Which kind of problem, one of a few."""
    detail: str = ""
    """What exactly, and where in the record."""


@dataclass
class ReadCount:
    """How much of a piece has been read."""

    lines: int = 0
    """Lines, blank ones included."""
    bytes: int = 0
    """Bytes of records, uncompressed."""


class _BadRecordError(Exception):
    """Carries reason and detail of a record that is not a document."""


def read_piece(piece: Piece, text_key: str, count: ReadCount) -> Iterator[Document | BadRecord]:
    """The documents that begin in `piece`, in order, with what could not be read in between; `count` grows with them.

    Pieces that cover a file give each of its records once, wherever they are cut.
    OSError: the file cannot be read. UserError: it is not what was planned.
    """
    with open(piece.file.name, "rb") as raw:
        _check_unchanged(piece.file, os.fstat(raw.fileno()))
        if piece.file.size == 0:
            yield BadRecord(0, None, EMPTY, "the file has no bytes")
        elif piece.file.is_jsonl:
            yield from _read_lines(decompressed(raw, piece.file.compression), piece, text_key, count)
        else:
            yield _read_whole(decompressed(raw, piece.file.compression), piece.file, count)


def _check_unchanged(file: SourceFile, status: os.stat_result) -> None:
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        raise UserError(f"{file.name}: changed while the run was reading it; run the command again")


def _read_lines(stream: IO[bytes], piece: Piece, text_key: str, count: ReadCount) -> Iterator[Document | BadRecord]:
    position = piece.start
    if piece.start > 0:
        stream.seek(piece.start - 1)
        position += len(stream.readline()) - 1  # the rest of a line that began before the piece
    try:
        for line in stream:
            if piece.file.is_splittable and position >= piece.stop:
                break
            count.lines += 1
            count.bytes += len(line)
            if not line.isspace():
                content = line.removeprefix(_BYTE_ORDER_MARK) if position == 0 else line
                try:
                    yield Document(position, _checked(_parse_line(content, text_key)))
                except _BadRecordError as bad:
                    yield BadRecord(position, count.lines, *bad.args)
            position += len(line)
    except DAMAGED_ERRORS as error:
        yield BadRecord(position, count.lines + 1, DAMAGED, f"{error} after this byte of its content")


def _read_whole(stream: IO[bytes], file: SourceFile, count: ReadCount) -> Document | BadRecord:
    try:
        content = stream.read()
    except DAMAGED_ERRORS as error:
        return BadRecord(0, None, DAMAGED, str(error))
    if file.found_in_folder and 0 in content[:_SNIFFED_BYTES]:
        return BadRecord(0, None, BINARY, "NUL among its first bytes")
    count.bytes += len(content)
    try:
        return Document(0, _checked(_decode(content.removeprefix(_BYTE_ORDER_MARK))))
    except _BadRecordError as bad:
        return BadRecord(0, None, *bad.args)


def _parse_line(line: bytes, text_key: str) -> str:
    """The text in one line of JSON."""
    try:
        values: Any = json.loads(_decode(line))
    except json.JSONDecodeError as error:
        raise _BadRecordError("malformed JSON", f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise _BadRecordError("malformed JSON", str(error)) from None
    if not isinstance(values, dict):
        raise _BadRecordError("wrong type", f"the line is {_json_type(values)}, not an object")
    if text_key not in values:
        raise _BadRecordError("missing key", f"no key {text_key!r} among {', '.join(map(repr, list(values)[:5]))}")
    if not isinstance(values[text_key], str):
        raise _BadRecordError("wrong type", f"{text_key!r} is {_json_type(values[text_key])}, not a string")
    return values[text_key]


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRecordError("invalid UTF-8", f"{error.reason} at byte {error.start} of the record") from None


def _checked(text: str) -> str:
    """`text`, if it is one that can be written as UTF-8 and tokenized."""
    if not text or text.isspace():
        raise _BadRecordError(EMPTY, "no text but whitespace")
    if "\0" in text:
        raise _BadRecordError("NUL character", f"at character {text.index(chr(0))} of the text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRecordError("lone surrogate", f"at character {error.start} of the text") from None
    return text


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
