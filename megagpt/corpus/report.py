"""What a run did: report.json and report.html beside the dataset, the manifest's counts, the lines on the console.

report.json is the dataclass `Report` below, field by field, with the totals that follow from it; report.html shows the
same data on one page that needs nothing else. Times are in both, so that they alone differ between runs of one plan.
"""

import dataclasses
import importlib.resources
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from megagpt.corpus.executor import StageResult
from megagpt.corpus.quarantine import Quarantined, place
from megagpt.corpus.reasons import STAGES
from megagpt.data.manifest import SplitInfo

TITLES = {
    "clean": "empty after cleaning",
    "filter": "filters",
    "decontaminate": "evaluation texts",
    "exact": "exact duplicates",
    "near": "near-duplicates",
}
"""What the stages that remove documents remove."""

_CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421"}


@dataclass(frozen=True)
class StageTime:
    """One stage of a run."""

    name: str
    tasks: int
    reused: int
    """Tasks that an earlier, interrupted run had finished."""
    seconds: float
    """Duration in this run."""
    documents: int | None = None
    """Documents that this run worked on in the stage; null: the stage does not count them."""
    bytes: int | None = None
    """Bytes of input (stage extract) or of text that this run worked on; null: the stage does not count them."""
    tokens: int | None = None
    """Tokens that this run made or moved; null: the stage has none."""

    @classmethod
    def of(cls, name: str, result: StageResult, seconds: float) -> "StageTime":
        """Of a stage that left `result` after this time."""
        new = result.new

        def amount(*names: str) -> int | None:
            return next((round(new[name]) for name in names if name in new), None)

        size = amount("bytes", "text_bytes")
        tasks = len(result.folders)
        return cls(name, tasks, result.reused, round(seconds, 3), amount("documents"), size, amount("tokens"))

    @property
    def documents_per_second(self) -> float | None:
        """Of this run's work, by the time of the clock; None: not counted, or too short to tell."""
        return self._rate(self.documents)

    @property
    def megabytes_per_second(self) -> float | None:
        """The same of 10^6 bytes."""
        return self._rate(self.bytes and self.bytes / 1e6)

    @property
    def tokens_per_second(self) -> float | None:
        """The same of tokens."""
        return self._rate(self.tokens)

    def _rate(self, amount: float | None) -> float | None:
        return amount / self.seconds if amount and self.seconds > 0 else None


@dataclass(frozen=True)
class Example:
    """One document."""

    id: str
    """File index and position, as in removed.jsonl.zst."""
    file: str
    """Name of its file."""
    detail: str
    """What exactly was found."""
    text: str
    """The beginning of its cleaned text; of a duplicate what is around its first difference from the survivor."""
    survivor: str | None = None
    """Id of the document that stays in its stead; null: none does."""
    survivor_text: str | None = None
    """The same of that one's text."""


@dataclass(frozen=True)
class Removal:
    """What was removed for one reason."""

    stage: str
    """clean, filter, decontaminate, exact or near."""
    key: str
    """Name of the reason, with its stage."""
    reason: str
    """The reason in words, as in removed.jsonl.zst."""
    documents: int
    bytes: int
    """Bytes of their cleaned texts, in UTF-8."""
    estimated_tokens: int
    """Tokens they would have been, at the bytes a token of the documents that stayed."""
    examples: list[Example]
    """The first of them, in the order of ids."""


@dataclass(frozen=True)
class FunnelStep:
    """The corpus as it was read, or after one stage that removes documents."""

    stage: str
    """A stage that removes documents; `read`: before all of them."""
    removed_documents: int
    removed_bytes: int
    """Bytes of the removed documents' cleaned texts, in UTF-8."""
    removed_estimated_tokens: int
    """See Removal.estimated_tokens."""
    documents: int
    """Documents left."""
    bytes: int
    """Bytes of cleaned text left."""
    estimated_tokens: int
    """Tokens left; exact after the last stage."""


@dataclass(frozen=True)
class LengthBin:
    """Documents of the dataset with `least` to `most` tokens, the end-of-document token included."""

    least: int
    most: int
    documents: int


@dataclass(frozen=True)
class Language:
    """Documents that the filter of languages took for one language, whether they stayed or not."""

    language: str
    """ISO 639 code."""
    documents: int
    bytes: int
    """Bytes of their cleaned texts, in UTF-8."""


@dataclass(frozen=True)
class Cluster:
    """Documents that are duplicates of each other, directly or in a chain."""

    documents: int
    """How many they are, with the one that stays."""
    survivor: str
    """Id of the one that stays."""
    file: str
    """Name of its file."""
    text: str
    """The beginning of its text."""


