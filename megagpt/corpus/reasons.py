"""Why a document is not in the dataset: every reason there is, with the stage that finds it.

The place of a reason in REASONS is its code on disk in the work folder; `key` names it in reports.
"""

from typing import NamedTuple


class Reason(NamedTuple):
    """One reason to remove a document."""

    stage: str
    """The stage that removes it: clean, filter, decontaminate, exact or near."""
    name: str
    """Short name, unique within the stage."""
    text: str
    """What a person reads in the lists."""

    @property
    def key(self) -> str:
        """Name in reports, such as `filter.too_few_words`; the stage alone where that has one reason."""
        return f"{self.stage}.{self.name}" if self.name else self.stage

    @property
    def code(self) -> int:
        """Number on disk."""
        return REASONS.index(self)


EMPTY = Reason("clean", "", "empty after cleaning")

TOO_FEW_CHARACTERS = Reason("filter", "too_few_characters", "fewer characters than filter.min_characters")
TOO_MANY_CHARACTERS = Reason("filter", "too_many_characters", "more characters than filter.max_characters")
LOREM_IPSUM = Reason("filter", "lorem_ipsum", "placeholder text: lorem ipsum")
CURLY_BRACKET = Reason("filter", "curly_bracket", "a curly bracket, as in code")
TOO_FEW_WORDS = Reason("filter", "too_few_words", "fewer words than filter.min_words")
TOO_MANY_WORDS = Reason("filter", "too_many_words", "more words than filter.max_words")
LANGUAGE = Reason("filter", "language", "not in one of filter.languages")
SHORT_WORDS = Reason("filter", "short_words", "words too short on average")
LONG_WORDS = Reason("filter", "long_words", "words too long on average")
HASHES = Reason("filter", "hashes", "too many hash signs for its words")
ELLIPSES = Reason("filter", "ellipses", "too many ellipses for its words")
BULLET_LINES = Reason("filter", "bullet_lines", "too many lines that begin with a bullet")
ELLIPSIS_LINES = Reason("filter", "ellipsis_lines", "too many lines that end with an ellipsis")
NOT_ALPHABETIC = Reason("filter", "not_alphabetic", "too many words without a letter")
FEW_STOP_WORDS = Reason("filter", "few_stop_words", "too few of the most common words of the language")
BOILERPLATE_LINES = Reason("filter", "boilerplate_lines", "too many lines about JavaScript, cookies or terms of use")
FEW_SENTENCES = Reason("filter", "few_sentences", "fewer sentences than filter.min_sentences")
UNPUNCTUATED_LINES = Reason("filter", "unpunctuated_lines", "too few lines that end like a sentence")
SHORT_LINES = Reason("filter", "short_lines", "too many short lines, as in menus and lists")
DUPLICATE_LINES = Reason("filter", "duplicate_lines", "too many repeated lines")
DUPLICATE_PARAGRAPHS = Reason("filter", "duplicate_paragraphs", "too many repeated paragraphs")
DUPLICATE_LINE_CHARACTERS = Reason("filter", "duplicate_line_characters", "too much of the text in repeated lines")
DUPLICATE_PARAGRAPH_CHARACTERS = Reason(
    "filter", "duplicate_paragraph_characters", "too much of the text in repeated paragraphs"
)
TOP_NGRAM = {
    words: Reason("filter", f"top_{words}gram", f"too much of the text is one run of {words} words")
    for words in (2, 3, 4)
}
"""By the number of words."""
DUPLICATE_NGRAMS = {
    words: Reason("filter", f"duplicate_{words}grams", f"too much of the text in repeated runs of {words} words")
    for words in (5, 6, 7, 8, 9, 10)
}
"""By the number of words."""

CONTAMINATED = Reason("decontaminate", "", "shares a run of words with an evaluation document")
EXACT = Reason("exact", "", "same text")
NEAR = Reason("near", "", "near-duplicate")

REASONS = (
    EMPTY,
    TOO_FEW_CHARACTERS,
    TOO_MANY_CHARACTERS,
    LOREM_IPSUM,
    CURLY_BRACKET,
    TOO_FEW_WORDS,
    TOO_MANY_WORDS,
    LANGUAGE,
    SHORT_WORDS,
    LONG_WORDS,
    HASHES,
    ELLIPSES,
    BULLET_LINES,
    ELLIPSIS_LINES,
    NOT_ALPHABETIC,
    FEW_STOP_WORDS,
    BOILERPLATE_LINES,
    FEW_SENTENCES,
    UNPUNCTUATED_LINES,
    SHORT_LINES,
    DUPLICATE_LINES,
    DUPLICATE_PARAGRAPHS,
    DUPLICATE_LINE_CHARACTERS,
    DUPLICATE_PARAGRAPH_CHARACTERS,
    *TOP_NGRAM.values(),
    *DUPLICATE_NGRAMS.values(),
    CONTAMINATED,
    EXACT,
    NEAR,
)
STAGES = ("clean", "filter", "decontaminate", "exact", "near")
"""Stages that remove documents, in their order."""
