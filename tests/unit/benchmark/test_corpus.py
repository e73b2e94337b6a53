"""The benchmark of the corpus, at a tiny size: it runs the real thing, and its figures are those of the runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import megagpt.benchmark.corpus as module
from megagpt.benchmark.corpus import Benchmark
from megagpt.benchmark.corpus_peers import check_datatrove
from megagpt.benchmark.corpus_plot import draw_linear
from megagpt.benchmark.corpus_runs import child
from megagpt.convert.tokenizers import to_huggingface
from megagpt.errors import UserError
from megagpt.tokenizer import load_tokenizer

CHECKOUT = Path(__file__).parents[3]


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def benchmark(tmp_path: Path, lines: list[str]) -> Benchmark:
    filters = tmp_path / "filters.yaml"
    filters.write_text("clean: {enabled: true}\n")
    return Benchmark(tmp_path, 0.3, 2, 1, filters, large=False, datatrove=False, report=lines.append)


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
    times = result["pipeline"]["all_seconds"]
    gain = times["dedup, 1 workers"][0] / times["dedup, 2 workers"][0]
    assert result["pipeline"]["scaling"]["dedup"] == pytest.approx(gain)
    for name, (seconds,) in times.items():
        assert sum(result["pipeline"]["stage_seconds"][name].values()) == pytest.approx(seconds)
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
def test_growth_has_the_stages_and_the_memory_of_every_size(
    benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "LINEAR_MEGABYTES", (0.1, 0.3))
    result = benchmark.run(["linear"])["linear"]
    assert result["megabytes"] == pytest.approx([0.1, 0.3], rel=0.1)
    stages = result["stage_seconds"]
    assert {"extract", "tokenize", "other"} < set(stages)
    for place, seconds in enumerate(result["seconds"]):
        assert sum(values[place] for values in stages.values()) == pytest.approx(seconds)
        assert 20e6 < result["peak_bytes"][place] < 2e9
    rates = [size / second for size, second in zip(result["megabytes"], result["seconds"], strict=True)]
    ideal = [size / second for size, second in zip(result["megabytes"], result["ideal_seconds"], strict=True)]
    assert ideal == pytest.approx([max(rates)] * 2)
    draw_linear(result, tmp_path / "linear.png")
    assert (tmp_path / "linear.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_index_in_memory_finds_what_the_stages_find(benchmark: Benchmark) -> None:
    result = replace(benchmark, megabytes=1).run(["dedup"])["dedup"]
    assert set(result["removed"]) == {"megagpt, 1 workers", "megagpt, 2 workers", "datasketch, 1 process"}
    ours, theirs = result["removed"]["megagpt, 2 workers"], result["removed"]["datasketch, 1 process"]
    assert 0 < ours <= theirs <= ours + 3  # which verifies nothing
    speedup = result["speedup_over"]["datasketch"]
    assert speedup["contender"] == "megagpt, 1 workers"
    times = result["all_seconds"]
    assert speedup["median"] == times["datasketch, 1 process"][0] / times["megagpt, 1 workers"][0]
    json.dumps(result)


@pytest.mark.slow
def test_datatrove_removes_about_the_same_documents(benchmark: Benchmark, lines: list[str]) -> None:
    pytest.importorskip("datatrove")
    pytest.importorskip("spacy")
    result = replace(benchmark, megabytes=1, datatrove=True).run(["dedup"])["dedup"]
    ours, theirs = result["removed"]["megagpt, 2 workers"], result["removed"]["datatrove, 2 workers"]
    assert 0 < ours <= theirs <= ours + 5
    assert list(result["stage_seconds"]["datatrove, 2 workers"]) == ["signatures", "buckets", "clusters", "filter"]
    assert lines[-1].startswith("megagpt, 2 workers: ")


@pytest.mark.slow
def test_datatrove_writes_the_tokens_of_what_stays(benchmark: Benchmark, tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    pytest.importorskip("spacy")
    corpus, output = tmp_path / "two", tmp_path / "tokens"
    corpus.mkdir()
    texts = ["The first of two documents, with some words.", "Another one, of which there is a copy indeed."]
    for number, documents in enumerate((texts, texts[1:])):
        lines = [json.dumps({"id": str(place), "text": text}) for place, text in enumerate(documents)]
        (corpus / f"part_{number}.jsonl").write_text("\n".join(lines) + "\n")
    gpt2 = load_tokenizer("gpt2")
    to_huggingface(gpt2).save(str(tmp_path / "tokenizer.json"))
    arguments = {"input": str(corpus), "output": str(output), "workers": 2}
    result = child("corpus_peers", "run_datatrove", {**arguments, "tokenizer": str(tmp_path / "tokenizer.json")})
    assert result["removed"] == 1
    (file,) = (output / "tokens").glob("*.ds")
    documents = bytes(np.fromfile(file, np.uint16) == gpt2.eod_id).count(1)
    assert documents == 2
    assert sorted(np.fromfile(file, np.uint16)) == sorted(
        i for text in texts for i in [*gpt2.encode(text), gpt2.eod_id]
    )


def test_a_missing_peer_is_named_before_anything_runs(benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(UserError, match=r"datatrove.*pip install 'megagpt\[benchmark\]'"):
        check_datatrove()
    with pytest.raises(UserError, match="datatrove"):
        replace(benchmark, datatrove=True).run(["dedup"])


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
    assert wrong.stderr == "error: --parts speed: choose from signatures, bands, tokenize, dedup, pipeline, linear\n"
    undrawn = subprocess.run(
        [*command, "--parts", "bands", "--plot", "x.png"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert (undrawn.returncode, undrawn.stderr) == (2, "error: --plot: draws `linear`; add it to --parts\n")
