"""Quantities as people write them, and back: 300B tokens, 6300h, 20GB/s; 41.2 GiB, 3.1 days."""

import math
import re
from collections.abc import Mapping
from decimal import Decimal

from megagpt.errors import UsageError

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_SECONDS = {
    "s": 1, "sec": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "minute": 60, "minutes": 60,
    "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400, "days": 86400, "y": 31557600, "year": 31557600,
    "years": 31557600,
}  # fmt: skip
_QUANTITY = re.compile(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_count(text: str, what: str) -> int:
    """A whole number of `what`, such as 300B, 1.5T, 2e4 or 131072. Raises UsageError."""
    number = _parse(text, _COUNTS)
    if number is None or number < 1 or number != int(number):
        raise UsageError(
            f"{what} {text!r}: write a whole number above 0, such as 300B (k, M, B and T are 10^3 to 10^12)"
        )
    return int(number)


def parse_seconds(text: str, what: str) -> float:
    """Seconds of a duration with its unit: 30s, 10min, 6300h, 260d, 2y. Raises UsageError."""
    number = _parse(text, _SECONDS)
    if not number:
        raise UsageError(f"{what} {text!r} is no duration; write 30s, 10min, 6300h, 260d or 2y")
    return float(number)


def parse_counts(text: str, what: str) -> list[int]:
    """Several whole numbers, in ascending order: "8,64,512". Raises UsageError."""
    return sorted({parse_count(part, what) for part in re.split(r"[ ,]+", text.strip())})


def _parse(text: str, units: Mapping[str, int]) -> Decimal | None:
    """Exact, so that 8.2B is a whole number; None for another unit, and for none where there is no unit 1."""
    found = _QUANTITY.fullmatch(text)
    if not found or found[2].lower() not in units:
        return None
    return Decimal(found[1].replace(",", "").replace("_", "")) * units[found[2].lower()]


def size_text(size: float) -> str:
    """Bytes as "41.2 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1023.5 or unit == "TiB":
            return (
                f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}" if size < 999.5 else f"{size:,.0f} {unit}"
            )
        size /= 1024
    raise AssertionError("unreachable")


def duration_text(seconds: float) -> str:
    """Seconds as "12 min" or "3.1 days"."""
    if math.isinf(seconds):
        return "for ever"
    for unit, length, least in (
        ("days", 86400.0, 2),
        ("h", 3600.0, 2),
        ("min", 60.0, 2),
        ("s", 1.0, 1),
        ("ms", 1e-3, 0),
    ):
        if seconds >= least * length:
            number = seconds / length
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"
    raise AssertionError("unreachable")
