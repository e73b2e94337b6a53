"""`make quickstart` from the first step to the last, with fewer training steps."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megagpt.data.indexed import IndexedDataset
from megagpt.training.metrics import read_metrics


def quickstart(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "tools.quickstart",
        "--data",
        str(folder / "data"),
        "--run-dir",
        str(folder / "run"),
    ]
    return subprocess.run([*command, "--steps", "60"], capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_beats_a_unigram_model_and_does_nothing_twice(tmp_path):
    done = quickstart(tmp_path)
    assert done.returncode == 0, done.stderr
    (validation,) = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if r["kind"] == "validation"]
    assert validation["targets"] == IndexedDataset(tmp_path / "data/tokens/validation").num_tokens - 1
    assert f"validation loss {validation['loss']:.3f}" in done.stdout
    baseline = float(done.stdout.split("unigram model")[1].split()[0])
    assert validation["loss"] < baseline - 0.3
    assert done.stdout.count("$ python -m tools.generate") == 3
    with Image.open(tmp_path / "run/loss.png") as picture:
        assert picture.width > 500

    checkpoint = tmp_path / "run/checkpoints/step_00000060/manifest.json"
    written = checkpoint.stat().st_mtime_ns
    again = quickstart(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "all 60 steps are done" in again.stdout
    assert checkpoint.stat().st_mtime_ns == written
    assert (tmp_path / "data/tokens/report.html").exists()
