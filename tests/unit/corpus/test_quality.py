"""Quality of the deduplication of whole runs on generated corpora in which every duplicate is known."""

import io
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from megagpt.corpus import CorpusConfig, preprocess
from megagpt.corpus.config import CleanConfig, DedupConfig
from megagpt.corpus.sample_text import Copy, write_sample_corpus
from tests.unit.corpus.test_pipeline import InlinePool
from tests.unit.corpus.texts import shingles

DOCUMENTS, DOCUMENT_BYTES = 3200, 3000
SEEDS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Outcome:
    """What a run at a threshold of 0.8 made of a corpus; documents by number."""

    texts: list[str]
    copies: list[Copy]
    survivors: dict[int, int]
    """Of each removed document the one that stays."""
    stages: dict[int, str]
    """The stage that removed it."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return [deduplicated(tmp_path_factory.mktemp("quality"), seed) for seed in SEEDS]


@pytest.fixture(params=range(len(SEEDS)), ids=lambda place: f"seed {SEEDS[place]}")
def outcome(request: pytest.FixtureRequest, outcomes: list[Outcome]) -> Outcome:
    return outcomes[request.param]


def deduplicated(folder: Path, seed: int) -> Outcome:
    corpus = write_sample_corpus(
        folder / "text", DOCUMENTS * DOCUMENT_BYTES, seed, DOCUMENT_BYTES, exact_share=0.1, near_share=0.4
    )
    numbers, texts = {}, []
    for index, path in enumerate(sorted((folder / "text").glob("*.jsonl"))):
        position = 0
        for line in path.read_bytes().splitlines(keepends=True):
            numbers[f"{index}:{position}"] = len(texts)
            texts.append(json.loads(line)["text"])
            position += len(line)
    config = CorpusConfig(
        input=[f"{folder}/text/*.jsonl"],
        output=str(folder / "tokens"),
        tokenizer="bytes",
        clean=CleanConfig(enabled=False),
        dedup=DedupConfig(threshold=0.8),
    )
    report = preprocess(config, InlinePool())
    assert report.counts["documents"] == len(texts) == corpus.documents >= 3000
    with zstandard.open(folder / "tokens/removed.jsonl.zst", "rb") as stream:
        removed = [json.loads(line) for line in io.TextIOWrapper(stream)]
    assert report.counts["kept"] == len(texts) - len(removed)
    return Outcome(
        texts,
        corpus.copies,
        survivors={numbers[line["id"]]: numbers[line["survivor"]] for line in removed},
        stages={numbers[line["id"]]: line["stage"] for line in removed},
    )


def test_every_exact_copy_is_removed_and_the_first_stays(outcome: Outcome) -> None:
    first: dict[str, int] = {}
    copies = 0
    for number, text in enumerate(outcome.texts):
        earlier = first.setdefault(" ".join(text.split()), number)
        if earlier != number:
            copies += 1
            assert outcome.stages[number] == "exact"
            assert outcome.survivors[number] == outcome.survivors.get(earlier, earlier)
        else:
            assert outcome.stages.get(number) != "exact"
    assert copies > 0.08 * len(outcome.texts)


@pytest.mark.parametrize(("least_similarity", "least_recall"), [(0.85, 0.97), (0.9, 0.995)])
def test_nearly_all_planted_near_duplicates_are_removed(
    outcomes: list[Outcome], least_similarity: float, least_recall: float
) -> None:
    pairs = found = 0
    for outcome in outcomes:
        planted = [copy.number for copy in outcome.copies if least_similarity <= copy.jaccard < 1]
        pairs += len(planted)
        found += len(set(planted) & set(outcome.survivors))
    assert pairs > 800
    assert found >= least_recall * pairs


def test_hardly_any_document_is_removed_without_a_similar_one_in_its_cluster(outcome: Outcome) -> None:
    clusters = defaultdict(list)
    for number in range(len(outcome.texts)):
        clusters[outcome.survivors.get(number, number)].append(number)
    near = [number for number, stage in outcome.stages.items() if stage == "near"]
    similar = 0
    for number in near:
        own = shingles(outcome.texts[number])
        cluster = clusters[outcome.survivors[number]]
        earlier = [shingles(outcome.texts[other]) for other in cluster if other < number]
        similar += max((len(own & other) / len(own | other) for other in earlier), default=0) >= 0.7
    assert len(near) > 0.1 * len(outcome.texts)
    assert similar >= 0.98 * len(near)


def test_documents_that_are_no_copies_stay(outcome: Outcome) -> None:
    planted = {copy.number for copy in outcome.copies}
    assert set(outcome.survivors) <= planted
    assert not {outcome.survivors[number] for number in outcome.survivors} & set(outcome.survivors)
