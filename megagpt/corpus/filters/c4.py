"""C4's filters (Raffel et al. 2020, "Exploring the Limits of Transfer Learning", arXiv 1910.10683, section 2.2).

C4 also removes single lines: those that mention JavaScript or policies, and those that do not end like a sentence. That
tears holes into texts; here the share of such lines decides about the whole document (the second in fineweb.py).
"""

import re

from megagpt.corpus.config import FilterConfig
from megagpt.corpus.filters.measured import Measured
from megagpt.corpus.filters.shares import above

_BOILERPLATE = (
    "javascript",
    "privacy policy",
    "terms of use",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_SENTENCE_END = re.compile(r"""[.!?।]["'”’»)\]]?(?:\s|$)|[。！？]""")


def lorem_ipsum(document: Measured, config: FilterConfig) -> str | None:
    """The placeholder text of designers."""
    return "lorem ipsum" if config.lorem_ipsum and "lorem ipsum" in document.lower else None


def curly_bracket(document: Measured, config: FilterConfig) -> str | None:
    """A { stands in code, and seldom in prose."""
    if not config.curly_bracket or (place := document.sample.find("{")) < 0:
        return None
    return f"at character {place}"


def boilerplate_lines(document: Measured, config: FilterConfig) -> str | None:
    """More than max_boilerplate_lines of the lines mention JavaScript or policies (the threshold is not C4's)."""
    if config.max_boilerplate_lines is None or not any(phrase in document.lower for phrase in _BOILERPLATE):
        return None
    lines = [line.lower() for line in document.lines]
    boilerplate = sum([any(phrase in line for phrase in _BOILERPLATE) for line in lines])
    return above(boilerplate / len(lines), config.max_boilerplate_lines, "of the lines are boilerplate")


def few_sentences(document: Measured, config: FilterConfig) -> str | None:
    """Fewer than min_sentences sentences: ends of words in . ! or ? (C4's code: 5)."""
    if config.min_sentences is None:
        return None
    sentences = 0
    for _ in _SENTENCE_END.finditer(document.sample):
        sentences += 1
        if sentences >= config.min_sentences:
            return None
    return f"{sentences} sentences, fewer than {config.min_sentences}"
