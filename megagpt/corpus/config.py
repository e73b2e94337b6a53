"""The configuration of a corpus: what goes in, what is done to it, what comes out, and on what machinery.

`execution`, `output` and `max_bad` never change a byte of the result; everything else is part of the plan's hash.
"""

import functools
import math
import re
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from megagpt.config.schema import Section
from megagpt.corpus.sources import Format, TextUnit

_FINEWEB_BANDING, _FINEWEB_THRESHOLD = (14, 8), 0.8
_LEAST_RECALL = 0.95
_LEAST_TRAINING_SHARE = 1e-6
TRAIN, VALIDATION = "train", "validation"


class CleanConfig(Section):
    """Repair of the text of each document."""

    enabled: bool = True
    """Whether to clean: encoding, Unicode NFC, control characters, whitespace."""
    repair_encoding: bool = True
    """Whether ftfy repairs text that was decoded in the wrong encoding."""
    remove_html: bool = False
    """Whether tags, comments, scripts and styles that were left in the text go, and entities become characters."""
    mask_emails: bool = False
    """Whether e-mail addresses become <email> (as in FineWeb, Penedo et al. 2024, and Dolma, Soldaini et al. 2024)."""
    mask_ips: bool = False
    """Whether public IPv4 addresses become <ip>; private and reserved ones stay."""
    normalize_punctuation: bool = False
    """Whether curly quotes, dashes, ellipses and the like become ASCII (after CCNet, Wenzek et al. 2019)."""


class FilterConfig(Section):
    """Which documents stay, by their text alone; null (an empty list, false) turns a single check off.

    Words are what whitespace separates: for languages written without it turn the checks of words off. Shares are of a
    document's first 2^20 characters.
    """

    enabled: bool = False
    """Whether to filter."""

    min_characters: int | None = Field(None, gt=0)
    """Least characters of a document."""
    max_characters: int | None = Field(None, gt=0)
    """Most characters of a document."""
    min_words: int | None = Field(50, gt=0)
    """Least words of a document (Gopher, Rae et al. 2021)."""
    max_words: int | None = Field(100_000, gt=0)
    """Most words of a document (Gopher)."""

    languages: list[str] = Field([])
    """Languages that stay, as ISO 639-1 codes, found by py3langid (Lui and Baldwin 2012); none: any language."""
    min_language_probability: float = Field(0.65, ge=0, le=1)
    """Least probability that a document is in one of `languages`, 0 to 1 (0.65: FineWeb, Penedo et al. 2024)."""

    min_mean_word_length: float | None = Field(3, ge=0)
    """Least characters a word on average (Gopher)."""
    max_mean_word_length: float | None = Field(10, gt=0)
    """Most characters a word on average (Gopher)."""
    max_hashes: float | None = Field(0.1, ge=0)
    """Most hash signs a word (Gopher)."""
    max_ellipses: float | None = Field(0.1, ge=0)
    """Most ellipses a word (Gopher)."""
    max_bullet_lines: float | None = Field(0.9, ge=0, le=1)
    """Largest share of lines that begin with a bullet (Gopher)."""
    max_ellipsis_lines: float | None = Field(0.3, ge=0, le=1)
    """Largest share of lines that end with an ellipsis (Gopher)."""
    min_alphabetic_words: float | None = Field(0.8, ge=0, le=1)
    """Least share of words with at least one letter (Gopher)."""
    min_stop_words: int | None = Field(2, gt=0)
    """Least number of different `stop_words` in a document (Gopher)."""
    stop_words: list[str] = Field(["the", "be", "to", "of", "and", "that", "have", "with"])
    """The words that `min_stop_words` means, in lower case: Gopher's, for English."""

    lorem_ipsum: bool = True
    """Whether documents with "lorem ipsum" are removed (C4, Raffel et al. 2020)."""
    curly_bracket: bool = False
    """Whether documents with a { are removed: pages with code in them (C4)."""
    max_boilerplate_lines: float | None = Field(None, ge=0, le=1)
    """Largest share of lines about JavaScript, cookies, privacy policy or terms of use (C4 removes these lines)."""
    min_sentences: int | None = Field(None, gt=0)
    """Least sentences of a document (C4; 5 there)."""
    min_punctuated_lines: float | None = Field(None, ge=0, le=1)
    """Least share of lines that end like a sentence (FineWeb; 0.12 there; C4 removes the other lines)."""
    max_short_lines: float | None = Field(None, ge=0, le=1)
    """Largest share of lines shorter than `short_line` (FineWeb; 0.67 there)."""
    short_line: int = Field(30, gt=0)
    """Characters from which on a line is not short (FineWeb)."""

    max_duplicate_lines: float | None = Field(0.3, ge=0, le=1)
    """Largest share of lines that repeat an earlier one (Gopher, as all below)."""
    max_duplicate_paragraphs: float | None = Field(0.3, ge=0, le=1)
    """Largest share of paragraphs, which blank lines separate, that repeat an earlier one."""
    max_duplicate_line_characters: float | None = Field(0.2, ge=0, le=1)
    """Largest share of the lines' characters that is in lines that repeat an earlier one."""
    max_duplicate_paragraph_characters: float | None = Field(0.2, ge=0, le=1)
    """Largest share of the paragraphs' characters that is in paragraphs that repeat an earlier one."""
    max_top_2gram: float | None = Field(0.2, ge=0, le=1)
    """Largest share of the words' characters that the most frequent run of 2 words covers."""
    max_top_3gram: float | None = Field(0.18, ge=0, le=1)
    """The same for runs of 3 words."""
    max_top_4gram: float | None = Field(0.16, ge=0, le=1)
    """The same for runs of 4 words."""
    max_duplicate_5grams: float | None = Field(0.15, ge=0, le=1)
    """Largest share of the words' characters that is in runs of 5 words that occurred earlier in the document."""
    max_duplicate_6grams: float | None = Field(0.14, ge=0, le=1)
    """The same for runs of 6 words."""
    max_duplicate_7grams: float | None = Field(0.13, ge=0, le=1)
    """The same for runs of 7 words."""
    max_duplicate_8grams: float | None = Field(0.12, ge=0, le=1)
    """The same for runs of 8 words."""
    max_duplicate_9grams: float | None = Field(0.11, ge=0, le=1)
    """The same for runs of 9 words."""
    max_duplicate_10grams: float | None = Field(0.10, ge=0, le=1)
    """The same for runs of 10 words."""

    @field_validator("languages")
    @classmethod
    def _check_languages(cls, languages: list[str]) -> list[str]:
        if languages:
            from megagpt.corpus.filters.language import known_languages

            for language in languages:
                if language not in known_languages():
                    raise ValueError(f"no language {language!r}; choose from {', '.join(sorted(known_languages()))}")
        return languages

    @field_validator("stop_words")
    @classmethod
    def _check_stop_words(cls, stop_words: list[str]) -> list[str]:
        for word in stop_words:
            if [word] != word.lower().split():
                raise ValueError(f"{word!r} is not one word in lower case; documents are searched for such words")
        return stop_words