@dataclass(frozen=True)
class NearDuplicates:
    """What the search for near-duplicates found."""

    candidates: int
    """Pairs of documents that were compared, as they agree in a band; a pair may be so in several."""
    edges: int
    """Those of them that are similar."""
    clusters: int
    """Groups of duplicates, near or exact, of which one document each stays."""
    largest: list[Cluster]
    """Those with the most documents, the largest first."""


@dataclass(frozen=True)
class Contaminated:
    """Documents that stay though they share text with evaluation data."""

    documents: int
    examples: list[Example]
    """The first of them, in the order of ids."""


@dataclass(frozen=True)
class Report:
    """The result of `preprocess`."""

    output: Path
    """Folder of the dataset."""
    counts: dict[str, int]
    """Documents and bytes by what became of them: those of the manifest."""
    splits: dict[str, SplitInfo]
    """Documents and tokens of each split."""
    removed: list[Removal] = field(default_factory=list)
    """Every reason that removed a document, in the order of the checks."""
    lengths: list[LengthBin] = field(default_factory=list)
    """Histogram of the dataset's documents, in powers of two."""
    languages: list[Language] = field(default_factory=list)
    """The most frequent language first; none: the filter of languages did not run."""
    near_duplicates: NearDuplicates | None = None
    """null: they were not searched for."""
    contaminated: Contaminated | None = None
    """null: there are none."""
    quarantine: list[Quarantined] = field(default_factory=list)
    """What could not be read, by reason, the most frequent first."""
    stages: list[StageTime] = field(default_factory=list)
    """The stages of this run, in order; none if the dataset was there already."""
    seconds: float = 0.0
    """Duration of this run."""
    work_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes in the work folder by stage, when the dataset was complete."""
    config: dict[str, Any] = field(default_factory=dict)
    """What of the configuration shapes the result."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that shape the result."""
    plan_hash: str = ""

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
    def work_bytes_per_document(self) -> float:
        """Bytes that a document took in the work folder, on average."""
        return sum(self.work_bytes.values()) / max(self.counts["documents"], 1)

    @property
    def funnel(self) -> list[tuple[str, int]]:
        """Documents that came in, left at each stage, and stayed."""
        removed = [(f"removed: {TITLES[stage]}", self.counts[f"removed_{stage}"]) for stage in STAGES]
        return [("documents in", self.counts["documents"]), *removed, ("documents out", self.counts["kept"])]

    @property
    def steps(self) -> list[FunnelStep]:
        """The funnel of documents, bytes and tokens, in the order of the stages."""
        documents, size = self.counts["documents"], self.counts["text_bytes"]
        tokens = self.tokens + sum(removal.estimated_tokens for removal in self.removed)
        steps = [FunnelStep("read", 0, 0, 0, documents, size, tokens)]
        for stage in STAGES:
            found = [removal for removal in self.removed if removal.stage == stage]
            out = (
                sum(removal.documents for removal in found),
                sum(removal.bytes for removal in found),
                sum(removal.estimated_tokens for removal in found),
            )
            documents, size, tokens = documents - out[0], size - out[1], tokens - out[2]
            steps.append(FunnelStep(stage, *out, documents, size, tokens))
        return steps

    def to_json(self) -> str:
        """The content of report.json, in ASCII: paths may have bytes that are no UTF-8."""
        rates = ("documents_per_second", "megabytes_per_second", "tokens_per_second")
        values = dataclasses.asdict(self) | {
            "output": str(self.output),
            "splits": {name: split.model_dump() for name, split in self.splits.items()},
            "stages": [
                dataclasses.asdict(stage) | {rate: getattr(stage, rate) for rate in rates} for stage in self.stages
            ],
            "tokens": self.tokens,
            "funnel": [dataclasses.asdict(step) for step in self.steps],
            "megabytes_per_second": self.megabytes_per_second,
            "work_bytes_per_document": self.work_bytes_per_document,
        }
        return json.dumps(values, indent=2) + "\n"

    def to_html(self) -> str:
        """The content of report.html."""
        source = importlib.resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters.update(
            count=lambda number: f"{number:,}",
            rate=lambda number: "" if number is None else f"{number:,.1f}" if number < 1000 else f"{number:,.0f}",
            visible=_visible,
            size=_size,
            percent=_percent,
            place=place,
            as_json=lambda value: json.dumps(value, indent=2),
        )
        return environment.from_string(source).render(report=self, titles=TITLES)


def _visible(text: str) -> str:
    """`text` with control characters as their pictures, so that none is lost or acts on the page."""
    return text.translate(_CONTROL_PICTURES)


def _size(number: float) -> str:
    """A number of bytes in words."""
    if number < 1000:
        return f"{number:,.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 1000:
            return f"{number:,.1f} {unit}"
    return f"{number / 1000:,.1f} TB"


def _percent(part: float, whole: float) -> str:
    share = 100 * part / whole if whole else 0.0
    return "<0.1%" if 0 < share < 0.05 else f"{share:.1f}%"
