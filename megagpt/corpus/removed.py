"""The list of documents that were removed: removed.jsonl.zst, one line each, in the order of ids.

A line has id ("file index:position", the index being that in the sorted input, the position a byte offset or, in a
columnar file, a row), file, stage and reason, and, for duplicates, survivor (the id of the document that stays in its
stead) and similarity (estimated, 0 to 1).
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import zstandard

from megagpt.corpus.extract import document_field
from megagpt.corpus.select import DECISION, REMOVED_BY
from megagpt.corpus.sources import SourceFile
from megagpt.corpus.workspace import map_array

_REASONS = {"clean": "empty after cleaning", "exact": "same text", "near": "near-duplicate"}


def write_removed(path: Path, select: Path, chunks: Sequence[Path], files: Sequence[SourceFile]) -> None:
    """Write the list from the results of the stages `select` and `extract`."""
    decisions = map_array(select / "decisions.bin", DECISION)
    file_indices, positions = document_field(chunks, "file"), document_field(chunks, "position")

    def document_id(number: int) -> str:
        return f"{file_indices[number]}:{positions[number]}"

    with (
        open(path, "wb") as raw,
        zstandard.ZstdCompressor().stream_writer(raw, closefd=False) as compressed,
        io.TextIOWrapper(compressed, encoding="utf-8") as lines,
    ):
        for number in np.flatnonzero(decisions["removed_by"]).tolist():
            removed_by, _, survivor, similarity = decisions[number].item()
            stage = REMOVED_BY[removed_by]
            record = {
                "id": document_id(number),
                "file": files[file_indices[number]].name,
                "stage": stage,
                "reason": _REASONS[stage],
                "survivor": document_id(survivor) if survivor >= 0 else None,
                "similarity": round(similarity, 4) if survivor >= 0 else None,
            }
            lines.write(json.dumps(record) + "\n")
