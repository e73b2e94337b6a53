"""Stage `tokenize`: the token ids of a chunk's documents that stay, each followed by the end-of-document token.

Writes tokens.bin (ids in the dataset's type) and index.bin, a TOKENIZED for each document, both sorted by split and
key: the merge then reads every chunk from its beginning to its end, whatever the order of the whole is.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megagpt.corpus.extract import DOCUMENT
from megagpt.corpus.select import DECISION, KEPT, shuffle_keys
from megagpt.corpus.workspace import Receipt, map_array, write_array
from megagpt.errors import UserError
from megagpt.tokenizer import Tokenizer, load_tokenizer

TOKENIZED = np.dtype([("split", "u1"), ("key", "<u8"), ("tokens", "<u8")])
"""A document: its split, its key in the order of the dataset, and its number of tokens."""


@dataclass(frozen=True)
class TokenizeTask:
    """The documents of one chunk."""

    name: str
    """What the chunk is."""
    chunk: Path
    """Its result of the stage `extract`."""
    first_document: int
    """Number of its first document."""
    select: Path
    """Result of the stage `select`."""
    tokenizer: str
    vocab_dir: str | None
    vocab_sha256: str
    """The vocabulary that the run was planned with."""
    dtype: str
    """The dataset's type of ids."""
    shuffle: bool
    seed: int

    def __str__(self) -> str:
        return self.name

    def run(self, folder: Path) -> Receipt:
        """See the module; counts documents, tokens and text bytes. UserError: the tokenizer is another one by now."""
        tokenizer = _planned_tokenizer(self.tokenizer, self.vocab_dir, self.vocab_sha256)
        documents = map_array(self.chunk / "documents.bin", DOCUMENT)
        end = self.first_document + documents.size
        decisions = map_array(self.select / "decisions.bin", DECISION)[self.first_document : end]
        ends = np.cumsum(documents["size"], dtype=np.int64)
        rows = np.flatnonzero(decisions["removed_by"] == KEPT)
        index = np.zeros(rows.size, TOKENIZED)
        index["split"] = decisions["split"][rows]
        if self.shuffle:
            index["key"] = shuffle_keys(documents["file"][rows], documents["position"][rows], self.seed)
        else:
            index["key"] = self.first_document + rows
        order = np.lexsort((index["key"], index["split"]))
        rows, index = rows[order], index[order]
        texts = map_array(self.chunk / "text.bin", np.uint8)
        text_bytes = 0
        with open(folder / "tokens.bin", "wb") as file:
            for number, row in enumerate(rows.tolist()):
                content = texts[ends[row] - int(documents["size"][row]) : ends[row]].tobytes()
                ids = np.append(tokenizer.encode_to_numpy(content.decode()), tokenizer.eod_id).astype(self.dtype)
                file.write(ids.data)
                index["tokens"][number] = ids.size
                text_bytes += len(content)
        write_array(folder / "index.bin", index)
        return {"documents": rows.size, "tokens": int(index["tokens"].sum()), "text_bytes": text_bytes}


@functools.cache
def _planned_tokenizer(name: str, vocab_dir: str | None, vocab_sha256: str) -> Tokenizer:
    tokenizer = load_tokenizer(name, vocab_dir)
    if tokenizer.vocab_sha256 != vocab_sha256:
        raise UserError(f"tokenizer {name}: its vocabulary changed during the run; run the command again")
    return tokenizer
