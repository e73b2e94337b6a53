"""The benchmark of the loader, at a tiny size: every figure is there, beside its target, and of the real thing."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megagpt.benchmark.data import DataBenchmark
from megagpt.benchmark.fresh import call
from megagpt.benchmark.targets import Target
from megagpt.data.indexed import IndexedDataset
from megagpt.errors import UserError
from tests.unit.data.reference import write_stream


@pytest.fixture
def benchmark(tmp_path: Path) -> DataBenchmark:
    return DataBenchmark(tmp_path, tokens=10**9, documents=1000, datasets=3, repeats=1, report=lambda line: None)


def test_the_huge_dataset_is_whole_and_takes_no_disk(benchmark: DataBenchmark) -> None:
    dataset = IndexedDataset(benchmark._write_huge())
    assert (dataset.num_tokens, dataset.num_documents) == (10**9, 1000)
    assert dataset.lengths.astype(np.int64).sum() == 10**9
    assert len(set(dataset.lengths.tolist())) > 900, "documents of one length would be easy to find"
    ends = np.cumsum(dataset.lengths.astype(np.int64))
    assert np.array_equal(dataset.pointers[1:], 2 * ends[:-1])
    assert sum(file.stat().st_blocks for file in benchmark.folder.iterdir()) * 512 < 100_000


def test_the_datasets_of_the_blend_are_whole(benchmark: DataBenchmark) -> None:
    sources = benchmark._write_blend()
    datasets = [IndexedDataset(source["path"]) for source in sources]
    assert all(dataset.verify()[1] < 50_257 for dataset in datasets)
    assert len({dataset.edge_hash() for dataset in datasets}) == 3
    assert len({source["weight"] for source in sources}) == 3


def test_a_figure_is_judged_by_its_target() -> None:
    lines: list[str] = []
    fast = Target(20e6, "million tokens/s", at_least=True, scale=1e6)
    judged = fast.judge("loader", 5e6, lines.append, values=[4e6, 5e6, 7e6])
    assert (judged["value"], judged["target"], judged["at_least"], judged["met"]) == (5e6, 20e6, True, False)
    assert (judged["min"], judged["max"]) == (4e6, 7e6)
    assert Target(0.2, "s").judge("stall", 0.2, lines.append, "of 1 s")["met"] is True
    assert lines == [
        "loader: 5 million tokens/s; target at least 20 million tokens/s: MISSED",
        "stall: 0.2 s (of 1 s); target at most 0.2 s: met",
    ]


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(UserError, match=r"open_dataset failed: .*nowhere.idx: no such file"):
        call("megagpt.benchmark.data", "open_dataset", {"prefix": "nowhere"})


def test_opening_is_measured_without_torch_and_reads_what_is_there(tmp_path: Path) -> None:
    found = call("megagpt.benchmark.data", "open_dataset", {"prefix": write_stream(tmp_path / "a", 1000)})
    assert 0 < found["seconds"] < 1
    assert 10e6 < found["bytes"] < 100e6, "a process with torch in it takes more"


@pytest.mark.slow
def test_the_command_measures_everything_beside_its_target(tmp_path: Path) -> None:
    output, scratch = tmp_path / "out.json", tmp_path / "scratch"
    options = ["--tokens", "200000", "--documents", "300", "--datasets", "3", "--repeats", "1"]
    command = [sys.executable, "-m", "tools.benchmark", "data", *options, "--folder", str(scratch)]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    judged = [
        result["loader"]["rate"],
        *(value for name, value in result["opening"].items() if name != "import_bytes"),
        *result["access"].values(),
        result["blend"]["seconds"],
        result["resume"]["seconds"],
    ]
    assert len(judged) == 9
    assert all(figure["value"] > 0 and isinstance(figure["met"], bool) for figure in judged)
    assert done.stdout.count("; target at ") == 9
    rates = result["loader"]["tokens_per_second"]
    assert rates["megagpt"] == result["loader"]["rate"]["value"]
    assert result["loader"]["ratio"]["median"] == pytest.approx(rates["megagpt"] / rates["plain memmap loop"])
    assert result["resume"]["same_batch"] is True
    assert (result["tokens"], result["documents"], result["datasets"]) == (200_000, 300, 3)
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "tools.benchmark", "data"]
    cases = {
        ("--documents", "1", "--tokens", str(2**31)): "error: --documents 1: for 2147483648 tokens a document",
        ("--folder", str(tmp_path / "file")): f"error: --folder {tmp_path / 'file'}: cannot be used: ",
    }
    for options, message in cases.items():
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=100)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1


def test_a_benchmark_that_is_terminated_leaves_nothing(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    command = [sys.executable, "-m", "tools.benchmark", "data", "--folder", str(scratch)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not (scratch.exists() and any(scratch.iterdir())) and time.monotonic() < until:
            time.sleep(0.1)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "error: terminated\n")
    assert list(scratch.iterdir()) == []
