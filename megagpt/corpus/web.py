"""Web pages: the main content of HTML, and WARC archives (ISO 28500) of pages or of their texts (WET).

A page of an archive is a `response` record of HTTP status 200 with HTML; a text is a `conversion` record. All other
records (requests, metadata, redirects, images) are no documents. A position is the offset of the record in the
uncompressed archive. Needs the `web` extra, fastwarc and resiliparse; a page that would take them too much time or
memory is a bad record (page_bounds.py).
"""

import io
import os
import zlib
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Literal

from megagpt.corpus.compression import DAMAGED_ERRORS, FrameReader
from megagpt.corpus.page_bounds import check_page, check_tree
from megagpt.corpus.records import (
    DAMAGED,
    EMPTY,
    BadRecord,
    BadRecordError,
    Document,
    ReadCount,
    checked,
    decode_utf8,
    too_large,
)

if TYPE_CHECKING:
    from fastwarc.warc import WarcRecord

_RECORD_BEGINNING = b"WARC/"
_LONGEST_HTTP_HEADER = 1 << 16  # that is looked at, of a record that is too large
_WINDOW_BITS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}  # zlib's numbers of the formats
_HTML_TYPES = ("text/html", "application/xhtml+xml")


def main_text(content: bytes, charset: str | None = None) -> str:
    """The text of the main content of an HTML page, without menus, headers and footers; "" if it has none.

    Bytes that are valid UTF-8 are taken as that, others as `charset`, else as what the page declares or looks like.
    BadRecordError: it would take too much time or memory.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    page = _decode_html(content, charset)
    check_page(page)
    tree = HTMLTree.parse(page)
    check_tree(tree, page)
    return extract_plain_text(tree, main_content=True, alt_texts=False)


def _decode_html(content: bytes, charset: str | None) -> str:
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    if b"\x1b" not in content:  # ISO-2022 texts are valid UTF-8
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            pass
    encoding = map_encoding_to_html5(charset, fallback_utf8=False) if charset else None
    encoding = encoding or detect_encoding(content, html5_compatible=True, from_html_meta=True) or "utf-8"
    return bytes_to_str(content, encoding, errors="replace")


def read_warc(stream: IO[bytes], count: ReadCount, max_bytes: int) -> Iterator[Document | BadRecord]:
    """The pages and texts of an archive, given uncompressed; `count.bytes` grows by the bytes of their records.

    Where the archive is damaged or cut short, there is a BadRecord with the position of the last record. It ends the
    archive, unless that is compressed with gzip and a later member of it begins with a record: there reading goes on.
    Positions then are as if what could not be decompressed had not been there.
    """
    begin, is_empty = 0, True
    while True:
        source = _Source(stream, begin)
        for found in _read_records(source, count, max_bytes):
            is_empty = False
            yield found
        if source.problem is None:
            break
        reason, detail = source.problem
        is_empty = False
        yield BadRecord(source.record, None, reason, f"{detail}, at or after the record at this byte of its content")
        offset = stream.skip_damage(_RECORD_BEGINNING, source.record) if isinstance(stream, FrameReader) else None
        if offset is None:
            break
        begin = offset
    if is_empty:
        yield BadRecord(0, None, EMPTY, "no HTML response and no conversion record")


def _read_records(source: "_Source", count: ReadCount, max_bytes: int) -> Iterator[Document | BadRecord]:
    """What `read_warc` gives up to the first damage, of which `source` then knows."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    try:
        for record in ArchiveIterator(source, parse_http=False, stream_detect=False):
            source.record = source.begin + record.stream_pos
            if not record.headers.get("Content-Length"):  # cut short in its header, which fastwarc would hide
                raise EOFError("a record has no Content-Length")
            is_page = record.record_type == WarcRecordType.response
            if not is_page and record.record_type != WarcRecordType.conversion:
                continue
            is_large = record.content_length > max_bytes
            size = min(record.content_length, _LONGEST_HTTP_HEADER) if is_large else record.content_length
            block = record.reader.read(size) if size else b""
            if len(block) < size:
                raise EOFError(f"the file ends {len(block)} bytes into a record of {record.content_length}")
            found = _read_block(source.record, block, is_page, max_bytes, record.content_length)
            if found is not None:
                count.bytes += len(block)
                yield found
    except (EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the content's
            raise
        source.problem = source.problem or ("malformed WARC", str(error))


class _Source:
    """A stream as fastwarc wants it. It ends at damage, which fastwarc would hide, and remembers that."""

    def __init__(self, stream: IO[bytes], begin: int) -> None:
        self._stream = stream
        self._position = 0
        self.begin = begin
        """Offset of the first byte in the archive."""
        self.record = begin
        """Offset of the last record in the archive."""
        self.problem: tuple[str, str] | None = None
        """Reason and detail of what ended it."""

    def read(self, size: int = -1) -> bytes:
        try:
            content = self._stream.read(size)
        except DAMAGED_ERRORS as error:
            self.problem = DAMAGED, str(error)
            return b""
        self._position += len(content)
        return content

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        raise io.UnsupportedOperation("archives are read from beginning to end")

    def close(self) -> None:
        """Who opened the stream closes it."""


def _read_block(
    position: int, block: bytes, is_page: bool, max_bytes: int, content_length: int
) -> Document | BadRecord | None:
    """What a record's block holds, or if it is too large its beginning; None for what is no document."""
    try:
        if is_page and not _is_html(block):
            return None
        if content_length > max_bytes:
            raise too_large(max_bytes, content_length)
        return Document(position, checked(_page_text(block, max_bytes) if is_page else decode_utf8(block)))
    except BadRecordError as bad:
        return BadRecord(position, None, *bad.args)


def _is_html(block: bytes) -> bool:
    """Whether an HTTP response, or its beginning, is HTML and of status 200."""
    try:
        response = _parse_http(block, "none")
        content_type = (response.http_content_type or "").lower()
        return response.http_headers.status_code == 200 and content_type in _HTML_TYPES
    except OSError as error:
        raise BadRecordError("malformed HTTP", str(error)) from None


def _page_text(block: bytes, max_bytes: int) -> str:
    """The main text of an HTTP response."""
    try:
        response = _parse_http(block, "all")
        body = response.reader.read(max_bytes + 1)
    except OSError as error:
        raise BadRecordError("malformed HTTP", str(error)) from None
    if len(body) > max_bytes:
        raise too_large(max_bytes)
    _check_complete(block, max_bytes)
    return main_text(body, response.http_charset)


def _check_complete(block: bytes, max_bytes: int) -> None:
    """BadRecordError: the body of an HTTP response is compressed and cut short, which fastwarc does not tell."""
    response = _parse_http(block, "transfer")
    encoding = (response.http_headers.get("Content-Encoding") or "").strip().lower()
    if encoding not in _WINDOW_BITS:
        return
    body = response.reader.read(len(block))
    for bits in _WINDOW_BITS[encoding]:
        inflater = zlib.decompressobj(wbits=bits)
        try:
            inflater.decompress(body, max_bytes + 1)
        except zlib.error:
            continue
        if inflater.eof:
            return
    raise BadRecordError("malformed HTTP", f"the {encoding} body is damaged or cut short")


def _parse_http(block: bytes, auto_decode: Literal["none", "transfer", "all"]) -> "WarcRecord":
    from fastwarc.warc import WarcRecord, WarcRecordType

    record = WarcRecord()
    record.init_headers(WarcRecordType.response)
    record.is_http = True
    record.set_bytes_content(block)
    record.parse_http(auto_decode)
    return record
