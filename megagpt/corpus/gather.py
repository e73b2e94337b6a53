"""The findings of a run's report, from the receipts and the examples that its stages left in the work folder.

Examples are the first in the order of ids, whatever the input was cut into: chunks and parts are in that order, and
each holds its own first few.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megagpt.corpus.clusters import LARGEST_NAME
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.documents import Documents
from megagpt.corpus.executor import StageResult
from megagpt.corpus.extract import EXAMPLES_PER_REASON
from megagpt.corpus.plan import Plan
from megagpt.corpus.reasons import REASONS
from megagpt.corpus.report import (
    Cluster,
    Contaminated,
    Example,
    Language,
    LengthBin,
    NearDuplicates,
    Removal,
    Report,
)
from megagpt.corpus.select import beginning
from megagpt.corpus.sources import SourceFile
from megagpt.corpus.stages import Results
from megagpt.data.manifest import SplitInfo


def make_report(
    config: CorpusConfig, plan: Plan, results: Results, splits: dict[str, SplitInfo], folder: Path, seconds: float
) -> Report:
    """All about a run that took `seconds` and left `results` in the work folder `folder`."""
    stages, files = results.stages, plan.files
    documents = sum(split.documents for split in splits.values())
    tokens = sum(split.tokens for split in splits.values()) - documents  # each ends with the end-of-document token
    near = "clusters" in stages
    return Report(
        output=Path(config.output),
        counts=results.counts,
        splits=splits,
        removed=removals((stages["extract"], stages["select"]), files, tokens / results.counts["kept_text_bytes"]),
        lengths=lengths(stages["tokenize"]),
        languages=languages(stages["extract"]),
        near_duplicates=near_duplicates(results.documents, stages["bands"], stages["clusters"], files)
        if near
        else None,
        contaminated=contaminated(stages["extract"], files),
        quarantine=results.bad,
        stages=results.times,
        seconds=round(seconds, 3),
        work_bytes=work_bytes(folder),
        config=plan.config,
        versions=plan.versions,
        plan_hash=plan.hash,
    )


def removals(results: Sequence[StageResult], files: Sequence[SourceFile], tokens_per_byte: float) -> list[Removal]:
    """What each reason removed, from the stages `extract` and `select`.

    `tokens_per_byte`: of the documents that stayed, as what was removed was never tokenized.
    """
    found = []
    for reason in REASONS:
        count = sum(result.total(f"removed {reason.key}") for result in results)
        if not count:
            continue
        size = sum(result.total(f"removed bytes {reason.key}") for result in results)
        tokens = round(size * tokens_per_byte) + count  # with end-of-document tokens
        examples = [_example(values, files) for values in _first_examples(results, reason.key)]
        found.append(Removal(reason.stage, reason.key, reason.text, count, size, tokens, examples))
    return found


def _first_examples(results: Sequence[StageResult], key: str) -> list[dict[str, Any]]:
    examples: list[dict[str, Any]] = []
    for result in results:
        for folder, receipt in zip(result.folders, result.receipts, strict=True):
            if len(examples) >= EXAMPLES_PER_REASON:
                return examples[:EXAMPLES_PER_REASON]
            if receipt.get(f"removed {key}"):
                examples += json.loads((folder / "examples.json").read_bytes())[key]
    return examples[:EXAMPLES_PER_REASON]


def _example(values: dict[str, Any], files: Sequence[SourceFile]) -> Example:
    return Example(file=_file_of(values["id"], files), **values)


def _file_of(identifier: str, files: Sequence[SourceFile]) -> str:
    return files[int(identifier.partition(":")[0])].name


def lengths(tokenize: StageResult) -> list[LengthBin]:
    """The histogram of the dataset's documents, without a gap from the shortest to the longest."""
    powers = [int(power) for power in _keys(tokenize, "length")]
    return [
        LengthBin(1 << power, (2 << power) - 1, tokenize.total(f"length {power}"))
        for power in range(min(powers), max(powers) + 1)
    ]


def languages(extract: StageResult) -> list[Language]:
    """Documents and bytes of each language that the filter of languages named, most documents first."""
    found = [
        Language(code, extract.total(f"language {code}"), extract.total(f"language bytes {code}"))
        for code in _keys(extract, "language bytes")
    ]
    return sorted(found, key=lambda language: (-language.documents, language.language))


def _keys(result: StageResult, what: str) -> set[str]:
    """The keys of all counts `what KEY`."""
    names = {name for receipt in result.receipts for name in receipt}
    return {name.removeprefix(f"{what} ") for name in names if name.startswith(f"{what} ")}


def near_duplicates(
    documents: Documents, bands: StageResult, clusters: StageResult, files: Sequence[SourceFile]
) -> NearDuplicates:
    """What the stages `bands` and `clusters` found."""
    largest = []
    for size, survivor in json.loads((clusters.folders[0] / LARGEST_NAME).read_bytes()):
        identifier = documents.id(survivor)
        text = beginning(documents.text(survivor))
        largest.append(Cluster(size, identifier, _file_of(identifier, files), text))
    return NearDuplicates(bands.total("candidates"), bands.total("edges"), clusters.total("clusters"), largest)


def contaminated(extract: StageResult, files: Sequence[SourceFile]) -> Contaminated | None:
    """The documents that share text with evaluation data and stay; None: there are none."""
    count = extract.total("contaminated")
    if not count:
        return None
    examples = []
    for record, _ in zip(_contaminated(extract), range(EXAMPLES_PER_REASON), strict=False):
        identifier = f"{record['file']}:{record['position']}"
        examples.append(Example(identifier, _file_of(identifier, files), record["detail"], text=""))
    return Contaminated(count, examples)


def _contaminated(extract: StageResult) -> Iterator[dict[str, Any]]:
    for folder, receipt in zip(extract.folders, extract.receipts, strict=True):
        if receipt.get("contaminated"):
            with open(folder / "contaminated.jsonl", encoding="utf-8") as lines:
                yield from map(json.loads, lines)


def work_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the files of each stage in a work folder."""
    return {
        stage.name: sum(Path(parent, name).stat().st_size for parent, _, names in os.walk(stage) for name in names)
        for stage in sorted(folder.iterdir())
        if stage.is_dir()
    }
