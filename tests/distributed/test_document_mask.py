"""Documents stay apart through the engine, too: ZeRO-3's hooks see the masks of FlexAttention on their way."""

from unittest.mock import patch

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from megagpt.config.schema import RunConfig
from megagpt.model import GPT, use_flex_attention
from tests.distributed.jobs import losses, tiny_config, train_and_report

STEPS = 4


def train_with_flex_attention(config: RunConfig) -> tuple[list[float], int]:
    """Losses of a run, and how often FlexAttention was called."""
    calls = 0

    def kernel(*tensors: torch.Tensor, **options: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return flex_attention(*tensors, **options)

    def build(*arguments: object, **options: object) -> GPT:
        model = GPT(*arguments, **options)
        use_flex_attention(model, kernel)
        return model

    # torch refuses the backward pass on a CPU for want of a fused kernel; the unfused one is there.
    allow_backward = patch("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    with patch("megagpt.training.engine.GPT", build), allow_backward:
        return losses(train_and_report(config)), calls


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_flex_attention_trains_like_masked_sdpa(zero_stage, two_ranks, corpus, tmp_path):
    def config(name: str, document_mask: bool) -> RunConfig:
        return tiny_config(
            corpus,
            tmp_path / name,
            model={"position": "rope", "num_kv_heads": 2},
            data={"document_mask": document_mask, "validation": []},
            train={"steps": STEPS, "micro_batch_size": 2, "activation_checkpointing": True},
            schedule={"warmup_steps": 0},
            parallel={"zero_stage": zero_stage},
        )

    unmasked = losses(two_ranks.run(train_and_report, config("unmasked", False))[0])
    masked = losses(two_ranks.run(train_and_report, config("masked", True))[0])
    found, calls = two_ranks.run(train_with_flex_attention, config("flex", True))[0]
    assert found == pytest.approx(masked, abs=1e-5)
    assert found != pytest.approx(unmasked, abs=1e-4)
    # Each step: two micro-batches, two layers, each computed again in backward.
    assert calls == STEPS * 2 * 2 * 2
