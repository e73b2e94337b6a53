"""FineWeb's filters of lines (Penedo et al. 2024, "The FineWeb Datasets", arXiv 2406.17557, section 3.6).

They find menus, lists and tables by what prose has: lines that are long, or end like a sentence.
"""

from megagpt.corpus.config import FilterConfig
from megagpt.corpus.filters.measured import Measured
from megagpt.corpus.filters.shares import above, below

_SENTENCE_ENDS = (".", "!", "?", '"', "'", "”", "’", "»", "…", "。", "！", "？", "।", ".)", "!)", "?)")


def unpunctuated_lines(document: Measured, config: FilterConfig) -> str | None:
    """Fewer than min_punctuated_lines of the lines end like a sentence (FineWeb: 0.12)."""
    if config.min_punctuated_lines is None or not document.lines:
        return None
    punctuated = sum([line.endswith(_SENTENCE_ENDS) for line in document.lines])
    return below(punctuated / len(document.lines), config.min_punctuated_lines, "of the lines end like a sentence")


def short_lines(document: Measured, config: FilterConfig) -> str | None:
    """More than max_short_lines of the lines have fewer than short_line characters (FineWeb: 0.67, 30)."""
    if config.max_short_lines is None or not document.lines:
        return None
    short = sum([len(line) < config.short_line for line in document.lines])
    what = f"of the lines have fewer than {config.short_line} characters"
    return above(short / len(document.lines), config.max_short_lines, what)
