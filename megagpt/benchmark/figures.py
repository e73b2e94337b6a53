"""The figures in a result, whichever benchmark it is of: name, value, range, and what it shall be, if that is said.

A result says itself what a figure shall be where a benchmark judged it (megagpt.benchmark.targets); for others the
suite does. What no reader below knows shows its judged figures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megagpt.benchmark.targets import Target, number

Result = Mapping[str, Any]
"""JSON types."""

COLUMNS = ("figure", "measured", "range", "target", "")
_JUDGED = {"value", "target", "at_least", "met"}


@dataclass(frozen=True)
class Figure:
    """One number."""

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    scale: float = 1.0
    """What value and range are divided by where they are shown."""
    target: Target | None = None
    """In the same unit."""

    @property
    def met(self) -> bool | None:
        """None: it has no target."""
        return self.target.met_by(self.value) if self.target else None

    def cells(self) -> tuple[str, ...]:
        """A text for each of COLUMNS."""
        spread = "" if self.low is None or self.high is None else f"{self._shown(self.low)} to {self._shown(self.high)}"
        aim = (self.target.text, "met" if self.met else "MISSED") if self.target else ("", "")
        return (self.name, f"{self._shown(self.value)} {self.unit}", spread, *aim)

    def _shown(self, value: float) -> str:
        return number(value / self.scale)


def figures_of(result: Result, targets: Mapping[str, Target] | None = None) -> list[Figure]:
    """All figures of a result. targets: of those that the result itself does not judge, by their names.

    Raises KeyError, TypeError, AttributeError or ValueError for what is no result of its benchmark.
    """
    read = _READERS.get(result["benchmark"])
    found = [*(read(result) if read else ()), *_judged(result)]
    return [replace(figure, target=(targets or {}).get(figure.name, figure.target)) for figure in found]


def main_figures(figures: Sequence[Figure]) -> list[Figure]:
    """Those with a target; if there are none, the first."""
    return [figure for figure in figures if figure.target is not None] or list(figures[:1])


def aligned(figures: Sequence[Figure]) -> list[str]:
    """A table for a terminal; columns in which nothing stands are left out."""
    columns = list(zip(COLUMNS, *(figure.cells() for figure in figures), strict=True))
    shown = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in shown]
    rows = zip(*shown, strict=True)
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _judged(value: object) -> Iterator[Figure]:
    """In the order of the result."""
    if not isinstance(value, Mapping):
        return
    if value.keys() >= _JUDGED:
        target = Target(value["target"], value["unit"], value["at_least"], value["scale"])
        yield Figure(value["name"], value["value"], target.unit, value["min"], value["max"], target.scale, target)
    for part in value.values():
        yield from _judged(part)


def _train(result: Result) -> Iterator[Figure]:
    for name, speedup in result["speedup_over"].items():
        yield _times(f"speedup over {name}", speedup)
    for name, seconds in result["step_seconds"].items():
        yield Figure(f"{name}: step", seconds, "s")
        yield Figure(f"{name}: speed", result["tokens_per_second"][name], "tokens/s")
    if result["mfu"]:
        yield Figure("MFU", result["mfu"], "%", scale=0.01)
    for name, size in (result.get("step_bytes") or {}).items():
        yield Figure(f"{name}: memory a token", size / result["tokens_per_micro_batch"], "kB", scale=1e3)


def _generate(result: Result) -> Iterator[Figure]:
    for one in result["results"]:
        name = f"{one['model']}, batch {one['rows']}"
        for other, speedup in one["speedup_over"].items():
            yield _times(f"{name}: speedup over {other}", speedup)
        for contender, rate in one["tokens_per_second"].items():
            yield Figure(f"{name}: {contender}", rate, "new tokens/s")
        yield Figure(f"{name}: of memory's speed", one["share_of_bandwidth"], "%", scale=0.01)


def _corpus(result: Result) -> Iterator[Figure]:
    if part := result.get("signatures"):
        yield Figure("signatures, one core", part["documents_per_second"]["megagpt"], "documents/s")
        yield Figure("signatures, over datasketch", part["ratio"], "x")
    if part := result.get("bands"):
        rates = [part["documents"] / seconds for seconds in part["seconds"]]
        yield Figure("banding and clustering", part["documents_per_second"], "documents/s", min(rates), max(rates))
    for name, title in (("tokenize", "tokenization"), ("dedup", "duplicates alone"), ("pipeline", "whole runs")):
        part = result.get(name, {})
        for contender, rate in part.get("megabytes_per_second", {}).items():
            rates = [part["megabytes"] / seconds for seconds in part["all_seconds"][contender]]
            yield Figure(f"{title}: {contender}", rate, "MB/s", min(rates), max(rates))
        for contender, ratio in part.get("scaling", {}).items():
            yield Figure(f"{title}: {contender}, over 1 worker", ratio, "x")
        for peer, speedup in part.get("speedup_over", {}).items():
            yield _times(f"{title}: {speedup['contender']}, speedup over {peer} {speedup['version']}", speedup)


def _loss(result: Result) -> Iterator[Figure]:
    for name, speedup in result["speedup_over"].items():
        yield _times(f"speedup over {name}", speedup)
    for name, seconds in result["seconds"].items():
        yield Figure(name, seconds * 1e3, "ms")
        if peak := result["peak_bytes"][name]:
            yield Figure(f"{name}: memory", peak, "MB", scale=1e6)


def _growth(result: Result) -> Iterator[Figure]:
    for axis, points in result["axes"].items():
        over = [point["step_seconds"] / point["ideal_seconds"] for point in points]
        yield Figure(f"{axis} {points[0]['size']:,} to {points[-1]['size']:,}: farthest from ideal", max(over), "x")


def _times(name: str, ratio: Mapping[str, float]) -> Figure:
    return Figure(name, ratio["median"], "x", ratio["min"], ratio["max"])


_READERS: dict[str, Callable[[Result], Iterator[Figure]]] = {
    "train": _train,
    "loss": _loss,
    "generate": _generate,
    "corpus": _corpus,
    "growth": _growth,
}
