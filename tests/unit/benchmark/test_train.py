"""The comparison of training steps, on a tiny model, as a user starts it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.errors import UsageError
from tools.benchmark import train


def test_a_step_is_compared_with_the_plain_loop_and_transformers(tmp_path: Path):
    config, output = tmp_path / "tiny.yaml", tmp_path / "out.json"
    config.write_text(
        "model: {vocab_size: 101, num_layers: 1, hidden_size: 16, num_attention_heads: 2, max_seq_len: 32}\n"
        "data: {train: [{path: nowhere}]}\n"
        "train: {device: cpu, compile: false, global_batch_size: 4, micro_batch_size: 2, precision: bf16}\n"
    )
    command = [sys.executable, "-m", "tools.benchmark", "train", str(config), "--steps", "3", "--transformers"]
    command += ["--against", "parallel.zero_stage=2 optimizer.grad_clip=0"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    variant = "parallel.zero_stage=2 optimizer.grad_clip=0"
    names = {"megagpt", "plain", "transformers", "transformers, compiled", variant}
    assert set(result["step_seconds"]) == names
    assert set(result["speedup_over"]) == names - {"megagpt"}
    assert result["tokens_per_step"] == 4 * 32
    for name, seconds in result["step_seconds"].items():
        assert result["tokens_per_second"][name] == pytest.approx(128 / seconds)
    assert re.search(r"^speedup over transformers, compiled +[\d.]+ x +[\d.]+ to [\d.]+$", done.stdout, re.MULTILINE)


def test_what_a_peer_cannot_express_is_refused_before_anything_starts():
    with pytest.raises(UsageError, match=r"^cannot compare: nanoGPT .*position"):
        train("configs/small.yaml", ["model.position=rope"], nanogpt=Path("model.py"))


def test_a_variant_must_have_the_same_batch():
    with pytest.raises(
        UsageError, match=r"--against 'train\.global_batch_size=16': train\.global_batch_size must be that"
    ):
        train("configs/small.yaml", against=["train.global_batch_size=16"])
