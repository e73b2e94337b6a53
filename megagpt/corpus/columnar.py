"""Parquet and Arrow files (IPC files such as Feather, and IPC streams such as `datasets` saves): one document a row.

A document's position is the number of its row, from 0. The row groups of a Parquet file are dealt out to its bytes
evenly, group g of n to byte g/n of the size, so that ranges of bytes can be read alone; an Arrow file is read whole.
Memory holds a few MiB of texts, or, where more lies in one page of a Parquet file, that page; an Arrow file is mapped.
"""

import os
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from megagpt.corpus.records import NULL, BadRecord, BadRecordError, Document, ReadCount, checked, decode_utf8, too_large
from megagpt.corpus.sources import Piece

DAMAGED_FILE, NO_COLUMN = "damaged file", "missing column"
_DAMAGE_ERRORS = (OSError, UnicodeDecodeError, pa.ArrowException)  # the second from names of columns
_MOST_ROWS, _BATCH_BYTES = 256, 1 << 20  # read at once
_STREAM_BYTES = 1 << 20  # of a column at once, and not the column of a whole row group
_MOST_DICTIONARY_BYTES = 1 << 26  # that a batch may hold of values that are stored once and stand in many rows
_IPC_FILE_MAGIC = b"ARROW1"


def read_parquet(
    raw: IO[bytes], piece: Piece, text_key: str, count: ReadCount, max_bytes: int
) -> Iterator[Document | BadRecord]:
    """The rows of the row groups of `piece`; `count.bytes` grows by the bytes of their texts.

    A damaged row group is one BadRecord at its first row that was not read; the others are read. A file without a
    column of text `text_key` is one BadRecord.
    """
    try:
        file = pq.ParquetFile(raw, buffer_size=_STREAM_BYTES, pre_buffer=False)
        _check_column(file.schema_arrow, text_key)
        leaves = [file.metadata.schema.column(number).path for number in range(file.metadata.num_columns)]
        column = leaves.index(text_key)
    except (*_DAMAGE_ERRORS, BadRecordError) as error:
        if piece.start == 0:  # once for the file
            yield _damaged(0, error)
        return
    position = rows_read = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        if piece.start <= group * piece.file.size // file.num_row_groups < piece.stop:
            try:
                rows = _rows_at_once(metadata.num_rows, metadata.column(column))
            except _DAMAGE_ERRORS as error:
                yield _damaged(position, error)
            else:
                batches = file.iter_batches(rows, row_groups=[group], columns=[text_key], use_threads=False)
                for record in _read_batches(batches, text_key, position, count, max_bytes):
                    rows_read += 1
                    count.stored_bytes = rows_read * piece.file.size // file.metadata.num_rows
                    yield record
        position += metadata.num_rows


def _rows_at_once(rows: int, column: Any) -> int:
    """Rows of a row group that are about _BATCH_BYTES of text, by what the metadata of the column says."""
    most = _BATCH_BYTES * rows // max(1, column.total_uncompressed_size)
    if column.has_dictionary_page:
        most = min(most, _MOST_DICTIONARY_BYTES // max(1, column.data_page_offset - column.dictionary_page_offset))
    return min(max(most, 1), _MOST_ROWS)


def read_arrow(
    raw: IO[bytes], piece: Piece, text_key: str, count: ReadCount, max_bytes: int
) -> Iterator[Document | BadRecord]:
    """The rows of an Arrow IPC file or stream; `count.bytes` grows by the bytes of their texts.

    Where it is damaged, a BadRecord at the first row that was not read ends it. A file without a column of text
    `text_key` is one BadRecord.
    """
    # Mapped, so that a wrong size in it cannot allocate memory.
    with pa.PythonFile(raw) if piece.file.is_on_hub else pa.memory_map(os.fsencode(piece.file.name)) as content:
        is_file = content.read(len(_IPC_FILE_MAGIC)) == _IPC_FILE_MAGIC
        content.seek(0)
        try:
            if is_file:
                file = pa.ipc.open_file(content)
                schema, batches = file.schema, map(file.get_batch, range(file.num_record_batches))
            else:
                stream = pa.ipc.open_stream(content)
                schema, batches = stream.schema, iter(stream)
            _check_column(schema, text_key)
        except (*_DAMAGE_ERRORS, BadRecordError) as error:
            yield _damaged(0, error)
            return
        yield from _read_batches(batches, text_key, 0, count, max_bytes)


def _check_column(schema: Any, text_key: str) -> None:
    columns = ", ".join(map(repr, schema.names[:20])) or "none"
    if schema.names.count(text_key) != 1:
        problem = "several columns" if text_key in schema.names else "no column"
        raise BadRecordError(NO_COLUMN, f"{problem} {text_key!r} among {columns}; choose the column with --text-key")
    kind = schema.field(text_key).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        detail = f"column {text_key!r} is {kind}, not string; choose one of {columns} with --text-key"
        raise BadRecordError("wrong type", detail)


def _read_batches(
    batches: Iterator[Any], text_key: str, position: int, count: ReadCount, max_bytes: int
) -> Iterator[Document | BadRecord]:
    try:
        for batch in batches:
            for content in _contents(batch.column(text_key)):
                try:
                    if content is None:
                        raise BadRecordError("wrong type", f"{text_key!r} is {NULL}")
                    count.bytes += len(content)
                    if len(content) > max_bytes:
                        raise too_large(max_bytes, len(content))
                    yield Document(position, checked(decode_utf8(content)))
                except BadRecordError as bad:
                    yield BadRecord(position, None, *bad.args)
                position += 1
    except _DAMAGE_ERRORS as error:
        yield _damaged(position, error)


def _contents(column: Any) -> Iterator[bytes | None]:
    """The bytes of each text, which may not be UTF-8; checked first, because Arrow trusts the offsets in a file."""
    is_plain = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    column.validate(full=not is_plain)  # in full, one text that is not UTF-8 makes the whole batch damaged
    if is_plain:
        column = column.cast(pa.large_binary())  # of which the texts are no copies
        column.validate(full=True)
        rows = len(column) * _BATCH_BYTES // max(1, column.nbytes)
    else:  # the values of a dictionary may stand in many rows, and each be as large as all of them
        values = column.dictionary if pa.types.is_dictionary(column.type) else column
        rows = _MOST_DICTIONARY_BYTES // max(1, values.nbytes)
    rows = min(max(rows, 1), _MOST_ROWS)
    for start in range(0, len(column), rows):
        yield from column.slice(start, rows).cast(pa.large_binary()).to_pylist()


def _damaged(position: int, error: Exception) -> BadRecord:
    if isinstance(error, BadRecordError):
        return BadRecord(position, None, *error.args)
    if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the content's
        raise error
    return BadRecord(position, None, DAMAGED_FILE, " ".join(str(error).split()))
