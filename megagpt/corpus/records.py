"""What reading gives: documents, and records that are not, with their positions and reasons.

A position is where a record begins in its file: the byte offset in the uncompressed content, or the number of the row
in a columnar file, from 0.
"""

from dataclasses import dataclass

EMPTY, BINARY, NO_FILE = "empty", "binary file", "not a file"
DAMAGED, TOO_LARGE, NOT_SUPPORTED = "damaged compression", "too large", "format not supported"
NULL = "null, not a string"
"""End of the detail of a record whose text is null."""
HARMLESS = frozenset({EMPTY, BINARY, NO_FILE})
"""Reasons that leave out nothing that was text: listed, but not counted as bad."""


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
    stored_bytes: int = 0
    """Bytes of the file, as it is stored, that the records so far are from, about; known when reading has ended."""


class BadRecordError(Exception):
    """Carries reason and detail of a record that is not a document."""


def too_large(limit: int, size: int | None = None) -> BadRecordError:
    """For a record above `limit` bytes, of `size` if that is known."""
    what = "" if size is None else f"{size:,} bytes, "
    return BadRecordError(TOO_LARGE, f"{what}more than the {limit:,} that --max-document-mb allows")


def decode_utf8(content: bytes) -> str:
    """The text of UTF-8. BadRecordError: it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecordError("invalid UTF-8", f"{error.reason} at byte {error.start} of the record") from None


def checked(text: str) -> str:
    """`text`, if it is one that can be written as UTF-8 and tokenized. BadRecordError: it is not."""
    if not text or text.isspace():
        raise BadRecordError(EMPTY, "no text but whitespace")
    if "\0" in text:
        raise BadRecordError("NUL character", f"at character {text.index(chr(0))} of the text")
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecordError("lone surrogate", f"at character {error.start} of the text") from None
    return text
