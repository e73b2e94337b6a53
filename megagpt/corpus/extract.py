"""Stage `extract`: the documents of a chunk, read, cleaned and hashed.

Writes text.bin (the cleaned texts in UTF-8, one after another), documents.bin (a DOCUMENT each), bad.jsonl (a
BadRecord each, with its file's index), lines.json (lines by file index) and, for near-duplicates, signatures.bin
(num_perm uint32 a document).
"""

import dataclasses
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.corpus.clean import clean
from megagpt.corpus.config import CleanConfig, DedupConfig
from megagpt.corpus.hashing import collapse_whitespace, shingle_hashes, text_hash
from megagpt.corpus.minhash import signature
from megagpt.corpus.plan import Chunk
from megagpt.corpus.reading import read_piece
from megagpt.corpus.records import HARMLESS, BadRecord, Document, ReadCount
from megagpt.corpus.workspace import Receipt, map_array

DOCUMENT = np.dtype(
    [("file", "<u4"), ("position", "<u8"), ("size", "<u8"), ("hash_low", "<u8"), ("hash_high", "<u8"), ("removed", "?")]
)
"""A document: its id (file index, position), size of its text in bytes, hash, and whether cleaning left nothing."""

_RECORD = struct.Struct("<IQQQQ?")
assert _RECORD.size == DOCUMENT.itemsize


def document_field(chunks: Sequence[Path], name: str) -> npt.NDArray[Any]:
    """One field of all documents, in the order of ids; `chunks` are results of this stage."""
    return np.concatenate([map_array(chunk / "documents.bin", DOCUMENT)[name].copy() for chunk in chunks])


@dataclass(frozen=True)
class ExtractTask:
    """The documents of one chunk."""

    chunk: Chunk
    text_key: str
    clean: CleanConfig
    dedup: DedupConfig

    def __str__(self) -> str:
        return str(self.chunk)

    def run(self, folder: Path) -> Receipt:
        """See the module; counts documents, emptied ones (by cleaning), bad and harmless records, bytes, text bytes."""
        receipt: Receipt = dict.fromkeys(("documents", "emptied", "bad", "harmless", "bytes", "text_bytes"), 0)
        lines: dict[int, int] = {}
        with (
            open(folder / "text.bin", "wb") as texts,
            open(folder / "documents.bin", "wb") as documents,
            open(folder / "signatures.bin", "wb") as signatures,
            open(folder / "bad.jsonl", "w", encoding="utf-8") as bad,
        ):
            for piece in self.chunk.pieces:
                count = ReadCount()
                for record in read_piece(piece, self.text_key, count):
                    if isinstance(record, BadRecord):
                        receipt["harmless" if record.reason in HARMLESS else "bad"] += 1
                        bad.write(json.dumps({"file": piece.file_index, **dataclasses.asdict(record)}) + "\n")
                        continue
                    try:
                        text, row, values = self._process(record, piece.file_index)
                    except Exception as error:
                        raise RuntimeError(f"{piece.file.name}, document at position {record.position}") from error
                    texts.write(text)
                    documents.write(row)
                    signatures.write(values)
                    receipt["documents"] += 1
                    receipt["emptied"] += not text
                    receipt["text_bytes"] += len(text)
                receipt["bytes"] += count.bytes
                if piece.file.kind == "jsonl":
                    lines[piece.file_index] = count.lines
        (folder / "lines.json").write_text(json.dumps(lines))
        return receipt

    def _process(self, document: Document, file_index: int) -> tuple[bytes, bytes, bytes]:
        """The document's cleaned text, its DOCUMENT and its signature, as they are written."""
        text = document.text
        if self.clean.enabled:
            text = clean(text, self.clean.repair_encoding)
        content = text.encode()
        words = collapse_whitespace(content)
        row = _RECORD.pack(file_index, document.position, len(content), *text_hash(words), not content)
        if self.dedup.method != "minhash":
            return content, row, b""
        hashes = shingle_hashes(words, self.dedup.shingle_words)
        return content, row, signature(hashes, self.dedup.num_perm).tobytes()
