"""Stage `select`: the fate of every document, from what the stages before found out.

Writes decisions.bin, a DECISION for each document in the order of ids. The split belongs to the hash of the text: a
document stays in it when the corpus grows, and copies are never on both sides.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.corpus.extract import document_field
from megagpt.corpus.hashing import UInt64, mix64
from megagpt.corpus.workspace import Receipt, map_array, write_array
from megagpt.errors import UserError

SPLITS = ("train", "validation")
KEPT, CLEAN, EXACT, NEAR = range(4)
REMOVED_BY = ("", "clean", "exact", "near")
"""Names of the stages that remove documents, by the codes above."""
DECISION = np.dtype([("removed_by", "u1"), ("split", "u1"), ("survivor", "<i8"), ("similarity", "<f4")])
"""Which stage removed a document, else its split (index in SPLITS); the number of the document that stays in its stead,
-1 if none does, and the similarity to it, 0 to 1."""


@dataclass(frozen=True)
class SelectTask:
    """All documents of the corpus."""

    chunks: list[Path]
    """Results of the stage `extract`."""
    exact: Path | None
    """Result of the stage `exact`; None: not wanted."""
    signatures: Path | None
    clusters: Path | None
    """Results of the stages `signatures` and `clusters`; None: not wanted."""
    validation_fraction: float
    seed: int

    def __str__(self) -> str:
        return "all documents"

    def run(self, folder: Path) -> Receipt:
        """See the module; counts documents by split and by the stage that removed them. UserError: none is left."""
        removed = document_field(self.chunks, "removed")
        decisions = np.zeros(removed.size, DECISION)
        decisions["survivor"] = np.arange(removed.size)
        decisions["similarity"] = 1
        self._apply_near(decisions)
        self._apply_exact(decisions)
        decisions[removed] = (CLEAN, 0, -1, 0)
        kept = np.flatnonzero(decisions["removed_by"] == KEPT)
        if not kept.size:
            raise UserError(f"none of {removed.size} documents is left to write; check the input and --text-key")
        hashes = document_field(self.chunks, "hash_low")[kept]
        decisions["split"][kept] = in_validation(hashes, self.validation_fraction, self.seed)
        write_array(folder / "decisions.bin", decisions)
        counts = np.bincount(decisions["removed_by"], minlength=len(REMOVED_BY)).tolist()
        return {"kept": kept.size, **dict(zip(REMOVED_BY[1:], counts[1:], strict=True))}

    def _apply_near(self, decisions: npt.NDArray[np.void]) -> None:
        if self.signatures is None or self.clusters is None:
            return
        numbers = map_array(self.signatures / "numbers.bin", np.int64)
        survivors = numbers[map_array(self.clusters / "survivors.bin", np.int64)]
        decisions["survivor"][numbers] = survivors
        decisions["similarity"][numbers] = map_array(self.clusters / "similarity.bin", np.float32)
        decisions["removed_by"][numbers[survivors != numbers]] = NEAR

    def _apply_exact(self, decisions: npt.NDArray[np.void]) -> None:
        """After near-duplicates: where the first copy was itself removed, the copies share its survivor."""
        if self.exact is None:
            return
        first = map_array(self.exact / "first.bin", np.int64)
        copies = np.flatnonzero((first >= 0) & (first != np.arange(first.size)))
        for field in ("survivor", "similarity"):
            decisions[field][copies] = decisions[field][first[copies]]
        decisions["removed_by"][copies] = EXACT


def in_validation(hashes: UInt64, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which documents, by their hashes, are for validation: each with probability `fraction`, 0 to 1.

    Equal hashes go together. Of two different ones or more at least one is, unless `fraction` is 0, and at least one is
    not; of a single one none is.
    """
    draws = mix64(hashes ^ mix64([seed]))
    chosen = draws < np.uint64(fraction * 2.0**64)
    if fraction > 0 and not chosen.any() and draws.size > 1:
        chosen = draws == draws.min()
    if draws.size and chosen.all():
        chosen = draws != draws.max()
    return chosen


def shuffle_keys(file: npt.NDArray[np.uint32], position: UInt64, seed: int) -> UInt64:
    """A random number for each document, from its id alone: documents sorted by it are shuffled."""
    return mix64(mix64(mix64([seed]) + file) ^ position)
