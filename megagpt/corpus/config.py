"""The configuration of a corpus: what goes in, what is done to it, what comes out, and on what machinery.

`execution`, `output` and `max_bad` never change a byte of the result; everything else is part of the plan's hash.
"""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from megagpt.config.schema import Section


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
    """Least estimated Jaccard similarity of two documents' shingles that makes them near-duplicates, 0 to 1."""
    shingle_words: int = Field(5, gt=0)
    """Words a shingle; a shorter document is one shingle."""
    num_perm: int = Field(128, gt=0)
    """Permutations, the length of a signature; a document takes 4 bytes for each in the work folder."""
    bands: int = Field(14, gt=0)
    """Bands of a signature; documents that agree in one are candidates."""
    rows: int = Field(8, gt=0)
    """Values of a signature in each band."""

    @field_validator("rows")
    @classmethod
    def _check_rows(cls, rows: int, info: ValidationInfo) -> int:
        bands, num_perm = info.data.get("bands"), info.data.get("num_perm")
        if bands and num_perm and bands * rows > num_perm:
            raise ValueError(f"{rows} in each of {bands} bands exceed dedup.num_perm {num_perm}; choose fewer")
        return rows


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
    """Files, folders (read recursively) and glob patterns."""
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
    """Share of documents for validation, drawn by the hash of their text; above 0: at least one document."""
    shuffle: bool = True
    """Whether documents are written in a random order; false: in the order of the input."""
    seed: int = Field(0, ge=0)
    """Seed of the shuffle and the split."""
    max_bad: float = Field(0.01, ge=0, le=1)
    """Share of documents that may be unreadable, 0 to 1; above it the run is an error."""
    execution: ExecutionConfig = ExecutionConfig()
    """Processes and folders."""
