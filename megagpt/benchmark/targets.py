"""Measured figures beside what they shall be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """What a figure shall be."""

    limit: float
    unit: str
    """As it is printed: a figure in bytes has the limit in bytes and the unit MB, see `scale`."""
    at_least: bool = False
    """Whether the figure shall be no less than the limit; else, no more."""
    scale: float = 1.0
    """What a figure is divided by where it is printed."""

    def judge(self, name: str, value: float, report: Callable[[str], None], more: str = "") -> dict[str, Any]:
        """Report the figure beside its target, with what else is to be said; returns both in JSON types."""
        met = value >= self.limit if self.at_least else value <= self.limit
        side = "at least" if self.at_least else "at most"
        shown, limit = (f"{number / self.scale:,.4g} {self.unit}" for number in (value, self.limit))
        report(f"{name}: {shown}{more and f' ({more})'}; target {side} {limit}: {'met' if met else 'MISSED'}")
        return {"value": value, "target": self.limit, "at_least": self.at_least, "met": met}