class DecontaminateConfig(Section):
    """Removal of documents that share text with evaluation data (Brown et al. 2020, GPT-3, appendix C)."""

    files: list[str] = Field([])
    """Evaluation files, folders and glob patterns, of the formats that are read as input; none: nothing is removed."""
    text_keys: list[str] = Field(["text"], min_length=1)
    """Keys of an evaluation document's texts in .jsonl, Parquet and Arrow files, such as question and answer.

    Those that it has are joined in this order to one text.
    """
    ngram_words: int = Field(13, gt=0)
    """Words of a run that an evaluation document must share; a shorter one is shared only as a whole document."""
    action: Literal["drop", "report"] = "drop"
    """drop: such documents are removed; report: they stay, and are listed."""


class DedupConfig(Section):
    """Removal of repeated documents; of a group of copies the first in the input stays."""

    method: Literal["none", "exact", "minhash"] = "minhash"
    """exact: documents equal up to whitespace; minhash: these and near-duplicates (MinHash LSH, Broder 1997)."""
    threshold: float = Field(0.8, gt=0, le=1)
    """Least estimated Jaccard similarity of two documents' shingles that makes them a pair of near-duplicates, 0 to 1.

    Of each connected component of the graph of such pairs one document stays: a removed document is that similar to a
    neighbour in a chain of documents that leads to the one that stays, and may resemble that one less.
    """
    shingle_unit: Literal["words", "characters"] = "words"
    """What shingles are runs of; characters suit languages without spaces between words, at several times the cost."""
    shingle_size: int = Field(5, gt=0, le=1000)
    """Words or characters a shingle; a shorter document is one shingle."""
    num_perm: int = Field(128, gt=0)
    """Permutations, the length of a signature; a document takes 4 bytes for each in the work folder."""
    bands: int | None = Field(None, gt=0)
    """Bands of a signature; documents that agree in one are candidates. null, and then rows, too: by `band_rule`."""
    rows: int | None = Field(None, gt=0)
    """Values of a signature in each band."""
    band_rule: Literal["recall", "datasketch"] = "recall"
    """How bands and rows are chosen. recall: 14 x 8 from a threshold of 0.8 up, below it the most rows by which a pair
    at the threshold is a candidate with probability 0.95. datasketch: as its MinHashLSH does, 9 x 13 at 0.8, by which
    three in ten pairs of a similarity of 0.85 are missed."""
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
        """Bands and rows, with the defaults resolved: see `band_rule`.

        14 x 8 is that of FineWeb (Penedo et al. 2024), if num_perm allows; the most rows give the fewest candidates in
        vain.
        """
        if self.bands and self.rows:
            return self.bands, self.rows
        if self.band_rule == "datasketch":
            return _datasketch_banding(self.threshold, self.num_perm)
        bands, rows = _FINEWEB_BANDING
        if self.threshold >= _FINEWEB_THRESHOLD and bands * rows <= self.num_perm:
            return bands, rows
        for rows in range(self.num_perm, 1, -1):
            bands = self.num_perm // rows
            if 1 - (1 - self.threshold**rows) ** bands >= _LEAST_RECALL:
                return bands, rows
        return self.num_perm, 1


