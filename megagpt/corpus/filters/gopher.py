"""Gopher's quality filters (Rae et al. 2021, "Scaling Language Models", arXiv 2112.11446, section A.1).

A document without words or lines has nothing to measure and passes; `min_words` is what removes it.
"""

import itertools
import re

from megagpt.corpus.config import FilterConfig
from megagpt.corpus.filters.measured import Measured
from megagpt.corpus.filters.shares import above, below

_BULLETS = ("•", "‣", "◦", "▪", "●", "○", "*", "-", "–")
_ELLIPSES = ("...", "…")
_LETTER = re.compile(r"[^\W\d_]")
_WORDS_AT_ONCE = 256  # of those searched for stop words, most of which come early


def short_words(document: Measured, config: FilterConfig) -> str | None:
    """Words shorter than min_mean_word_length on average (3)."""
    if config.min_mean_word_length is None or not document.words:
        return None
    return below(document.mean_word_length, config.min_mean_word_length, "characters a word")


def long_words(document: Measured, config: FilterConfig) -> str | None:
    """Words longer than max_mean_word_length on average (10)."""
    if config.max_mean_word_length is None or not document.words:
        return None
    return above(document.mean_word_length, config.max_mean_word_length, "characters a word")


def hashes(document: Measured, config: FilterConfig) -> str | None:
    """More than max_hashes hash signs a word (0.1)."""
    if config.max_hashes is None or not document.words:
        return None
    return above(document.sample.count("#") / len(document.words), config.max_hashes, "hash signs a word")


def ellipses(document: Measured, config: FilterConfig) -> str | None:
    """More than max_ellipses ellipses a word (0.1)."""
    if config.max_ellipses is None or not document.words:
        return None
    ellipses = sum(map(document.sample.count, _ELLIPSES))
    return above(ellipses / len(document.words), config.max_ellipses, "ellipses a word")


def bullet_lines(document: Measured, config: FilterConfig) -> str | None:
    """More than max_bullet_lines of the lines begin with a bullet (0.9)."""
    if config.max_bullet_lines is None or not document.lines:
        return None
    bullets = sum([line.startswith(_BULLETS) for line in document.lines])
    return above(bullets / len(document.lines), config.max_bullet_lines, "of the lines begin with a bullet")


def ellipsis_lines(document: Measured, config: FilterConfig) -> str | None:
    """More than max_ellipsis_lines of the lines end with an ellipsis (0.3)."""
    if config.max_ellipsis_lines is None or not document.lines:
        return None
    ellipses = sum([line.endswith(_ELLIPSES) for line in document.lines])
    return above(ellipses / len(document.lines), config.max_ellipsis_lines, "of the lines end with an ellipsis")


def not_alphabetic(document: Measured, config: FilterConfig) -> str | None:
    """Fewer than min_alphabetic_words of the words have a letter (0.8)."""
    if config.min_alphabetic_words is None or not document.words:
        return None
    others = list(itertools.filterfalse(str.isalpha, document.words))
    alphabetic = len(document.words) - len(others)
    if alphabetic < config.min_alphabetic_words * len(document.words):  # then letters among other characters matter
        alphabetic += sum(map(bool, map(_LETTER.search, others)))
    return below(alphabetic / len(document.words), config.min_alphabetic_words, "of the words have a letter")


def few_stop_words(document: Measured, config: FilterConfig) -> str | None:
    """Fewer than min_stop_words different ones of the stop words (2)."""
    if config.min_stop_words is None:
        return None
    stop_words = frozenset(config.stop_words)
    found: set[str] = set()
    for start in range(0, len(document.words), _WORDS_AT_ONCE):
        words = document.words[start : start + _WORDS_AT_ONCE]
        found |= stop_words.intersection(map(str.lower, words))
        if len(found) >= config.min_stop_words:
            return None
    return f"{len(found)} of the stop words, fewer than {config.min_stop_words}"
