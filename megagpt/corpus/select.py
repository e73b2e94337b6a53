"""Stage `select`: the fate of every document of a part, from what the stages before found out.

Writes decisions.bin (a DECISION for each document that `extract` left), removed.jsonl (a line for every removed one,
those of `extract` included, in the order of ids; see `removed`) and examples.json (of the first few duplicates
the beginning, or what is around the first difference from what stays in their stead, and the same of that).
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.corpus.config import DedupConfig
from megagpt.corpus.documents import Documents, Part
from megagpt.corpus.external import Records
from megagpt.corpus.extract import DOCUMENT, EXAMPLE_CHARACTERS, EXAMPLES_PER_REASON
from megagpt.corpus.hashing import UInt64
from megagpt.corpus.minhash import row_similarity
from megagpt.corpus.near import part_pairs
from megagpt.corpus.reasons import EXACT, NEAR
from megagpt.corpus.removed import write_lines
from megagpt.corpus.splits import draws, split_of
from megagpt.corpus.workspace import Receipt, map_array, write_array

DECISION = np.dtype([("removed_by", "u1"), ("survivor", "<u8"), ("similarity", "<f4")])
"""0, or 1 + the code of the reason; the number of the document that stays in its stead, or its own; the estimated
similarity to it, 0 to 1."""

_SURVIVOR_BLOCK = 1 << 16
_CONTEXT = 200  # bytes shown before the first difference of two texts


@dataclass(frozen=True)
class SelectTask:
    """The documents of one part."""

    documents: Documents
    part: Part
    files: dict[int, str]
    """Names of the files that the part's documents are from, by their index."""
    exact: list[Path]
    """Results of the stage `exact`; none: not wanted."""
    clusters: list[Path]
    """Result of the stage `clusters`; none: not wanted."""
    dedup: DedupConfig
    bounds: list[int]
    """Nominal bounds of the splits."""
    seed: int

    def __str__(self) -> str:
        return str(self.part)

    def run(self, folder: Path) -> Receipt:
        """See the module; counts documents, kept ones (also by number of split), documents and bytes of each reason."""
        rows = map_array(self.part.folder / "documents.bin", DOCUMENT)
        decisions = self._decide()
        write_array(folder / "decisions.bin", decisions)
        kept = decisions["removed_by"] == 0
        receipt: Receipt = {"documents": self.part.count, "kept": int(np.count_nonzero(kept))}
        splits = split_of(draws(rows["low"][kept], self.seed), self.bounds)
        for split, count in enumerate(np.bincount(splits, minlength=len(self.bounds) + 1).tolist()):
            receipt[f"split {split}"] = count
        for reason in (EXACT, NEAR):
            chosen = decisions["removed_by"] == 1 + reason.code
            receipt[f"removed {reason.key}"] = int(np.count_nonzero(chosen))
            receipt[f"removed bytes {reason.key}"] = int(rows["size"][chosen].sum())
        write_lines(folder / "removed.jsonl", self.documents, self.part, self.files, decisions)
        (folder / "examples.json").write_text(json.dumps(self._examples(decisions)))
        return receipt

    def _decide(self) -> Records:
        decisions = np.zeros(self.part.count, DECISION)
        decisions["survivor"] = self.part.first + np.arange(self.part.count)
        decisions["similarity"] = 1
        for reason, folders in ((NEAR, self.clusters), (EXACT, self.exact)):
            pairs = part_pairs(self.part, folders)
            places = pairs["member"].astype(np.int64) - self.part.first
            decisions["removed_by"][places] = 1 + reason.code
            if reason is NEAR or not self.clusters:  # clusters hold the exact copies, too
                decisions["survivor"][places] = pairs["leader"]
        if self.clusters:
            self._estimate(decisions)
        return decisions

    def _estimate(self, decisions: Records) -> None:
        own = map_array(self.part.folder / "signatures.bin", np.uint32, self.dedup.num_perm)
        removed = np.flatnonzero(decisions["removed_by"])
        for start in range(0, removed.size, _SURVIVOR_BLOCK):
            places = removed[start : start + _SURVIVOR_BLOCK]
            numbers = decisions["survivor"][places]
            survivors = self.documents.gather("signatures.bin", np.uint32, numbers, self.dedup.num_perm)
            decisions["similarity"][places] = row_similarity(own[places], survivors)

    def _examples(self, decisions: Records) -> dict[str, list[dict[str, object]]]:
        examples: defaultdict[str, list[dict[str, object]]] = defaultdict(list)
        for reason in (EXACT, NEAR):
            for place in np.flatnonzero(decisions["removed_by"] == 1 + reason.code)[:EXAMPLES_PER_REASON].tolist():
                number, survivor = self.part.first + place, int(decisions["survivor"][place])
                text, survivor_text = _difference(self.documents.text(number), self.documents.text(survivor))
                examples[reason.key].append(
                    {
                        "id": self.documents.id(number),
                        "detail": f"similarity {decisions['similarity'][place]:.2f}",
                        "text": text,
                        "survivor": self.documents.id(survivor),
                        "survivor_text": survivor_text,
                    }
                )
        return examples


def beginning(text: bytes) -> str:
    """The first characters of a text in UTF-8, for a person."""
    return text[: 4 * EXAMPLE_CHARACTERS].decode(errors="ignore")[:EXAMPLE_CHARACTERS]


def _difference(text: bytes, other: bytes) -> tuple[str, str]:
    """The beginnings of two texts, or what is around their first difference if it comes late."""
    size = min(len(text), len(other))
    differs = np.frombuffer(text, np.uint8, size) != np.frombuffer(other, np.uint8, size)
    first = int(differs.argmax()) if differs.any() else 0
    start = max(0, first - _CONTEXT)
    ellipsis = "\u2026" if start else ""
    return ellipsis + beginning(text[start:]), ellipsis + beginning(other[start:])


def kept_draws(part: Part, folder: Path, seed: int) -> UInt64:
    """The draws of the documents of a part that stay, given the result of this stage."""
    kept = map_array(folder / "decisions.bin", DECISION)["removed_by"] == 0
    return draws(map_array(part.folder / "documents.bin", DOCUMENT)["low"][kept], seed)
