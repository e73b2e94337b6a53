"""What a start takes: the command on a tiny model, the dataset it generates, and a run that fails."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megagpt.benchmark.start import PARTS, _kill_all, write_dataset
from megagpt.data.indexed import IndexedDataset

TINY = (
    "model: {vocab_size: 101, num_layers: 1, hidden_size: 16, num_attention_heads: 2, max_seq_len: 32}\n"
    "data: {train: [{path: nowhere}], validation: [{path: nowhere}]}\n"
    "train: {device: cpu, compile: false, global_batch_size: 4, precision: bf16}\n"
)


def start(config: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "tools.benchmark",
        "start",
        config,
        "--tokens",
        100_000,
        "--repeats",
        1,
        *arguments,
    ]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_the_parts_of_a_start_end_with_the_first_step(tmp_path: Path):
    config, output, scratch = tmp_path / "tiny.yaml", tmp_path / "start.json", tmp_path / "scratch"
    config.write_text(TINY)
    began = time.monotonic()
    done = start(config, "--folder", scratch, "--output", output)
    seconds = time.monotonic() - began
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(output.read_text())
    for name, limit in {"cold": 40, "warm": 15}.items():
        found = result[name]
        assert list(found["parts"]) == [*PARTS, "second step"]
        assert min(found["parts"].values()) > 0
        assert found["seconds"]["value"] == pytest.approx(sum(found["parts"][part] for part in PARTS))
        assert found["seconds"]["target"] == limit
    assert result["cold"]["seconds"]["value"] + result["warm"]["seconds"]["value"] < seconds
    assert list(scratch.iterdir()) == []


def test_the_runs_own_error_is_told(tmp_path: Path):
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    done = start(config, "train.init_from=nowhere")
    assert done.returncode == 1
    assert re.fullmatch(r"error: the run failed: [^\n]*nowhere[^\n]*\n", done.stderr)


@pytest.mark.parametrize("vocab_size", [50257, 128256])
def test_the_dataset_has_its_tokens_in_documents(tmp_path: Path, vocab_size: int):
    write_dataset(tmp_path / "train", 2500, vocab_size)
    dataset = IndexedDataset(tmp_path / "train")
    assert [len(dataset.document(number)) for number in range(dataset.num_documents)] == [1000, 1000, 500]
    assert 0 <= dataset.tokens(0, 2500).min() <= dataset.tokens(0, 2500).max() < vocab_size


def test_ranks_that_a_launcher_started_in_sessions_of_their_own_end_with_it():
    rank = [sys.executable, "-c", "import time; time.sleep(600)"]
    launch = (
        f"import subprocess; p = subprocess.Popen({rank!r}, start_new_session=True); print(p.pid, flush=True); p.wait()"
    )
    launcher = subprocess.Popen([sys.executable, "-c", launch], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    with launcher.stdout as output:
        started = psutil.Process(int(output.readline()))
    _kill_all(launcher)
    started.wait(timeout=10)
    assert launcher.returncode == -9
