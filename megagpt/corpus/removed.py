"""The list of documents that were removed: removed.jsonl.zst, one line each, in the order of ids.

A line has id ("file index:position", the index being that in sources.jsonl, the position a byte offset or, in a
columnar file, a row), file, stage, reason, detail, and, for duplicates, survivor (the id of the document that stays in
its stead) and similarity (estimated, 0 to 1).
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from megagpt.corpus.documents import Documents, Part
from megagpt.corpus.external import Records
from megagpt.corpus.extract import DOCUMENT, REMOVED
from megagpt.corpus.reasons import REASONS, Reason
from megagpt.corpus.workspace import map_array

REMOVED_NAME = "removed.jsonl.zst"
_BLOCK = 1 << 16


def write_lines(path: Path, documents: Documents, part: Part, files: Mapping[int, str], decisions: Records) -> None:
    """Write the lines of one part, given the DECISIONs about its documents."""
    before = _removed_before(part, files)
    pending = next(before, None)
    with open(path, "w", encoding="utf-8") as lines:
        for place, line in _duplicates(documents, part, files, decisions):
            while pending is not None and pending[0] < place:
                lines.write(pending[1])
                pending = next(before, None)
            lines.write(line)
        while pending is not None:
            lines.write(pending[1])
            pending = next(before, None)


Line = tuple[tuple[int, int], str]
"""A document's (file index, position), and its line."""


def _removed_before(part: Part, files: Mapping[int, str]) -> Iterator[Line]:
    """Documents that `extract` removed."""
    removed = map_array(part.folder / "removed.bin", REMOVED)
    with open(part.folder / "details.jsonl", encoding="utf-8") as details:
        for start in range(0, removed.size, _BLOCK):
            for file, position, _, code in removed[start : start + _BLOCK].tolist():
                yield (file, position), _line(file, position, files, REASONS[code], json.loads(next(details)))


def _duplicates(documents: Documents, part: Part, files: Mapping[int, str], decisions: Records) -> Iterator[Line]:
    """Documents that `exact` and `near` removed."""
    rows = map_array(part.folder / "documents.bin", DOCUMENT)
    places = np.flatnonzero(decisions["removed_by"])
    for start in range(0, places.size, _BLOCK):
        block = places[start : start + _BLOCK]
        survivors = documents.gather("documents.bin", DOCUMENT, decisions["survivor"][block])
        for row, survivor, decision in zip(rows[block], survivors, decisions[block].tolist(), strict=True):
            file, position = int(row["file"]), int(row["position"])
            line = _line(
                file,
                position,
                files,
                REASONS[decision[0] - 1],
                "",
                survivor=f"{survivor['file']}:{survivor['position']}",
                similarity=round(decision[2], 4),
            )
            yield (file, position), line


def _line(file: int, position: int, files: Mapping[int, str], reason: Reason, detail: str, **more: Any) -> str:
    record = {
        "id": f"{file}:{position}",
        "file": files[file],
        "stage": reason.stage,
        "reason": reason.text,
        "detail": detail,
        "survivor": None,
        "similarity": None,
    }
    return json.dumps({**record, **more}) + "\n"


def write_removed(path: Path, parts: Sequence[Path]) -> None:
    """Join and compress the lines of all parts, results of the stage `select`."""
    with open(path, "wb") as raw, zstandard.ZstdCompressor().stream_writer(raw, closefd=False) as compressed:
        for part in parts:
            with open(part / "removed.jsonl", "rb") as lines:
                shutil.copyfileobj(lines, compressed, 1 << 20)
