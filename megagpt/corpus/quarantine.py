"""The list of records that could not be read as documents: quarantine.jsonl, one line each, in the order of input.

An entry has file, line (from 1), byte (offset in the uncompressed file) or row (from 0, of a columnar file), reason and
detail; what does not apply is null.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.corpus.records import HARMLESS
from megagpt.corpus.sources import SourceFile, one_line
from megagpt.errors import UserError

QUARANTINE_NAME = "quarantine.jsonl"
CONTAMINATED_NAME = "contaminated.jsonl"
_EXAMPLES_PER_REASON = 3


@dataclass(frozen=True)
class Quarantined:
    """What could not be read for one reason."""

    reason: str
    is_harmless: bool
    """Whether nothing that was text is lost by it."""
    records: int
    examples: list[dict[str, Any]]
    """The first of them, as the list has them."""


def write_quarantine(path: Path, chunks: Sequence[Path], files: Sequence[SourceFile]) -> list[Quarantined]:
    """Write the list from the results of the stage `extract`; return its summary, the most frequent reason first."""
    reasons: Counter[str] = Counter()
    examples: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    with open(path, "w", encoding="utf-8") as file:
        for record in _records(chunks, files):
            reason = record["reason"]
            reasons[reason] += 1
            if len(examples[reason]) < _EXAMPLES_PER_REASON:
                examples[reason].append(record)
            file.write(json.dumps(record) + "\n")
    return [Quarantined(reason, reason in HARMLESS, count, examples[reason]) for reason, count in reasons.most_common()]


def place(record: dict[str, Any]) -> str:
    """Where in its file an entry of the list is, in words."""
    return next(f"{unit} {record[unit]}" for unit in ("line", "row", "byte") if record[unit] is not None)


def check_bad_ratio(path: Path, bad: int, documents: int, max_bad: float) -> None:
    """UserError if `bad` of `documents` + `bad` records exceeds the share `max_bad`; shows the first in `path`."""
    if bad <= max_bad * (documents + bad):
        return
    with open(path, encoding="utf-8") as file:
        first = next(record for record in map(json.loads, file) if record["reason"] not in HARMLESS)
    where = f"{one_line(first['file'])}, {place(first)}"
    raise UserError(
        f"{bad:,} of {documents + bad:,} documents cannot be read ({bad / (documents + bad):.1%}, more than --max-bad "
        f"{max_bad}); the first: {where}: {first['reason']} ({first['detail']}); all of them: {one_line(path)}; "
        "mend the input, or raise --max-bad to go on without them"
    )


def _records(chunks: Sequence[Path], files: Sequence[SourceFile]) -> Iterator[dict[str, Any]]:
    lines_before: Counter[int] = Counter()  # of each file, in the chunks so far
    for chunk in chunks:
        with open(chunk / "bad.jsonl", encoding="utf-8") as bad:
            for record in map(json.loads, bad):
                index, line, position = record["file"], record["line"], record["position"]
                is_columnar = files[index].is_columnar
                yield {
                    "file": files[index].name,
                    "line": None if line is None else line + lines_before[index],
                    "byte": None if is_columnar else position,
                    "row": position if is_columnar else None,
                    "reason": record["reason"],
                    "detail": record["detail"],
                }
        for index, lines in json.loads((chunk / "lines.json").read_bytes()).items():
            lines_before[int(index)] += lines


def write_contaminated(path: Path, chunks: Sequence[Path], files: Sequence[SourceFile]) -> None:
    """Write the list of documents that stay though they share text with evaluation data: id, file and what it is."""
    with open(path, "w", encoding="utf-8") as lines:
        for chunk in chunks:
            with open(chunk / "contaminated.jsonl", encoding="utf-8") as found:
                for record in map(json.loads, found):
                    index = record["file"]
                    entry = {"id": f"{index}:{record['position']}", "file": files[index].name}
                    lines.write(json.dumps({**entry, "detail": record["detail"]}) + "\n")
