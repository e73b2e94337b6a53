"""Stage `tokenize`: the token ids of a part's documents that stay, each followed by the end-of-document token.

Writes, for split number s that has documents, tokens_s.bin (ids in the dataset's type) and index_s.bin (a TOKENIZED for
each document), both in the order of the dataset: a task of the stage `write` then reads one stretch of every part.
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.corpus.documents import Part
from megagpt.corpus.extract import DOCUMENT
from megagpt.corpus.hashing import UInt64, mix64
from megagpt.corpus.select import DECISION
from megagpt.corpus.splits import draws, split_of
from megagpt.corpus.workspace import Receipt, map_array, write_array
from megagpt.errors import UserError
from megagpt.tokenizer import Tokenizer, load_tokenizer
from megagpt.tokenizer.fast import PROOF_SHARES, Backend, DocumentEncoder, prove

TOKENIZED = np.dtype([("key", "<u8"), ("begin", "<u8"), ("tokens", "<u8"), ("file", "<u4"), ("position", "<u8")])
"""A document: its key in the order of the dataset, where its tokens begin, how many they are, and its id."""

BYTES_WORTH_A_PROOF = 1 << 25
"""Text from which on gigatoken, with its proof, is faster than tiktoken, whatever the number of workers."""

_BYTES_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class TokenizeTask:
    """The documents of one part."""

    part: Part
    select: Path
    """Its result of the stage `select`."""
    bounds: list[int]
    """Bounds of the splits."""
    tokenizer: str
    vocab_dir: str | None
    vocab_sha256: str
    """The vocabulary that the run was planned with."""
    backend: Backend
    """Who encodes, gigatoken being proven; the ids are the same."""
    is_required: bool
    """Whether the run fails on a machine that lacks it; else tiktoken encodes there."""
    dtype: str
    """The dataset's type of ids."""
    shuffle: bool
    seed: int

    def __str__(self) -> str:
        return str(self.part)

    def run(self, folder: Path) -> Receipt:
        """See the module; counts documents, tokens, both also by number of split, text bytes, and documents by length:
        `length k` is those of 2^k to 2^(k+1) - 1 tokens. UserError: the tokenizer is another one by now."""
        encoder = _encoder(self.tokenizer, self.vocab_dir, self.vocab_sha256, self.backend, self.is_required)
        documents = map_array(self.part.folder / "documents.bin", DOCUMENT)
        rows = np.flatnonzero(map_array(self.select / "decisions.bin", DECISION)["removed_by"] == 0)
        kept = documents[rows]
        splits = split_of(draws(kept["low"], self.seed), self.bounds)
        if self.shuffle:
            keys = shuffle_keys(kept["file"], kept["position"], self.seed)
        else:
            keys = (self.part.first + rows).astype(np.uint64)
        receipt: Receipt = {"documents": rows.size, "tokens": 0, "text_bytes": int(kept["size"].sum())}
        lengths = np.zeros(64, np.int64)
        for split in np.unique(splits).tolist():
            chosen = np.flatnonzero(splits == split)
            chosen = chosen[np.argsort(keys[chosen], kind="stable")]
            index = self._write_split(folder, split, kept[chosen], keys[chosen], encoder)
            receipt[f"documents {split}"] = index.size
            receipt[f"tokens {split}"] = int(index["tokens"].sum())
            receipt["tokens"] += receipt[f"tokens {split}"]
            lengths += np.bincount(np.frexp(index["tokens"].astype(float))[1] - 1, minlength=64)
        receipt.update({f"length {power}": count for power, count in enumerate(lengths.tolist()) if count})
        return receipt

    def _write_split(
        self, folder: Path, split: int, documents: npt.NDArray[np.void], keys: UInt64, encoder: DocumentEncoder
    ) -> npt.NDArray[np.void]:
        index = np.empty(documents.size, TOKENIZED)
        index["key"], index["file"], index["position"] = keys, documents["file"], documents["position"]
        with open(self.part.folder / "text.bin", "rb") as texts, open(folder / f"tokens_{split}.bin", "wb") as file:
            for start, stop in _blocks(documents["size"]):
                places = documents[["size", "begin"]][start:stop].tolist()
                contents = (os.pread(texts.fileno(), size, begin).decode() for size, begin in places)
                tokens, index["tokens"][start:stop] = encoder.encode_documents(contents, self.dtype)
                file.write(tokens.data)
        index["begin"] = np.cumsum(index["tokens"]) - index["tokens"]
        write_array(folder / f"index_{split}.bin", index)
        return index


def _blocks(sizes: UInt64) -> Iterator[tuple[int, int]]:
    """Begin and end of stretches of documents that are encoded at once."""
    numbers = (np.cumsum(sizes) - sizes) // np.uint64(_BYTES_AT_ONCE)
    begins = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1])).tolist()
    return zip(begins, [*begins[1:], sizes.size], strict=True)


def shuffle_keys(file: npt.NDArray[np.uint32], position: UInt64, seed: int) -> UInt64:
    """A random number for each document, from its id alone: documents sorted by it are shuffled."""
    return mix64(mix64(mix64([seed + 1]) + file) ^ position)  # mix64 leaves 0 as it is


@dataclass(frozen=True)
class ProofTask:
    """A share of the proof that gigatoken gives the same ids, which the workers have in common."""

    tokenizer: str
    vocab_dir: str | None
    vocab_sha256: str
    """The vocabulary that the run was planned with."""
    share: int

    def __str__(self) -> str:
        return f"share {self.share + 1}/{PROOF_SHARES}"

    def run(self, folder: Path) -> Receipt:
        """Write nothing; counts failures, 0 or 1. UserError: the tokenizer is another one by now."""
        tokenizer = _planned_tokenizer(self.tokenizer, self.vocab_dir, self.vocab_sha256)
        return {"failures": int(not prove(tokenizer, self.share))}


@functools.cache
def _encoder(
    name: str, vocab_dir: str | None, vocab_sha256: str, backend: Backend, is_required: bool
) -> DocumentEncoder:
    tokenizer = _planned_tokenizer(name, vocab_dir, vocab_sha256)
    try:
        return DocumentEncoder(tokenizer, backend, proven=True)
    except UserError:
        if is_required:
            raise
        return DocumentEncoder(tokenizer, "tiktoken")


@functools.cache
def _planned_tokenizer(name: str, vocab_dir: str | None, vocab_sha256: str) -> Tokenizer:
    tokenizer = load_tokenizer(name, vocab_dir)
    if tokenizer.vocab_sha256 != vocab_sha256:
        raise UserError(f"tokenizer {name}: its vocabulary changed during the run; run the command again")
    return tokenizer
