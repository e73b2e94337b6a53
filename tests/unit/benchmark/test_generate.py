"""The comparison of samplers, on a tiny model: every contender draws, and nanoGPT is taken from a file."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megagpt.benchmark.turns import ratio, take_turns
from megagpt.errors import UsageError, UserError
from tools.benchmark import app

NANOGPT = """
import torch
from dataclasses import dataclass


@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    bias: bool
    vocab_size: int
    dropout: float


class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.calls = config, 0
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def load_state_dict(self, state, strict):
        assert not strict
        assert state["transformer.wte.weight"].shape == (self.config.vocab_size, self.config.n_embd)
        return torch.nn.modules.module._IncompatibleKeys(["lm_head.weight"], [])

    def generate(self, ids, new_tokens, temperature, top_k):
        assert (temperature, top_k) == (1.0, 1), "greedy"
        return torch.cat((ids, ids[:, :1].expand(-1, new_tokens)), dim=1)
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "model: {vocab_size: 101, num_layers: 1, hidden_size: 16, num_attention_heads: 2, max_seq_len: 32}\n"
        "data: {train: [{path: nowhere}]}\n"
    )
    return file


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], catch_exceptions=False)


def test_all_contenders_draw_and_the_figures_fit_together(config: Path, tmp_path: Path):
    nanogpt, output = tmp_path / "model.py", tmp_path / "out.json"
    nanogpt.write_text(NANOGPT)
    options = ["--rows", "2", "--new-tokens", "6", "--prompt-tokens", "3", "--repeats", "3", "--dtype", "fp32"]
    done = invoke(config, *options, "--nanogpt", nanogpt, "--output", output)
    assert done.exit_code == 0, done.output
    result = json.loads(output.read_text())
    (found,) = result["results"]
    assert (found["model"], found["rows"]) == ("tiny", 2)
    assert set(found["tokens_per_second"]) == {"megagpt", "uncompiled", "transformers", "nanogpt"}
    assert set(found["speedup_over"]) == {"uncompiled", "transformers", "nanogpt"}
    weights = 4 * (101 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16)  # not the positions, one row of which is read
    share = weights * found["tokens_per_second"]["megagpt"] / 2 / result["read_bytes_per_second"]
    assert found["share_of_bandwidth"] == pytest.approx(share, rel=0.05)
    assert "tiny, batch 2: megagpt" in done.output


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file or directory; give the model.py"), ("x = 1", "has no GPTConfig; give the model.py")],
)
def test_what_is_not_nanogpt_is_refused(config: Path, tmp_path: Path, content: str | None, message: str):
    if content:
        (tmp_path / "model.py").write_text(content)
    with pytest.raises(UserError, match=message):
        invoke(config, "--nanogpt", tmp_path / "model.py", "--no-transformers", "--new-tokens", "2", "--rows", "1")


def test_more_tokens_than_the_model_reads_are_refused(config: Path):
    with pytest.raises(UsageError, match="tiny: reads 32 tokens, fewer than --prompt-tokens and --new-tokens together"):
        invoke(config, "--no-transformers")


def test_contenders_take_turns_and_ratios_are_of_pairs():
    calls: list[str] = []
    times = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 3
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == {"median": 3.0, "min": 2.0, "max": 4.0}
