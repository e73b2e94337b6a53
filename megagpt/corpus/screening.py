"""What is done to the text of one document, whatever the others are, before documents are compared."""

from dataclasses import dataclass, field
from pathlib import Path

from megagpt.corpus.clean import clean
from megagpt.corpus.config import CleanConfig, DecontaminateConfig, FilterConfig
from megagpt.corpus.decontaminate import open_index
from megagpt.corpus.filters import first_failure
from megagpt.corpus.filters.measured import Measured
from megagpt.corpus.reasons import CONTAMINATED, EMPTY, Reason


@dataclass(frozen=True)
class Screened:
    """The outcome for one document."""

    text: str
    """The cleaned text."""
    reason: Reason | None = None
    """Why the document is removed; None: it stays."""
    detail: str = ""
    """What exactly, for the lists."""
    contamination: str = ""
    """What a document that stays shares with evaluation data; empty: nothing."""
    language: str = ""
    """Its likeliest language, as ISO 639 code; empty: nobody looked for it."""


@dataclass(frozen=True)
class Screening:
    """The settings of a run; calling it screens one document."""

    clean: CleanConfig
    filter: FilterConfig = field(default_factory=FilterConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    evaluation: Path | None = None
    """Result of the stage `evaluation`; None: there are no evaluation files."""

    def __call__(self, text: str) -> Screened:
        """Clean the text, and find out whether the document stays."""
        if self.clean.enabled:
            text = clean(text, self.clean)
        if not text:
            return Screened(text, EMPTY)
        language = ""
        if self.filter.enabled:
            measured = Measured(text)
            failure = first_failure(measured, self.filter)
            language = measured.language
            if failure:
                return Screened(text, *failure, language=language)
        shared = self._contamination(text)
        if shared and self.decontaminate.action == "drop":
            return Screened(text, CONTAMINATED, shared, language=language)
        return Screened(text, contamination=shared, language=language)

    def _contamination(self, text: str) -> str:
        if self.evaluation is None:
            return ""
        return open_index(self.evaluation, self.decontaminate.ngram_words).find(text) or ""
