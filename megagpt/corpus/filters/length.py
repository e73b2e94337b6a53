"""Filters of length. The bounds on words are Gopher's (Rae et al. 2021, arXiv 2112.11446, section A.1)."""

from megagpt.corpus.config import FilterConfig
from megagpt.corpus.filters.measured import Measured


def too_few_characters(document: Measured, config: FilterConfig) -> str | None:
    """Fewer than min_characters."""
    return _below(len(document.text), config.min_characters, "characters")


def too_many_characters(document: Measured, config: FilterConfig) -> str | None:
    """More than max_characters."""
    return _above(len(document.text), config.max_characters, "characters")


def too_few_words(document: Measured, config: FilterConfig) -> str | None:
    """Fewer than min_words (Gopher: 50)."""
    return None if config.min_words is None else _below(document.num_words, config.min_words, "words")


def too_many_words(document: Measured, config: FilterConfig) -> str | None:
    """More than max_words (Gopher: 100,000)."""
    return None if config.max_words is None else _above(document.num_words, config.max_words, "words")


def _below(measured: int, least: int | None, unit: str) -> str | None:
    return f"{measured} {unit}, fewer than {least}" if least is not None and measured < least else None


def _above(measured: int, most: int | None, unit: str) -> str | None:
    return f"{measured} {unit}, more than {most}" if most is not None and measured > most else None
