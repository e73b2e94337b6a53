"""The benchmark of the corpus, at a tiny size: it runs the real thing, and its figures are those of the runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megagpt.benchmark.corpus as module
from megagpt.benchmark.corpus import Benchmark
from megagpt.errors import UserError

CHECKOUT = Path(__file__).parents[3]


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def benchmark(tmp_path: Path, lines: list[str]) -> Benchmark:
    filters = tmp_path / "filters.yaml"
    filters.write_text("clean: {enabled: true}\n")
    return Benchmark(tmp_path, 0.3, workers=2, repeats=1, filter_config=filters, large=False, report=lines.append)


def test_signatures_are_compared_with_the_same_ones_of_datasketch(benchmark: Benchmark, lines: list[str]) -> None:
    result = benchmark.signatures()
    rates = result["documents_per_second"]
    assert result["same_signatures"] is True
    assert result["ratio"] == rates["megagpt"] / rates["datasketch"]
    assert result["documents"] == 37
    assert len(lines) == 1


@pytest.mark.slow
def test_whole_runs_are_measured_by_one_and_by_all_workers(benchmark: Benchmark, lines: list[str]) -> None:
    result = benchmark.run(["bands", "pipeline"])
    assert 700 < result["bands"]["documents"] < 800
    assert len(result["bands"]["seconds"]) == 1
    rates = result["pipeline"]["megabytes_per_second"]
    assert set(rates) == {f"{name}, {n} workers" for name in ("dedup", "clean, filter, dedup") for n in (1, 2)}
    assert result["pipeline"]["scaling"]["dedup"] == rates["dedup, 2 workers"] / rates["dedup, 1 workers"]
    assert len(lines) == 1 + 4 + 2
    json.dumps(result)


@pytest.mark.slow
def test_tokenization_is_compared_with_a_plain_loop(benchmark: Benchmark) -> None:
    pytest.importorskip("gigatoken")
    result = benchmark.run(["tokenize"])["tokenize"]
    names = [f"{backend}, {n} workers" for n in (1, 2) for backend in ("tiktoken", "gigatoken")]
    assert list(result["megabytes_per_second"]) == [*names, "plain loop, 1 threads", "plain loop, 2 threads"]
    assert result["ratio"]["plain loop, 2 threads"] == 1


@pytest.mark.slow
def test_growth_has_the_memory_of_the_processes(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINEAR_MEGABYTES", (0.1, 0.3))
    result = benchmark.run(["linear"])["linear"]
    assert list(result) == ["0.1", "0.3"]
    for size in result.values():
        assert size["seconds_per_megabyte"] > 0
        assert 20e6 < size["peak_bytes"] < 2e9


def test_a_run_that_fails_says_why(benchmark: Benchmark) -> None:
    with pytest.raises(UserError, match=r"the measured run failed: .*nowhere"):
        benchmark._preprocess({"input": [str(benchmark.folder / "nowhere")]}, 1)


@pytest.mark.slow
def test_the_command_writes_the_result(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.benchmark", "corpus", "--megabytes", "0.1", "--repeats", "2"]
    output = tmp_path / "out" / "result.json"
    run = subprocess.run(
        [*command, "--parts", "signatures", "--folder", str(tmp_path / "scratch"), "--output", str(output)],
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the same signatures" in run.stdout
    assert json.loads(output.read_text())["signatures"]["ratio"] > 0
    assert list((tmp_path / "scratch").iterdir()) == []
    wrong = subprocess.run([*command, "--parts", "speed"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr == "error: --parts speed: choose from signatures, bands, tokenize, pipeline, linear\n"
