"""Measured figures beside what they shall be."""

from collections.abc import Callable, Sequence
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

    @property
    def text(self) -> str:
        """In words and the unit."""
        return f"{'>=' if self.at_least else '<='} {number(self.limit / self.scale)} {self.unit}"

    def met_by(self, value: float) -> bool:
        """Whether a figure is what it shall be."""
        return value >= self.limit if self.at_least else value <= self.limit

    def judge(
        self, name: str, value: float, report: Callable[[str], None], more: str = "", values: Sequence[float] = ()
    ) -> dict[str, Any]:
        """Report the figure beside its target, with what else is to be said; returns both in JSON types.

        values: those of which the figure is the median, for their range.
        """
        met = self.met_by(value)
        side = "at least" if self.at_least else "at most"
        shown, limit = (f"{number / self.scale:,.4g} {self.unit}" for number in (value, self.limit))
        report(f"{name}: {shown}{more and f' ({more})'}; target {side} {limit}: {'met' if met else 'MISSED'}")
        low, high = (min(values), max(values)) if values else (None, None)
        return {
            "name": name.strip(),
            "value": value,
            "min": low,
            "max": high,
            "unit": self.unit,
            "scale": self.scale,
            "target": self.limit,
            "at_least": self.at_least,
            "met": met,
        }


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
