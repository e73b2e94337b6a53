"""Stage `evaluation`: the runs of words of evaluation documents, by which contaminated documents are found.

After GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C): runs of 13 words in lower case, without punctuation. It
differs in that one length serves every evaluation set; that a run in many documents is no exception; that the whole
document goes, and not only what surrounds the run; and that evaluation documents of fewer words, too short to find
within others, match only documents that are equal to them. Runs are taken of each evaluation document as it is and as
cleaning makes it, so that it is found in documents that were cleaned the same way.

Files: hashes.bin (uint64 of each different run, sorted), owners.bin (uint32, the number of the first document of each),
documents.bin (an EVALUATED each), names.json (of the files), bits.bin (a bitmap of the hashes' first bits, by which
nearly all other runs are told apart in one look). The stage sorts the runs out of core and holds the bitmap, 2 to 4
bytes a run, and 16 bytes a document in memory; workers map the files.
"""

import functools
import heapq
import itertools
import json
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.corpus.clean import clean
from megagpt.corpus.config import CleanConfig, DecontaminateConfig
from megagpt.corpus.external import RunWriter, merge_runs, written_runs
from megagpt.corpus.finding import find_files
from megagpt.corpus.hashing import UInt64, collapse_whitespace, run_hashes
from megagpt.corpus.normalization import normalize
from megagpt.corpus.reading import read_piece
from megagpt.corpus.records import HARMLESS, NULL, BadRecord, Document, ReadCount
from megagpt.corpus.sources import Piece, SourceFile, one_line
from megagpt.corpus.workspace import Receipt, map_array, write_array
from megagpt.errors import UserError

EVALUATED = np.dtype([("file", "<u4"), ("position", "<u8")])
"""An evaluation document: the index of its file and its position there."""

_RUN = np.dtype([("hash", "<u8"), ("owner", "<u4")])
_BLOCK_HASHES = 1 << 20
_BITS_PER_HASH = 16  # of the bitmap at least, so that one in 16 other runs is looked up in vain at most
_LEAST_BITS = 16  # 2^16
_QUOTED_CHARACTERS = 300
_MISSING = ("missing key", "missing column")  # allowed, if the document has another key
_KINDS_WITH_KEYS = ("jsonl", "parquet", "arrow")

_SPACES = b"\x1c\x1d\x1e\x1f"  # of str, but not of bytes
_LOWER = bytes.maketrans(string.ascii_uppercase.encode() + _SPACES, string.ascii_lowercase.encode() + b" " * 4)
_NO_WORD = bytes(c for c in range(128) if not chr(c).isalnum() and not chr(c).isspace())
_UNICODE_SPACE = re.compile(r"[^\S \t\n\r\v\f]")
_NO_WORD_CHARACTER = re.compile(r"[^\w\s]|_")


def evaluation_files(config: DecontaminateConfig) -> list[SourceFile]:
    """The files that `config.files` lead to. UserError: there are none, or they cannot be read."""
    try:
        return find_files(config.files) if config.files else []
    except UserError as error:
        raise type(error)(f"decontaminate.files: {error}") from error


@dataclass(frozen=True)
class EvaluationTask:
    """All evaluation documents."""

    files: tuple[SourceFile, ...]
    text_keys: tuple[str, ...]
    ngram_words: int
    clean: CleanConfig
    """What is done to the documents that are compared with these."""

    def __str__(self) -> str:
        return "evaluation files"

    def run(self, folder: Path) -> Receipt:
        """See the module; counts documents and different runs. UserError: a document cannot be read."""
        documents = []
        with RunWriter(folder, "runs", _RUN) as writer:
            for owner, (document, text) in enumerate(self._texts()):
                documents.append(document)
                for form in self._forms(text):
                    hashes = run_hashes(normalized_words(form), self.ngram_words)
                    runs = np.empty(hashes.size, _RUN)
                    runs["hash"], runs["owner"] = hashes, owner
                    writer.add(runs)
        write_array(folder / "documents.bin", np.array(documents, EVALUATED))
        _write_index(folder)
        (folder / "names.json").write_text(json.dumps([file.name for file in self.files]))
        hashes = map_array(folder / "hashes.bin", np.uint64)
        write_array(folder / "bits.bin", _bitmap(hashes))
        return {"documents": len(documents), "runs": int(hashes.size)}

    def _forms(self, text: str) -> set[str]:
        """The text as it is, and as it is after cleaning."""
        return {text, clean(text, self.clean)} if self.clean.enabled else {text}

    def _texts(self) -> Iterator[tuple[tuple[int, int], str]]:
        """Of each document the index of its file and its position, and the texts of all keys that it has."""
        for index, file in enumerate(self.files):
            piece = Piece(file, index, 0, file.size)
            keys = self.text_keys if file.kind in _KINDS_WITH_KEYS else self.text_keys[:1]
            records = heapq.merge(*(read_piece(piece, key, ReadCount()) for key in keys), key=_position)
            for position, group in itertools.groupby(records, key=_position):
                if texts := self._good_texts(file, list(group)):
                    yield (index, position), "\n".join(texts)

    def _good_texts(self, file: SourceFile, records: list[Document | BadRecord]) -> list[str]:
        """The texts that one document has under each key. UserError: it is damaged, or has none of the keys."""
        bad = [record for record in records if isinstance(record, BadRecord) and record.reason not in HARMLESS]
        damage = [record for record in bad if not _is_missing(record)]
        if damage or (bad and len(bad) == len(records)):
            problem = (damage or bad)[0]
            line = f" line {problem.line}" if problem.line else ""
            detail = problem.detail.replace("--text-key", "decontaminate.text_keys")
            keys = f"name the keys of its texts in decontaminate.text_keys, now {', '.join(self.text_keys)}"
            advice = "mend it, or leave it out" if damage else keys
            raise UserError(f"evaluation file {one_line(file.name)}{line}: {problem.reason}: {detail}; {advice}")
        return [record.text for record in records if isinstance(record, Document)]


