"""Growth of a step's time: what is scaled, the ideal, and the command on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megagpt.benchmark import growth
from megagpt.benchmark.growth import AXES, FACTORS, Growth, _flops, scaled
from megagpt.config import load_config
from megagpt.errors import UsageError
from megagpt.model.counts import flops_per_token


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "model: {vocab_size: 101, num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_kv_heads: 2,\n"
        "        max_seq_len: 16}\n"
        "data: {train: [{path: nowhere}]}\n"
        "train: {device: cpu, compile: false, global_batch_size: 4, precision: bf16}\n"
    )
    return path


def test_each_axis_changes_one_thing_and_the_operations_as_they_should(file: Path):
    config = load_config(file)
    per_layer = _flops(scaled(config, "depth", 2)) - _flops(config)
    assert _flops(scaled(config, "depth", 4)) == _flops(config) + 3 * per_layer
    assert _flops(scaled(config, "batch", 4)) == 4 * _flops(config)
    wide = scaled(config, "width", 2).model
    assert (wide.hidden_size, wide.num_attention_heads, wide.kv_heads, wide.head_dim) == (64, 8, 4, 8)
    long = scaled(config, "sequence length", 2)
    assert (long.seq_len, long.model.max_seq_len) == (32, 32)
    attention = 3 * 2 * 4 * 32 * 16 * 16 * 4  # forward and backward, layers, scores and values, batch
    assert _flops(long) == 2 * _flops(config) + 2 * attention


@pytest.mark.parametrize(("axis", "value"), [("depth", "model.num_layers=3"), ("batch", "train.global_batch_size=1")])
def test_what_cannot_be_halved_is_refused(file: Path, axis: str, value: str):
    with pytest.raises(UsageError, match=f"{axis}: .* is no size; choose a configuration whose {axis} can be halved"):
        scaled(load_config(file, [value]), axis, 0.5)


def test_the_ideal_is_the_highest_rate_of_the_points():
    growth = Growth("depth", [1, 2, 4], [10, 20, 40], [1.0, 1.5, 4.0])
    assert growth.ideal_seconds == pytest.approx([0.75, 1.5, 3.0])


def test_ranks_share_the_time_of_one_as_far_as_each_has_a_cpu():
    growth = Growth("ranks", [1, 2, 3, 4], [8] * 4, [6.0, 4.0, 4.0, 5.0], cpus=2)
    assert growth.ideal_seconds == pytest.approx([6, 3, 3, 3])


def test_an_unknown_axis_is_refused_with_the_names_of_all(file: Path):
    command = [sys.executable, "-m", "tools.benchmark", "growth", file, "--axes", "depth,rank"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100)
    names = "sequence length, depth, width, batch, ranks"
    assert (done.returncode, done.stderr) == (2, f"error: there is no axis 'rank'; choose from {names}\n")


@pytest.mark.slow
def test_the_command_measures_axes_and_draws_them(file: Path, tmp_path: Path):
    plot, output = tmp_path / "pictures/growth.png", tmp_path / "growth.json"
    sizes = [axis for axis in AXES if axis != "ranks"]
    words = ["growth", file, "--steps", 1, "--axes", ",".join(sizes), "--plot", plot, "--output", output]
    command = [sys.executable, "-m", "tools.benchmark", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["axes"]
    assert list(found) == sizes
    assert [point["size"] for point in found["width"]] == [int(32 * factor) for factor in FACTORS]
    for points in found.values():
        ratios = [point["step_seconds"] / point["ideal_seconds"] for point in points]
        assert min(ratios) == pytest.approx(1)
        assert all(point["parts_seconds"]["matrix products"] > 0 for point in points)
    assert (np.asarray(Image.open(plot).convert("L")) < 100).mean() > 0.002


@pytest.mark.slow
def test_ranks_are_jobs_of_their_own_that_share_a_batch(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(growth, "RANKS", (1, 2))
    lines: list[str] = []
    found = growth._measure_ranks(load_config(file), 1, lines.append)
    assert (found.sizes, len(found.seconds), len(lines)) == ([1, 2], 2, 2)
    assert found.flops[0] == found.flops[1] == 12 * 16 * flops_per_token(load_config(file).model, 16)
    for seconds, parts in zip(found.seconds, found.parts, strict=True):
        assert min(parts.values()) > 0
        assert sum(parts.values()) < 1.5 * seconds  # medians of each need not add up
