"""Stage `extract`: the documents of a chunk, read, screened (cleaned, filtered) and hashed.

They come in parts, folders part_00000 and so on, of a bounded size, whatever the size of the chunk. Documents that stay
are in text.bin (the texts in UTF-8, one after another), documents.bin (a DOCUMENT each), hashes.bin (a HASHED each,
sorted, for the stage `exact`), and, for near-duplicates, signatures.bin (num_perm uint32 a document). Those that do not
are in removed.bin (a REMOVED each) and details.jsonl (a string each).

Beside the parts: examples.json (the beginnings of the first few removed texts by reason), bad.jsonl (a BadRecord each,
with its file's index), contaminated.jsonl (file, position and detail of each document that stays though it shares text
with evaluation data), lines.json (lines by file index).

From here on a document's *number* is its place among all documents that stay, in the order of ids.
"""

import contextlib
import dataclasses
import json
import os
import struct
from collections import defaultdict
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from megagpt.corpus.config import DedupConfig
from megagpt.corpus.hashing import collapse_whitespace, shingle_hashes, text_hash
from megagpt.corpus.minhash import signature
from megagpt.corpus.plan import Chunk
from megagpt.corpus.reading import read_piece
from megagpt.corpus.records import HARMLESS, BadRecord, Document, ReadCount
from megagpt.corpus.screening import Screened, Screening
from megagpt.corpus.sources import Piece, one_line
from megagpt.corpus.workspace import Position, Receipt, map_array, write_array
from megagpt.errors import UserError

DOCUMENT = np.dtype(
    [("file", "<u4"), ("position", "<u8"), ("begin", "<u8"), ("size", "<u8"), ("low", "<u8"), ("high", "<u8")]
)
"""A document that stays: its id (file index, position), first byte and bytes of its text, the halves of its hash."""
HASHED = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u4")])
"""A document's hash and its number within the part."""
REMOVED = np.dtype([("file", "<u4"), ("position", "<u8"), ("size", "<u8"), ("reason", "u1")])
"""A document that was removed: its id, the bytes of its text after cleaning, and the code of the reason."""

PART_BYTES, PART_DOCUMENTS = 1 << 27, 1 << 18
"""A part ends when its texts, its documents, removed ones included, or the bytes of their signatures reach this."""
EXAMPLES_PER_REASON = 3
EXAMPLE_CHARACTERS = 600
_COUNTS = (
    *("documents", "kept", "contaminated", "bad", "harmless"),
    *("bytes", "stored_bytes", "text_bytes", "kept_text_bytes"),
)
_DOCUMENT, _REMOVED = struct.Struct("<IQQQQQ"), struct.Struct("<IQQB")
assert (_DOCUMENT.size, _REMOVED.size) == (DOCUMENT.itemsize, REMOVED.itemsize)


@dataclass(frozen=True)
class ExtractTask:
    """The documents of one chunk."""

    chunk: Chunk
    text_key: str
    max_document_bytes: int
    screening: Screening
    dedup: DedupConfig
    most_bytes: int | None = None
    """Bytes of records after which reading ends, for an estimate; None: the chunk is read whole."""

    def __str__(self) -> str:
        return str(self.chunk)

    def run(self, folder: Path) -> Receipt:
        """See the module; counts documents, kept ones, contaminated ones of these, bad and harmless records, bytes,
        stored bytes, text bytes, kept text bytes; documents and bytes by the key of each reason, and by language."""
        receipt: Receipt = dict.fromkeys(_COUNTS, 0)
        lines: dict[int, int] = {}
        with _ChunkWriter(folder, self.dedup, receipt) as writer, Position(folder) as place:
            for piece in self.chunk.pieces:
                if self._is_enough(receipt["bytes"]):
                    break
                count = ReadCount()
                name = os.fsencode(one_line(piece.file.name))
                with contextlib.closing(self._read(piece, count)) as records:
                    for record in records:
                        place.set(name, record.position)
                        self._add(writer, piece, record)
                        if self._is_enough(receipt["bytes"] + count.bytes):
                            break
                receipt["bytes"] += count.bytes
                receipt["stored_bytes"] += count.stored_bytes
                if piece.file.is_in_lines:
                    lines[piece.file_index] = count.lines
        (folder / "lines.json").write_text(json.dumps(lines))
        return receipt

    def _read(self, piece: Piece, count: ReadCount) -> Generator[Document | BadRecord, None, None]:
        """The records of a piece; errors tell the file, and how far it was read."""
        position = piece.start
        with contextlib.closing(read_piece(piece, self.text_key, count, self.max_document_bytes)) as records:
            try:
                for record in records:
                    position = record.position
                    yield record
            except UserError:
                raise
            except Exception as error:
                raise _located(error, piece, f"reading on from position {position}") from error

    def _is_enough(self, size: float) -> bool:
        return self.most_bytes is not None and size >= self.most_bytes

    def _add(self, writer: "_ChunkWriter", piece: Piece, record: Document | BadRecord) -> None:
        if isinstance(record, BadRecord):
            writer.add_bad(piece.file_index, record)
            return
        try:
            writer.add(piece.file_index, record.position, self.screening(record.text))
        except OSError:
            raise  # of the disk, and not about the document
        except Exception as error:
            raise _located(error, piece, f"document at position {record.position}") from error


