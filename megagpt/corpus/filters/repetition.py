"""Gopher's repetition filters (Rae et al. 2021, arXiv 2112.11446, table A1): lines, paragraphs, runs of words.

The paper leaves open what counts. Here a line, a paragraph or a run of words is repeated where it occurred earlier in
the document: first occurrences do not count. Shares of runs are of the characters of words; one that several repeated
runs cover counts once. A document of fewer words has no runs.
"""

from collections.abc import Callable, Sequence

from megagpt.corpus.config import FilterConfig
from megagpt.corpus.filters.measured import Measured
from megagpt.corpus.filters.runs import most_frequent, top_share
from megagpt.corpus.filters.shares import above

Check = Callable[[Measured, FilterConfig], str | None]

_LEAST_WORDS = 5  # of the runs whose repetition is measured


def duplicate_lines(document: Measured, config: FilterConfig) -> str | None:
    """More than max_duplicate_lines of the lines repeat an earlier one (0.3)."""
    if config.max_duplicate_lines is None or len(document.lines) < 2:
        return None
    repeated = len(document.lines) - len(set(document.lines))
    return above(repeated / len(document.lines), config.max_duplicate_lines, "of the lines are repeated")


def duplicate_line_characters(document: Measured, config: FilterConfig) -> str | None:
    """More than max_duplicate_line_characters of the lines' characters are in such lines (0.2)."""
    if config.max_duplicate_line_characters is None or len(document.lines) < 2:
        return None
    share = _repeated_characters(document.lines)
    return above(share, config.max_duplicate_line_characters, "of the characters are in repeated lines")


def duplicate_paragraphs(document: Measured, config: FilterConfig) -> str | None:
    """More than max_duplicate_paragraphs of the paragraphs repeat an earlier one (0.3)."""
    if config.max_duplicate_paragraphs is None or len(document.paragraphs) < 2:
        return None
    repeated = len(document.paragraphs) - len(set(document.paragraphs))
    share = repeated / len(document.paragraphs)
    return above(share, config.max_duplicate_paragraphs, "of the paragraphs are repeated")


def duplicate_paragraph_characters(document: Measured, config: FilterConfig) -> str | None:
    """More than max_duplicate_paragraph_characters of the paragraphs' characters are in such paragraphs (0.2)."""
    if config.max_duplicate_paragraph_characters is None or len(document.paragraphs) < 2:
        return None
    share = _repeated_characters(document.paragraphs)
    return above(share, config.max_duplicate_paragraph_characters, "of the characters are in repeated paragraphs")


def top_ngram(words: int) -> Check:
    """The check of max_top_{words}gram: the most frequent run of words, of equally frequent ones the longest."""

    def check(document: Measured, config: FilterConfig) -> str | None:
        most = getattr(config, f"max_top_{words}gram")
        if most is None or document.word_lengths.size < words:
            return None
        runs = document.runs(words)
        frequent, count = most_frequent(runs)
        if count * document.longest_run(words) <= most * int(document.word_lengths.sum()):
            return None  # whichever it is
        share = top_share(runs, frequent, document.word_lengths, words)
        return above(share, most, f"of the words' characters are in one run of {words} words")

    return check


def duplicate_ngrams(words: int) -> Check:
    """The check of max_duplicate_{words}grams."""

    def check(document: Measured, config: FilterConfig) -> str | None:
        most = getattr(config, f"max_duplicate_{words}grams")
        if most is None or document.repeated_share(_LEAST_WORDS) <= most:
            return None  # longer runs that are repeated consist of shorter ones that are
        share = document.repeated_share(words)
        return above(share, most, f"of the words' characters are in repeated runs of {words} words")

    return check


def _repeated_characters(parts: Sequence[str]) -> float:
    """Share of the characters of all parts that lies in parts that repeat an earlier one."""
    total = sum(map(len, parts))
    return (total - sum(map(len, set(parts)))) / total
