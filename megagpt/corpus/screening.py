"""What is done to the text of one document, whatever the others are, before documents are compared."""

from dataclasses import dataclass

from megagpt.corpus.clean import clean
from megagpt.corpus.config import CleanConfig
from megagpt.corpus.reasons import EMPTY, Reason


@dataclass(frozen=True)
class Screened:
    """The outcome for one document."""

    text: str
    """The cleaned text."""
    reason: Reason | None = None
    """Why the document is removed; None: it stays."""
    detail: str = ""
    """What exactly, for the lists."""


@dataclass(frozen=True)
class Screening:
    """The settings of a run; calling it screens one document."""

    clean: CleanConfig

    def __call__(self, text: str) -> Screened:
        """Clean the text, and find out whether the document stays."""
        if self.clean.enabled:
            text = clean(text, self.clean.repair_encoding)
        if not text:
            return Screened(text, EMPTY)
        return Screened(text)