def _is_missing(record: BadRecord) -> bool:
    return record.reason in _MISSING or record.detail.endswith(f" is {NULL}")


def _write_index(folder: Path) -> None:
    """Write each different hash with the first of its documents, in the order of hashes; remove the runs."""
    runs = written_runs(folder, "runs", _RUN)
    last = None
    with open(folder / "hashes.bin", "wb") as hashes, open(folder / "owners.bin", "wb") as owners:
        for block in merge_runs(runs, ["hash", "owner"]):
            is_first = np.append(block["hash"][0] != last, block["hash"][1:] != block["hash"][:-1])
            last = block["hash"][-1]
            hashes.write(block["hash"][is_first].data)
            owners.write(block["owner"][is_first].data)
    for run in runs:
        run.path.unlink()


def _position(record: Document | BadRecord) -> int:
    return record.position


class EvaluationIndex:
    """What EvaluationTask wrote, to look documents up in."""

    def __init__(self, folder: Path, ngram_words: int) -> None:
        self._ngram_words = ngram_words
        self._hashes = map_array(folder / "hashes.bin", np.uint64)
        self._owners = map_array(folder / "owners.bin", np.uint32)
        self._documents = map_array(folder / "documents.bin", EVALUATED)
        self._bits = map_array(folder / "bits.bin", np.uint8)
        self._names = json.loads((folder / "names.json").read_text())

    def find(self, text: str) -> str | None:
        """The first run of words that the text shares with an evaluation document, and that document; None: none."""
        words = normalized_words(text)
        runs = run_hashes(words, self._ngram_words)
        likely = np.flatnonzero(_has_bit(self._bits, runs))
        if not likely.size:
            return None
        places = np.searchsorted(self._hashes, runs[likely])
        places[places == self._hashes.size] = 0
        shared = np.flatnonzero(self._hashes[places] == runs[likely])
        if not shared.size:
            return None
        first = int(likely[shared[0]])
        bounds = np.concatenate(([-1], np.flatnonzero(words == ord(" ")), [words.size]))  # before and after each word
        last = min(first + self._ngram_words, bounds.size - 1)
        run = words[bounds[first] + 1 : bounds[last]].tobytes().decode()
        file, position = self._documents[self._owners[places[shared[0]]]].item()
        return f'"{run[:_QUOTED_CHARACTERS]}" is in {one_line(self._names[file])}:{position}'


@functools.cache
def open_index(folder: Path, ngram_words: int) -> EvaluationIndex:
    """The index in this folder, opened once a process."""
    return EvaluationIndex(folder, ngram_words)


def normalized_words(text: str) -> npt.NDArray[np.uint8]:
    """The words of a text, in UTF-8 with one space between: lower case, letters and digits only, NFKC."""
    if text.isascii():  # the same in a tenth of the time
        return collapse_whitespace(text.encode().translate(_LOWER, _NO_WORD))
    text = _NO_WORD_CHARACTER.sub("", normalize("NFKC", text).lower())
    return collapse_whitespace(_UNICODE_SPACE.sub(" ", text).encode())


def _bitmap(hashes: UInt64) -> npt.NDArray[np.uint8]:
    """A bit for each value of as many first bits of a hash as it takes, set where one of the sorted hashes has them."""
    width = max(_LEAST_BITS, int(hashes.size * _BITS_PER_HASH - 1).bit_length())
    bits = np.zeros(1 << (width - 3), np.uint8)
    for start in range(0, hashes.size, _BLOCK_HASHES):
        places = hashes[start : start + _BLOCK_HASHES] >> np.uint64(64 - width)
        byte = places >> np.uint64(3)
        firsts = np.flatnonzero(np.append(True, byte[1:] != byte[:-1]))
        bit = np.left_shift(1, (places & np.uint64(7)).astype(np.uint8), dtype=np.uint8)
        bits[byte[firsts]] |= np.bitwise_or.reduceat(bit, firsts)
    return bits


def _has_bit(bits: npt.NDArray[np.uint8], hashes: UInt64) -> npt.NDArray[np.bool_]:
    """Whether the bitmap has the bit of each hash."""
    width = bits.size.bit_length() + 2  # bits.size is 2^(width - 3)
    places = hashes >> np.uint64(64 - width)
    return (bits[places >> np.uint64(3)] >> (places & np.uint64(7)).astype(np.uint8)) & 1 > 0
