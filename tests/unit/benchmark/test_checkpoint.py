"""The benchmark of checkpoints, on a tiny model by real ranks: its figures fit together, and the files are real."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.benchmark.checkpoint import CheckpointBenchmark, model_of
from megagpt.errors import UserError
from megagpt.model.counts import parameter_count


@pytest.mark.parametrize("parameters", [200_000, 5_000_000, 85_000_000, 1_000_000_000])
def test_the_model_has_about_the_size_that_was_asked_for(parameters: int) -> None:
    assert parameter_count(model_of(parameters)) == pytest.approx(parameters, rel=0.15)


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GB are free, but 84000000\.0 GB are needed; choose another --folder"):
        CheckpointBenchmark(tmp_path, 10**15, 1, print).run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_measures_everything_beside_its_target(tmp_path: Path) -> None:
    output, scratch = tmp_path / "out.json", tmp_path / "scratch"
    options = ["--parameters", "200000", "--repeats", "2", "--folder", str(scratch), "--output", str(output)]
    command = [sys.executable, "-m", "tools.benchmark", "checkpoint", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    change = result["change_of_ranks"]
    judged = [
        result["save"]["ratio"],
        result["load"]["ratio"],
        result["stall"]["ratio"],
        change["total_seconds"],
        change["memory"],
    ]
    assert all(figure["value"] > 0 and isinstance(figure["met"], bool) for figure in judged)
    assert done.stdout.count("; target at ") == 5
    assert result["parameters"] == parameter_count(model_of(200_000))
    # fp32 weights and two moments, cut in two, and bf16 weights, and what DeepSpeed and this project say of them.
    assert 14 * result["parameters"] < result["bytes"] < 14 * result["parameters"] + 300_000
    assert 6 * result["parameters"] < result["largest_shard_bytes"] < 6 * result["parameters"] + 100_000
    seconds = result["seconds"]
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(
        ("copy", "save", "stall", "copy from disk", "load"), 2
    )
    ratios = [copy / save for copy, save in zip(seconds["copy"], seconds["save"], strict=True)]
    assert result["save"]["ratio"]["value"] == pytest.approx(sum(ratios) / 2)
    assert change["total_seconds"]["value"] == pytest.approx(sum(change["seconds"].values()))
    assert change["memory"]["value"] * result["largest_shard_bytes"] == max(change["memory_bytes"].values())
    assert list(scratch.iterdir()) == []
