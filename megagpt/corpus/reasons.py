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
EXACT = Reason("exact", "", "same text")
NEAR = Reason("near", "", "near-duplicate")

REASONS = (EMPTY, EXACT, NEAR)
STAGES = ("clean", "filter", "decontaminate", "exact", "near")
"""Stages that remove documents, in their order."""
