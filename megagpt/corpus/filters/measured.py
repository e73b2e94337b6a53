"""What several filters measure of a document, each computed at most once, when it is first asked for.

Only the number of characters and that of words are of the whole text; all else is of its first SAMPLE characters, so
that a document of any size takes bounded memory.
"""

import re
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megagpt.corpus.filters.runs import Int64, repeated_share
from megagpt.corpus.hashing import UInt64, WordSums, collapse_whitespace

SAMPLE = 1 << 20
"""Characters of a document that are looked at."""

_WORD = re.compile(r"\S+")
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


class Measured:
    """One document."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sample = text[:SAMPLE]
        self.language = ""  # the likeliest, once the filter of languages has looked for it
        self._repeated_shares: dict[int, float] = {}

    @cached_property
    def lower(self) -> str:
        """The sample in lower case."""
        return self.sample.lower()

    @cached_property
    def words(self) -> list[str]:
        """The words of the sample."""
        return self.sample.split()

    @cached_property
    def mean_word_length(self) -> float:
        """Characters a word of the sample, which must have words."""
        return sum(map(len, self.words)) / len(self.words)

    @cached_property
    def num_words(self) -> int:
        """The number of words of the whole text."""
        if len(self.text) <= SAMPLE:
            return len(self.words)
        return sum(1 for _ in _WORD.finditer(self.text))

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not blank, without whitespace around them."""
        return [stripped for line in self.sample.split("\n") if (stripped := line.strip())]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What blank lines separate, without whitespace around it."""
        if "\n\n" not in self.sample and not _PARAGRAPH_BREAK.search(self.sample):
            return [stripped] if (stripped := self.sample.strip()) else []
        parts = _PARAGRAPH_BREAK.split(self.sample)
        return [stripped for part in parts if (stripped := part.strip())]

    @cached_property
    def word_bytes(self) -> npt.NDArray[np.uint8]:
        """The sample in UTF-8 with collapsed whitespace."""
        return collapse_whitespace(self.sample.encode())

    @cached_property
    def word_lengths(self) -> Int64:
        """Characters of each word of `word_bytes`."""
        if not self.word_bytes.size:
            return np.empty(0, np.int64)
        spaces = np.flatnonzero(self.word_bytes == ord(" "))
        if not self.sample.isascii():
            begins_character = (self.word_bytes & 0xC0) != 0x80  # all bytes but continuations
            spaces = np.cumsum(begins_character)[spaces] - 1
            end = int(np.count_nonzero(begins_character))
        else:
            end = self.word_bytes.size
        return np.diff(spaces, prepend=-1, append=end) - 1

    @cached_property
    def _word_sums(self) -> WordSums:
        return WordSums.of(self.word_bytes)

    def runs(self, words: int) -> UInt64:
        """One value for each run of `words` words of `word_bytes`, equal for equal runs; none if there are fewer."""
        return self._word_sums.runs(words) if self.word_lengths.size >= words else np.empty(0, np.uint64)

    def longest_run(self, words: int) -> int:
        """Most characters of a run of `words` words, of which there must be as many."""
        ends = np.cumsum(np.concatenate(([0], self.word_lengths)))
        return int((ends[words:] - ends[:-words]).max())

    def repeated_share(self, words: int) -> float:
        """Share of the characters of words in runs of `words` words that occurred earlier, see runs.py."""
        if words not in self._repeated_shares:
            self._repeated_shares[words] = repeated_share(self.runs(words), self.word_lengths, words)
        return self._repeated_shares[words]
