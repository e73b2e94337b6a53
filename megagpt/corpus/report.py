"""What a run did: counts, times and versions, for the console, the manifest and report.html."""

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from megagpt.data.manifest import SplitInfo


@dataclass(frozen=True)
class StageTime:
    """One stage of a run."""

    name: str
    tasks: int
    reused: int
    """Tasks that an earlier, interrupted run had finished."""
    seconds: float
    """Duration in this run."""


@dataclass(frozen=True)
class Report:
    """The result of `preprocess`."""

    output: Path
    """Folder of the dataset."""
    counts: dict[str, int]
    """Documents and bytes by what became of them: see `funnel`."""
    splits: dict[str, SplitInfo]
    """Documents and tokens of each split."""
    stages: list[StageTime] = field(default_factory=list)
    """The stages of this run, in order; none if the dataset was there already."""
    seconds: float = 0.0
    """Duration of this run."""

    @property
    def was_finished(self) -> bool:
        """Whether an earlier run of the same plan had made the dataset, and this one did nothing."""
        return not self.stages

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(split.tokens for split in self.splits.values())

    @property
    def megabytes_per_second(self) -> float | None:
        """Input, uncompressed, by the duration of this run, in MB/s (10^6 bytes); None if an earlier one helped."""
        if self.was_finished or any(stage.reused for stage in self.stages):
            return None
        return self.counts["input_bytes"] / 1e6 / max(self.seconds, 1e-9)

    @property
    def funnel(self) -> list[tuple[str, int]]:
        """Documents that came in, left at each stage, and stayed."""
        counts = self.counts
        return [
            ("documents in", counts["documents"]),
            ("removed: empty after cleaning", counts["removed_clean"]),
            ("removed: filters", counts["removed_filter"]),
            ("removed: evaluation texts", counts["removed_decontaminate"]),
            ("removed: exact duplicates", counts["removed_exact"]),
            ("removed: near-duplicates", counts["removed_near"]),
            ("documents out", counts["kept"]),
        ]


def render_html(
    report: Report, config: Mapping[str, Any], versions: Mapping[str, str], bad: Mapping[str, int], plan_hash: str
) -> str:
    """A self-contained page about the run; `bad` counts quarantined records by reason."""
    source = importlib.resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(source).render(
        report=report, config=config, versions=versions, bad=bad, plan_hash=plan_hash
    )
