"""The configuration of a corpus: what goes in, what is done to it, what comes out, and on what machinery.

`execution`, `output` and `max_bad` never change a byte of the result; everything else is part of the plan's hash.
"""

import re
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from megagpt.config.schema import Section

_FINEWEB_BANDING, _FINEWEB_THRESHOLD = (14, 8), 0.8
_LEAST_RECALL = 0.95
TRAIN, VALIDATION = "train", "validation"


class CleanConfig(Section):
    """Repair of the text of each document."""

    enabled: bool = True
    """Whether to clean: encoding, Unicode NFC, control characters, whitespace."""
    repair_encoding: bool = True
    """Whether ftfy repairs text that was decoded in the wrong encoding."""


class DedupConfig(Section):
    """Removal of repeated documents; of a group of copies the first in the input stays."""

    method: Literal["none", "exact", "minhash"] = "minhash"
    """exact: documents equal up to whitespace; minhash: these and near-duplicates (MinHash LSH, Broder 1997)."""
    threshold: float = Field(0.8, gt=0, le=1)
    """Least estimated Jaccard similarity of two documents' shingles that makes them a pair of near-duplicates, 0 to 1.

    Of each connected component of the graph of such pairs one document stays: a removed document is that similar to a
    neighbour in a chain of documents that leads to the one that stays, and may resemble that one less.
    """
    shingle_words: int = Field(5, gt=0)
    """Words a shingle; a shorter document is one shingle."""
    num_perm: int = Field(128, gt=0)
    """Permutations, the length of a signature; a document takes 4 bytes for each in the work folder."""
    bands: int | None = Field(None, gt=0)
    """Bands of a signature; documents that agree in one are candidates. null, and then rows, too: see `banding`."""
    rows: int | None = Field(None, gt=0)
    """Values of a signature in each band."""
    verification: Literal["estimate", "exact", "none"] = "estimate"
    """What decides about a candidate pair: the signatures' estimate of its similarity, the exact one (slower, reads
    the texts again), or nothing, which chains documents that share no more than a band into large clusters."""

    @field_validator("rows")
    @classmethod
    def _check_rows(cls, rows: int | None, info: ValidationInfo) -> int | None:
        if "bands" not in info.data:  # wrong itself
            return rows
        bands, num_perm = info.data["bands"], info.data.get("num_perm")
        if (bands is None) != (rows is None):
            raise ValueError("give dedup.bands and dedup.rows together, or neither")
        if bands and rows and num_perm and bands * rows > num_perm:
            raise ValueError(f"{rows} in each of {bands} bands exceed dedup.num_perm {num_perm}; choose fewer")
        return rows

    @property
    def banding(self) -> tuple[int, int]:
        """Bands and rows, with the defaults resolved.

        Those are 14 x 8 from a threshold of 0.8 up (Penedo et al. 2024, FineWeb), if num_perm allows; else the most
        rows, and with them the fewest candidates in vain, by which a pair at the threshold is a candidate with
        probability 0.95.
        """
        if self.bands and self.rows:
            return self.bands, self.rows
        bands, rows = _FINEWEB_BANDING
        if self.threshold >= _FINEWEB_THRESHOLD and bands * rows <= self.num_perm:
            return bands, rows
        for rows in range(self.num_perm, 1, -1):
            bands = self.num_perm // rows
            if 1 - (1 - self.threshold**rows) ** bands >= _LEAST_RECALL:
                return bands, rows
        return self.num_perm, 1


class ExecutionConfig(Section):
    """How the work is done; none of it changes the result."""

    workers: int | None = Field(None, gt=0)
    """Processes on this machine; null: one for each CPU that this process may use."""
    work_dir: str | None = None
    """Folder for intermediate files, about the size of the text; null: OUTPUT.work. Removed after success."""
    chunk_mb: float | None = Field(None, gt=0)
    """Input a task reads, in MiB; null: by the size of the input, 1 to 64."""
    vocab_dir: str | None = None
    """Folder to look for the tokenizer's vocabulary files in first; null: where load_tokenizer looks."""


class CorpusConfig(Section):
    """Everything about one token dataset made from text."""

    input: list[str] = Field(min_length=1)
    """Files, folders (read recursively) and glob patterns; the folders of output and work are never input."""
    output: str
    """Folder of the token dataset; appears when it is complete."""
    text_key: str = "text"
    """Key that holds the text in each line of a .jsonl file; column that holds it in Parquet and Arrow files."""
    tokenizer: str = "gpt2"
    """Name of a tiktoken encoding, `bytes`, or the file of an own trained tokenizer."""
    clean: CleanConfig = CleanConfig()
    """Cleaning."""
    dedup: DedupConfig = DedupConfig()
    """Duplicates."""
    validation_fraction: float = Field(0.01, ge=0, lt=1)
    """Share of documents for validation, drawn by the hash of their text; above 0: at least one text of two or more."""
    splits: dict[str, float] = Field({})
    """Shares of further splits by name, drawn as the one for validation; the rest is for training."""
    shuffle: bool = True
    """Whether documents are written in a random order; false: in the order of the input."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the shuffle and the split."""
    max_bad: float = Field(0.01, ge=0, le=1)
    """Share of documents that may be unreadable, 0 to 1; above it the run is an error."""
    execution: ExecutionConfig = ExecutionConfig()
    """Processes and folders."""

    @field_validator("splits")
    @classmethod
    def _check_splits(cls, splits: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        for name, share in splits.items():
            if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in (TRAIN, VALIDATION):
                raise ValueError(f"a split cannot be called {name!r}; use lower-case letters, digits and _")
            if not 0 < share < 1:
                raise ValueError(f"the share of split {name} must be above 0 and below 1, not {share}")
        if sum(splits.values()) + info.data.get("validation_fraction", 0) >= 1:
            raise ValueError("the shares of splits and validation_fraction must leave something for training")
        return splits

    @property
    def shares(self) -> dict[str, float]:
        """The share of every split but the one for training."""
        return ({VALIDATION: self.validation_fraction} if self.validation_fraction else {}) | self.splits
