"""Quantities as people write them, and back: 300B tokens, 6300h, 20GB/s; 41.2 GiB, 3.1 days."""

import math
import re

from megagpt.errors import UsageError

_COUNTS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_SECONDS = {
    "s": 1, "sec": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "minute": 60, "minutes": 60,
    "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400, "days": 86400, "y": 31557600, "year": 31557600,
    "years": 31557600,
}  # fmt: skip
_QUANTITY = re.compile(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_count(text: str, what: str) -> int:
    """A whole number of `what`, such as 300B, 1.5T, 2e4 or 131072. Raises UsageError."""
    number = _parse(text, _COUNTS, lower=True)
    if number is None and re.fullmatch(r"[0-9.]+[eE]\+?[0-9]{1,2}", text.strip(), re.ASCII):
        number = float(text)
    if number is None or not number >= 1 or number != int(number):
        raise UsageError(f"{what} {text!r}: write a whole number above 0, such as 300B (k, M, B and T are 10^3 to 10^12)")
    return int(number)


def parse_seconds(text: str, what: str) -> float:
    """Seconds of a duration with its unit: 30s, 10min, 6300h, 260d, 2y. Raises UsageError."""
    number = _parse(text, _SECONDS, lower=True, needs_unit=True)
    if number is None or not 0 < number < math.inf:
        raise UsageError(f"{what} {text!r} is no duration; write 30s, 10min, 6300h, 260d or 2y")
    return number


def parse_counts(text: str, what: str) -> list[int]:
    """Several whole numbers, in ascending order: "8,64,512". Raises UsageError."""
    return sorted({parse_count(part, what) for part in re.split(r"[ ,]+", text.strip())})


def _parse(text: str, units: dict[str, float], lower: bool, needs_unit: bool = False) -> float | None:
    found = _QUANTITY.fullmatch(text)
    if not found or (needs_unit and not found[2]):
        return None
    unit = found[2].lower() if lower else found[2]
    digits = found[1].replace(",", "").replace("_", "")
    # A product of floats would make 16.1B no whole number.
    return round(float(digits) * units[unit], 6) if unit in units else None


def size_text(size: float) -> str:
    """Bytes as "41.2 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1023.5 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}" if size < 999.5 else f"{size:,.0f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def duration_text(seconds: float) -> str:
    """Seconds as "12 min" or "3.1 days"."""
    if math.isinf(seconds):
        return "for ever"
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= 1.5 * length or unit == "ms":
            number = seconds / length
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"
    raise AssertionError("unreachable")