def _located(error: Exception, piece: Piece, where: str) -> Exception:
    where = f"{one_line(piece.file.name)}, {where}"
    if isinstance(error, OSError):
        return UserError(f"{where}: {error.strerror or error}; mend that, and run the same command again to go on")
    if isinstance(error, MemoryError):
        return UserError(f"{where}: out of memory; run the same command again with fewer --workers")
    return RuntimeError(f"{where}: {type(error).__name__}: {error}")


class _ChunkWriter:
    """The files of one chunk; counts in `receipt` what they get."""

    def __init__(self, folder: Path, dedup: DedupConfig, receipt: Receipt) -> None:
        self._folder, self._dedup, self._receipt = folder, dedup, receipt
        signature_bytes = 4 * dedup.num_perm if dedup.method == "minhash" else 1
        self._most_documents = max(1, min(PART_DOCUMENTS, PART_BYTES // signature_bytes))
        self._examples: defaultdict[str, list[dict[str, object]]] = defaultdict(list)
        self._parts = 0

    def __enter__(self) -> "_ChunkWriter":
        self._bad = open(self._folder / "bad.jsonl", "w", encoding="utf-8")
        self._contaminated = open(self._folder / "contaminated.jsonl", "w", encoding="utf-8")
        self._part = ExitStack()
        self._begin_part()
        return self

    def __exit__(self, *error: object) -> None:
        self._part.close()
        self._bad.close()
        self._contaminated.close()
        if not any(error):
            self._end_part()
            (self._folder / "examples.json").write_text(json.dumps(self._examples))

    def _begin_part(self) -> None:
        self._part_folder = self._folder / f"part_{self._parts:05d}"
        self._part_folder.mkdir()
        self._parts += 1
        self._part_documents = self._part_bytes = 0
        names = ("text.bin", "documents.bin", "signatures.bin", "removed.bin", "details.jsonl")
        self._texts, self._documents, self._signatures, self._removed, self._details = map(self._open, names)

    def _open(self, name: str) -> IO[bytes]:
        return self._part.enter_context(open(self._part_folder / name, "wb"))

    def _end_part(self) -> None:
        self._part.close()
        documents = map_array(self._part_folder / "documents.bin", DOCUMENT)
        write_array(self._part_folder / "hashes.bin", _sorted_hashes(documents))

    def add_bad(self, file_index: int, record: BadRecord) -> None:
        """Something that is not a document."""
        self._receipt["harmless" if record.reason in HARMLESS else "bad"] += 1
        self._bad.write(json.dumps({"file": file_index, **dataclasses.asdict(record)}) + "\n")

    def add(self, file_index: int, position: int, screened: Screened) -> None:
        """A document."""
        if self._part_documents >= self._most_documents or self._part_bytes >= PART_BYTES:
            self._end_part()
            self._begin_part()
        content = screened.text.encode()
        self._part_documents += 1
        self._receipt["documents"] += 1
        self._receipt["text_bytes"] += len(content)
        if screened.language:
            self._count("language", screened.language, len(content))
        if screened.reason is not None:
            self._add_removed(file_index, position, screened, len(content))
            return
        if screened.contamination:
            record = {"file": file_index, "position": position, "detail": screened.contamination}
            self._contaminated.write(json.dumps(record) + "\n")
            self._receipt["contaminated"] += 1
        words = collapse_whitespace(content)
        self._texts.write(content)
        row = (file_index, position, self._part_bytes, len(content), *text_hash(words))
        self._documents.write(_DOCUMENT.pack(*row))
        if self._dedup.method == "minhash":
            hashes = shingle_hashes(words, self._dedup.shingle_size, self._dedup.shingle_unit)
            self._signatures.write(signature(hashes, self._dedup.num_perm).data)
        self._part_bytes += len(content)
        self._receipt["kept"] += 1
        self._receipt["kept_text_bytes"] += len(content)

    def _count(self, what: str, key: str, size: int) -> None:
        for name, amount in ((f"{what} {key}", 1), (f"{what} bytes {key}", size)):
            self._receipt[name] = self._receipt.get(name, 0) + amount

    def _add_removed(self, file_index: int, position: int, screened: Screened, size: int) -> None:
        reason = screened.reason
        assert reason is not None
        self._removed.write(_REMOVED.pack(file_index, position, size, reason.code))
        self._details.write(json.dumps(screened.detail).encode() + b"\n")
        self._count("removed", reason.key, size)
        examples = self._examples[reason.key]
        if len(examples) < EXAMPLES_PER_REASON:
            text = screened.text[:EXAMPLE_CHARACTERS]
            examples.append({"id": f"{file_index}:{position}", "detail": screened.detail, "text": text})


def _sorted_hashes(documents: "np.ndarray") -> "np.ndarray":
    hashes = np.empty(documents.size, HASHED)
    order = np.lexsort((documents["low"], documents["high"]))  # stable: equal hashes stay in the order of numbers
    hashes["high"], hashes["low"], hashes["number"] = documents["high"][order], documents["low"][order], order
    return hashes
