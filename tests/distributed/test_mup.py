"""muP under every ZeRO stage trains like a plain loop with muP's own output multiplier and learning rates."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megagpt.config.schema import RunConfig
from megagpt.data.loader import TrainingData
from megagpt.model.gpt import GPT
from megagpt.model.init import initialize_weights
from tests.distributed.jobs import losses, refusal, tiny_config, train_and_report

STEPS, RATIO, LR = 12, 4.0, 2e-2
SECTIONS = {
    "model": {"mup_base_width": 12, "initializer_range": 0.1},
    "optimizer": {"lr": LR, "eps": 1e-15, "grad_clip": 0.0, "weight_decay": 0.1},
    "schedule": {"name": "constant", "warmup_steps": 0},
}


def plain_loop(config: RunConfig) -> list[float]:
    """Yang et al. 2022, table 8: gain 1 and logits times 1/r; matrices inside start at 1/sqrt(r), learn at 1/r."""
    model = GPT(config.model)
    initialize_weights(model, config.train.seed)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)  # the multiplier stands outside
    groups = []
    for name, parameter in model.named_parameters():
        is_hidden = name.startswith("blocks.") and parameter.ndim == 2
        decay = 0.1 if parameter.ndim == 2 else 0.0
        rate = LR / RATIO if is_hidden else LR
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay * LR / rate})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-15)
    data = TrainingData(config.data.train, config.seq_len, config.train.seed, document_mask=False)
    found = []
    for step in range(STEPS):
        batch = data.read(step * 8, 8)
        loss = F.cross_entropy(model(batch.input_ids).flatten(0, 1) / RATIO, batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_train_like_a_plain_loop_with_an_output_multiplier(zero_stage, two_ranks, corpus: Path, tmp_path):
    sections = SECTIONS | {"train": {"steps": STEPS}, "parallel": {"zero_stage": zero_stage}}
    config = tiny_config(corpus, tmp_path / "run", **sections)
    found, expected = losses(two_ranks.run(train_and_report, config)[0]), plain_loop(config)
    assert found == pytest.approx(expected, abs=2e-4)
    assert found[-1] < found[0] - 0.5


def test_a_run_does_not_go_on_under_another_base_width(one_rank, corpus: Path, tmp_path):
    sections = SECTIONS | {"train": {"steps": 2}, "parallel": {"zero_stage": 1}}
    one_rank.run(train_and_report, tiny_config(corpus, tmp_path / "run", **sections))
    changed = SECTIONS | {"train": {"steps": 3}, "model": SECTIONS["model"] | {"mup_base_width": 24}}
    told = one_rank.run(refusal, tiny_config(corpus, tmp_path / "run", **changed))[0]
    assert "model.mup_base_width was 12 and is now 24" in str(told)