@functools.cache
def _datasketch_banding(threshold: float, num_perm: int) -> tuple[int, int]:
    from datasketch import MinHashLSH  # which imports half of scipy

    index = MinHashLSH(threshold=threshold, num_perm=num_perm)
    return index.b, index.r


class ExecutionConfig(Section):
    """How the work is done; none of it changes the result."""

    workers: int | None = Field(None, gt=0)
    """Processes on this machine; null: one for each CPU that this process may use."""
    work_dir: str | None = None
    """Folder for intermediate files, two to three times the text; null: OUTPUT.work. Removed after success."""
    keep_work: bool = False
    """Whether the intermediate files stay after success, too."""
    chunk_mb: float | None = Field(None, gt=0)
    """Input a task reads, in MiB; null: by the size of the input: 4 to 64, above 1 TiB more."""
    tokenizer_backend: Literal["auto", "tiktoken", "gigatoken"] = "auto"
    """Who encodes: auto takes gigatoken where it is installed and proven to give tiktoken's ids."""
    vocab_dir: str | None = None
    """Folder to look for the tokenizer's vocabulary files in first; null: where load_tokenizer looks."""


class CorpusConfig(Section):
    """Everything about one token dataset made from text."""

    input: list[str] = Field(min_length=1)
    """Files, folders (read recursively), glob patterns, `@FILE` for a list of inputs, `hf:NAME[:CONFIG][:SPLIT]` for a
    dataset of the Hugging Face hub; the folders of output and work are never input."""
    output: str
    """Folder of the token dataset; appears when it is complete."""
    format: Format = "auto"
    """What all inputs hold; auto: what the name of each says (.jsonl, .parquet, ...; any other: one text a file)."""
    text_unit: TextUnit = "file"
    """What of a text file is a document: file: all of it; line: each line that is not blank; paragraph: each run of
    lines between empty ones. A large file of many texts is read by several workers if it is not the first."""
    max_document_mb: float = Field(50, gt=0, le=4096)
    """Most a document may take in its file, uncompressed (a line, a page, a row's text), in MiB; more is unreadable."""
    text_key: str = "text"
    """Key that holds the text in each line of a .jsonl file; column that holds it in Parquet and Arrow files."""
    tokenizer: str = "gpt2"
    """Name of a tiktoken encoding, `bytes`, or the file of an own trained tokenizer."""
    clean: CleanConfig = CleanConfig()
    """Cleaning."""
    filter: FilterConfig = FilterConfig()
    """Filters."""
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    """Evaluation data to keep out."""
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
        if math.fsum([*splits.values(), info.data.get("validation_fraction", 0)]) > 1 - _LEAST_TRAINING_SHARE:
            raise ValueError("the shares of splits and validation_fraction must leave something for training")
        return splits

    @property
    def max_document_bytes(self) -> int:
        """max_document_mb in bytes, at least one."""
        return max(1, int(self.max_document_mb * (1 << 20)))

    @property
    def shares(self) -> dict[str, float]:
        """The share of every split but the one for training."""
        return ({VALIDATION: self.validation_fraction} if self.validation_fraction else {}) | self.splits
