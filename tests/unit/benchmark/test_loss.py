"""The comparison of losses, on a tiny model."""

import pytest
import torch

from megagpt.benchmark.loss import compare_losses
from tests.unit.model.configs import GPT2


def test_all_contenders_have_the_same_loss_and_a_time():
    lines: list[str] = []
    result = compare_losses(GPT2, tokens=64, repeats=2, device=torch.device("cpu"), report=lines.append)
    assert set(result["seconds"]) == {"megagpt", "full logits, compiled"}
    ours, theirs = result["loss_a_token"].values()
    assert ours == pytest.approx(theirs, rel=1e-2)
    assert result["speedup_over"]["full logits, compiled"]["median"] > 0
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert len(lines) == 2
