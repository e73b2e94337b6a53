"""ZeRO 1 in bf16 with our sums of gradients against DeepSpeed's own, bit for bit."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megagpt.data.loader import Batch
from megagpt.training import engine as module
from megagpt.training.engine import Engine
from tests.distributed.jobs import VOCAB_SIZE, tiny_config

STEPS = 4


def numbers_and_weights(config, ours: bool, bad_step: int | None) -> tuple[list[tuple[float, float, bool]], list]:
    """Of some steps of two micro-batches; in `bad_step` a weight makes the loss infinite."""
    with patch.object(module, "keep_gradients_flat", module.keep_gradients_flat if ours else lambda engine: None):
        engine = Engine(config, 2, 2, torch.device("cpu"))
    generator = torch.Generator().manual_seed(dist.get_rank())
    found = []
    for step in range(STEPS):
        tokens = torch.randint(VOCAB_SIZE, (4, 33), generator=generator)
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        scale = engine.module.norm.weight
        before = scale.detach().clone()
        if step == bad_step:
            scale.data.fill_(torch.inf)
        result = engine.step([batch[:2], batch[2:]], 1e-2).read()
        if step == bad_step:
            scale.data.copy_(before)
        found.append((result.loss, result.grad_norm, result.skipped))
    weights = [parameter.detach().float().tolist() for parameter in engine.module.parameters()]
    engine.close()
    return found, weights


@pytest.mark.parametrize(
    "options", [{}, {"bf16": {"immediate_grad_update": True}}, {"prescale_gradients": True}], ids=str
)
@pytest.mark.parametrize("bad_step", [None, 1])
def test_steps_are_those_with_deepspeeds_own_sums(bad_step, options, two_ranks, corpus, tmp_path):
    config = tiny_config(
        corpus,
        tmp_path / "run",
        parallel={"zero_stage": 1},
        train={"precision": "bf16", "micro_batch_size": 2, "global_batch_size": 8},
        deepspeed=options,
    )
    ours, theirs = (two_ranks.run(numbers_and_weights, config, own, bad_step)[0] for own in (True, False))
    assert str(ours[0]) == str(theirs[0])  # a loss may be no number
    assert ours[1] == theirs[1]
    assert [skipped for *_, skipped in ours[0]] == [step == bad_step for step in range(STEPS)]
