"""The filters: small checks of one document's text, each with a threshold in FilterConfig and the paper it is from.

CHECKS is their fixed order, cheap ones first, but for the language, which comes before what is made for English. The
reason of a removal is that of the first check that fails. The checks never change a text.
"""

from collections.abc import Callable

from megagpt.corpus.config import FilterConfig
from megagpt.corpus.filters import c4, fineweb, gopher, language, length, repetition
from megagpt.corpus.filters.measured import Measured
from megagpt.corpus.reasons import (
    BOILERPLATE_LINES,
    BULLET_LINES,
    CURLY_BRACKET,
    DUPLICATE_LINE_CHARACTERS,
    DUPLICATE_LINES,
    DUPLICATE_NGRAMS,
    DUPLICATE_PARAGRAPH_CHARACTERS,
    DUPLICATE_PARAGRAPHS,
    ELLIPSES,
    ELLIPSIS_LINES,
    FEW_SENTENCES,
    FEW_STOP_WORDS,
    HASHES,
    LANGUAGE,
    LONG_WORDS,
    LOREM_IPSUM,
    NOT_ALPHABETIC,
    SHORT_LINES,
    SHORT_WORDS,
    TOO_FEW_CHARACTERS,
    TOO_FEW_WORDS,
    TOO_MANY_CHARACTERS,
    TOO_MANY_WORDS,
    TOP_NGRAM,
    UNPUNCTUATED_LINES,
    Reason,
)

Check = Callable[[Measured, FilterConfig], str | None]
"""Returns what was measured if the document fails, else None."""

CHECKS: tuple[tuple[Reason, Check], ...] = (
    (TOO_FEW_CHARACTERS, length.too_few_characters),
    (TOO_MANY_CHARACTERS, length.too_many_characters),
    (LOREM_IPSUM, c4.lorem_ipsum),
    (CURLY_BRACKET, c4.curly_bracket),
    (TOO_FEW_WORDS, length.too_few_words),
    (TOO_MANY_WORDS, length.too_many_words),
    (LANGUAGE, language.wrong_language),
    (SHORT_WORDS, gopher.short_words),
    (LONG_WORDS, gopher.long_words),
    (HASHES, gopher.hashes),
    (ELLIPSES, gopher.ellipses),
    (BULLET_LINES, gopher.bullet_lines),
    (ELLIPSIS_LINES, gopher.ellipsis_lines),
    (NOT_ALPHABETIC, gopher.not_alphabetic),
    (FEW_STOP_WORDS, gopher.few_stop_words),
    (BOILERPLATE_LINES, c4.boilerplate_lines),
    (FEW_SENTENCES, c4.few_sentences),
    (UNPUNCTUATED_LINES, fineweb.unpunctuated_lines),
    (SHORT_LINES, fineweb.short_lines),
    (DUPLICATE_LINES, repetition.duplicate_lines),
    (DUPLICATE_LINE_CHARACTERS, repetition.duplicate_line_characters),
    (DUPLICATE_PARAGRAPHS, repetition.duplicate_paragraphs),
    (DUPLICATE_PARAGRAPH_CHARACTERS, repetition.duplicate_paragraph_characters),
    *((reason, repetition.top_ngram(words)) for words, reason in TOP_NGRAM.items()),
    *((reason, repetition.duplicate_ngrams(words)) for words, reason in DUPLICATE_NGRAMS.items()),
)


def first_failure(document: Measured, config: FilterConfig) -> tuple[Reason, str] | None:
    """The first check that the document fails, and what was measured; None: it stays."""
    for reason, check in CHECKS:
        if (detail := check(document, config)) is not None:
            return reason, detail
    return None
