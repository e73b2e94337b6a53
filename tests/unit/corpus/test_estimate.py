"""The estimate against the run that it is about."""

import gzip
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megagpt.corpus import CorpusConfig, estimate, plan
from megagpt.corpus.config import CleanConfig, DedupConfig
from megagpt.corpus.estimate import _seconds, sample_chunks
from megagpt.corpus.executor import StageResult
from megagpt.corpus.extract import ExtractTask
from megagpt.corpus.plan import make_plan
from megagpt.corpus.screening import Screening
from megagpt.tokenizer import load_tokenizer
from tests.unit.corpus.test_pipeline import InlinePool, run
from tests.unit.corpus.texts import document, edited, write_jsonl


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of a few hundred words with some copies, in files of several kinds; two thirds of all bytes in one."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(1)
    texts = [document(rng, rng.randrange(100, 500)) for _ in range(1800)]
    for copy in range(0, 1800, 12):
        texts[rng.randrange(1800)] = edited(texts[copy], rng, copy % 2)
    path = write_jsonl(folder / "in/a.jsonl", texts[:1200])
    with gzip.open(folder / "in/b.jsonl.gz", "wb") as file:
        file.write(write_jsonl(folder / "b.jsonl", texts[1200:1400]).read_bytes())
    pq.write_table(pa.table({"text": texts[1400:1600]}), folder / "in/c.parquet", row_group_size=20)
    for number, text in enumerate(texts[1600:]):
        (folder / f"in/d{number:03d}.txt").write_text(text)
    assert path.stat().st_size > 1_500_000
    return folder


def estimated(folder: Path, **options: Any) -> estimate.Estimate:
    settings = {"tokenizer": "bytes", "input": [str(folder / "in")], "output": str(folder / "out"), **options}
    return estimate.estimate(CorpusConfig.model_validate(settings), InlinePool())


def test_of_a_small_corpus_everything_is_read_and_the_estimate_is_what_happens(corpus: Path) -> None:
    found = estimated(corpus)
    assert not (corpus / "out").exists()
    assert not (corpus / "out.work").exists()
    report = run(corpus, "whole", overwrite=True)
    assert found.share == 1
    assert found.documents == report.counts["documents"] == 1800
    assert found.least_tokens == found.most_tokens == report.tokens
    removed = report.counts["removed_exact"] + report.counts["removed_near"]
    assert found.least_duplicates == found.most_duplicates == pytest.approx(removed / 1800)
    assert removed > 100
    written = sum(
        path.stat().st_size for path in (corpus / "whole").iterdir() if path.suffix in (".bin", ".idx", ".ids")
    )
    assert found.output_bytes == pytest.approx(written, abs=500)


@pytest.mark.parametrize("chunk_mb", [None, 0.02])
def test_a_sample_tells_documents_and_tokens_about_right_and_duplicates_between_two_bounds(
    corpus: Path, chunk_mb: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "SAMPLE_BYTES", 10_000)
    found = estimated(corpus, execution={"chunk_mb": chunk_mb})
    report = run(corpus, "whole", overwrite=True)
    assert 0.1 < found.share < 0.5
    assert found.documents == pytest.approx(1800, rel=0.15)
    removed = report.counts["removed_exact"] + report.counts["removed_near"]
    assert found.least_duplicates < removed / 1800 < 1.5 * found.most_duplicates
    assert found.least_tokens <= found.most_tokens == pytest.approx(report.tokens, rel=0.3)
    assert set(found.seconds) == {stage.name for stage in report.stages} - {"join"}
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.removed == {"clean": 0, "filter": 0, "decontaminate": 0}


@pytest.mark.parametrize("chunk_mb", [0.002, 0.02, 1.0])
def test_no_document_is_sampled_twice(corpus: Path, chunk_mb: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "SAMPLE_BYTES", 5_000)
    config = CorpusConfig.model_validate(
        {"input": [str(corpus / "in")], "output": "x", "execution": {"chunk_mb": chunk_mb}}
    )
    made = make_plan(config, load_tokenizer("bytes"))
    chunks, limits = sample_chunks(made)
    assert len(chunks) == len(limits)
    ends: dict[int, int] = {}
    for piece in (piece for chunk in chunks for piece in chunk.pieces):
        assert piece.start >= ends.get(piece.file_index, 0)
        ends[piece.file_index] = piece.stop
    assert {made.files[index].kind for index in ends} == {"jsonl", "parquet", "text"}


def test_no_file_is_read_much_further_than_its_share_of_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(2)
    for number in range(40):
        lines = write_jsonl(tmp_path / f"in/{number:02d}a.jsonl", [document(rng, 200) for _ in range(10)])
        with gzip.open(tmp_path / f"in/{number:02d}b.jsonl.gz", "wb") as file:
            file.write(lines.read_bytes() * 4)
    monkeypatch.setattr(estimate, "SAMPLE_BYTES", 3_000)
    made = make_plan(CorpusConfig(input=[str(tmp_path / "in")], output="x"), load_tokenizer("bytes"))
    chunks, limits = sample_chunks(made)
    assert len(chunks) > 20
    for number, (chunk, limit) in enumerate(zip(chunks, limits, strict=True)):
        target = tmp_path / f"result_{number}"
        target.mkdir()
        task = ExtractTask(chunk, "text", 1 << 20, Screening(CleanConfig()), DedupConfig(), limit)
        assert task.run(target)["bytes"] < 3 * 3_000


def test_chunks_of_a_huge_input_grow_so_that_their_number_stays_bounded() -> None:
    assert plan._chunk_bytes(None, 1 << 30) == 1 << 23
    assert (100 << 40) // plan._chunk_bytes(None, 100 << 40) <= 1 << 14


def test_the_proof_of_the_encoder_takes_as_long_for_a_large_corpus_as_for_its_sample() -> None:
    receipts = [{"seconds": 0.5}] * 4
    result = StageResult([], receipts, 0, {})
    assert _seconds("proof", result, 2000.0, 8) == pytest.approx(0.5)
    assert _seconds("tokenize", result, 2000.0, 8) == pytest.approx(2000 * 4 * 0.5 / 8)
