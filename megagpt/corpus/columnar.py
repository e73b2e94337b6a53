"""Parquet and Arrow files (IPC files such as Feather, and IPC streams such as `datasets` saves): one document a row.

A document's position is the number of its row, from 0. The row groups of a Parquet file are dealt out to its bytes
evenly, group g of n to byte g/n of the size, so that ranges of bytes can be read alone; an Arrow file is read whole.
Memory holds the texts of one batch of rows.
"""

from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from megagpt.corpus.records import BadRecord, BadRecordError, Document, ReadCount, checked, decode_utf8
from megagpt.corpus.sources import Piece, one_line
from megagpt.errors import UserError

DAMAGED_FILE = "damaged file"
_DAMAGE_ERRORS = (OSError, UnicodeDecodeError, pa.ArrowException)  # the second from names of columns
_ROWS_AT_ONCE = 256
_IPC_FILE_MAGIC = b"ARROW1"


def read_parquet(raw: IO[bytes], piece: Piece, text_key: str, count: ReadCount) -> Iterator[Document | BadRecord]:
    """The rows of the row groups of `piece`; `count.bytes` grows by the bytes of their texts.

    A damaged row group is one BadRecord at its first row that was not read; the others are read.
    UserError: the file has no column of text `text_key`.
    """
    try:
        file = pq.ParquetFile(raw)
        _check_column(file.schema_arrow, text_key, one_line(piece.file.name))
    except _DAMAGE_ERRORS as error:
        if piece.start == 0:  # once for the file
            yield _damaged(0, error)
        return
    position = 0
    for group in range(file.num_row_groups):
        if piece.start <= group * piece.file.size // file.num_row_groups < piece.stop:
            batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[text_key], use_threads=False)
            yield from _read_batches(batches, text_key, position, count)
        position += file.metadata.row_group(group).num_rows


def read_arrow(piece: Piece, text_key: str, count: ReadCount) -> Iterator[Document | BadRecord]:
    """The rows of an Arrow IPC file or stream; `count.bytes` grows by the bytes of their texts.

    Where it is damaged, a BadRecord at the first row that was not read ends it.
    UserError: the file has no column of text `text_key`.
    """
    with pa.memory_map(piece.file.name) as content:  # so that a wrong size in it cannot allocate memory
        is_file = content.read(len(_IPC_FILE_MAGIC)) == _IPC_FILE_MAGIC
        content.seek(0)
        try:
            if is_file:
                file = pa.ipc.open_file(content)
                schema, batches = file.schema, map(file.get_batch, range(file.num_record_batches))
            else:
                stream = pa.ipc.open_stream(content)
                schema, batches = stream.schema, iter(stream)
            _check_column(schema, text_key, one_line(piece.file.name))
        except _DAMAGE_ERRORS as error:
            yield _damaged(0, error)
            return
        yield from _read_batches(batches, text_key, 0, count)


def _check_column(schema: Any, text_key: str, name: str) -> None:
    columns = ", ".join(map(repr, schema.names[:20])) or "none"
    if schema.names.count(text_key) != 1:
        problem = "several columns" if text_key in schema.names else "no column"
        raise UserError(f"{name}: {problem} {text_key!r} among {columns}; choose the column with --text-key")
    kind = schema.field(text_key).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{name}: column {text_key!r} is {kind}, not string; choose one of {columns} with --text-key")


def _read_batches(
    batches: Iterator[Any], text_key: str, position: int, count: ReadCount
) -> Iterator[Document | BadRecord]:
    try:
        for batch in batches:
            for content in _contents(batch.column(text_key)):
                try:
                    if content is None:
                        raise BadRecordError("wrong type", f"{text_key!r} is null, not a string")
                    count.bytes += len(content)
                    yield Document(position, checked(decode_utf8(content)))
                except BadRecordError as bad:
                    yield BadRecord(position, None, *bad.args)
                position += 1
    except _DAMAGE_ERRORS as error:
        yield _damaged(position, error)


def _contents(column: Any) -> list[bytes | None]:
    """The bytes of each text, which may not be UTF-8; checked first, because Arrow trusts the offsets in a file."""
    is_plain = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    column.validate(full=not is_plain)  # in full, one text that is not UTF-8 makes the whole batch damaged
    column = column.cast(pa.large_binary())
    column.validate(full=True)
    return column.to_pylist()


def _damaged(position: int, error: Exception) -> BadRecord:
    if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the content's
        raise error
    return BadRecord(position, None, DAMAGED_FILE, " ".join(str(error).split()))
