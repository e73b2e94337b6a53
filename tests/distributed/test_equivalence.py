"""Ranks, ZeRO stages and accumulation only divide the work: every cut gives the losses of a plain torch loop."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megagpt.config.schema import RunConfig
from megagpt.data.loader import TrainingData
from megagpt.data.samples import IGNORE_INDEX
from megagpt.model.gpt import GPT, compile_model
from megagpt.model.init import initialize_weights
from megagpt.training import engine
from tests.distributed.jobs import losses, tiny_config, train_and_report

STEPS = 20


def plain_loop(config: RunConfig) -> list[float]:
    """The same training written with nothing but torch: full logits, mean cross-entropy, AdamW, clipping, cosine."""
    model = GPT(config.model)
    initialize_weights(model, config.train.seed)
    decay = [p for p in model.parameters() if p.ndim > 1]
    no_decay = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    data = TrainingData(config.data.train, config.seq_len, config.train.seed, document_mask=False)
    found = []
    for step in range(STEPS):
        batch = data.read(step * 8, 8)
        loss = F.cross_entropy(model(batch.input_ids).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warmup, progress = (step + 1) / 5, (step - 5) / (STEPS - 5)
        shape = warmup if step < 5 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * shape
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return plain_loop(tiny_config(corpus, tmp_path_factory.mktemp("reference")))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_train_like_a_plain_torch_loop(zero_stage, two_ranks, corpus, tmp_path, reference):
    config = tiny_config(corpus, tmp_path / "run", parallel={"zero_stage": zero_stage})
    found = losses(two_ranks.run(train_and_report, config)[0])
    assert found == pytest.approx(reference, abs=1e-5)
    assert found[-1] < found[0] - 0.5  # it learned, so the comparison covers real updates


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_accumulation_on_two_ranks_changes_nothing(zero_stage, two_ranks, corpus, tmp_path, reference):
    config = tiny_config(corpus, tmp_path / "run", parallel={"zero_stage": zero_stage}, train={"micro_batch_size": 1})
    assert losses(two_ranks.run(train_and_report, config)[0]) == pytest.approx(reference, abs=1e-5)


def test_one_rank_with_accumulation_trains_like_a_plain_torch_loop(one_rank, corpus, tmp_path, reference):
    config = tiny_config(corpus, tmp_path / "run", train={"micro_batch_size": 2})
    assert losses(one_rank.run(train_and_report, config)[0]) == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_stays_within_one_percent_of_fp32(zero_stage, two_ranks, corpus, tmp_path, reference):
    settings = {"precision": "bf16", "micro_batch_size": 2}
    config = tiny_config(corpus, tmp_path / "run", parallel={"zero_stage": zero_stage}, train=settings)
    assert losses(two_ranks.run(train_and_report, config)[0]) == pytest.approx(reference, rel=0.01)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_gradients_of_many_bf16_micro_batches_are_summed_in_fp32(zero_stage, two_ranks, corpus, tmp_path):
    # Summing 256 gradients in bf16 changes the norm by 0.25%; rounding each of them to bf16 by 0.01%.
    def grad_norm(name: str, **settings: object) -> float:
        config = tiny_config(
            corpus,
            tmp_path / name,
            model={"num_layers": 1},
            train={"steps": 1, "global_batch_size": 512, **settings},
            schedule={"warmup_steps": 0},
            parallel={"zero_stage": zero_stage},
            data={"validation": []},
        )
        return two_ranks.run(train_and_report, config)[0][1]["grad_norm"]

    exact = grad_norm("exact", precision="fp32")
    assert grad_norm("bf16", precision="bf16", micro_batch_size=1) == pytest.approx(exact, rel=1e-3)


def train_and_report_compiled_as_one(config: RunConfig) -> list[dict[str, Any]]:
    with patch.object(engine, "compile_model", wraps=compile_model) as compiled:
        records = train_and_report(config)
    compiled.assert_called_once()
    return records


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("zero_stage", "scope"), [(2, "block"), (3, "block"), (2, "model")])
def test_compiled_and_offloaded_and_checkpointed_runs_train_alike(
    zero_stage, scope, one_rank, corpus, tmp_path, reference
):
    config = tiny_config(
        corpus,
        tmp_path / "run",
        parallel={"zero_stage": zero_stage, "offload_optimizer": True},
        train={"compile": True, "compile_scope": scope, "activation_checkpointing": True},
    )
    run = train_and_report_compiled_as_one if scope == "model" else train_and_report
    found = losses(one_rank.run(run, config, timeout=500)[0])  # a C++ compiler is at work
    assert found == pytest.approx(reference, abs=1e-5)


def test_validation_loss_is_the_mean_over_every_token_once(two_ranks, corpus, tmp_path):
    config = tiny_config(
        corpus, tmp_path / "run", train={"steps": 1}, schedule={"warmup_steps": 0}, optimizer={"lr": 1e-12}
    )
    records = two_ranks.run(train_and_report, config)[0]
    (found,) = [record for record in records if record["kind"] == "validation"]
    stream = torch.from_numpy(np.fromfile(corpus / "validation.bin", np.uint16).astype(np.int64))
    model = GPT(config.model)
    initialize_weights(model, config.train.seed)
    total = 0.0
    for start in range(0, len(stream) - 1, 32):
        inputs, targets = stream[start:-1][:32], stream[start + 1 :][:32]
        total += F.cross_entropy(model(inputs[None])[0], targets, reduction="sum", ignore_index=IGNORE_INDEX).item()
    assert found["targets"] == len(stream) - 1
    assert found["loss"] == pytest.approx(total / (len(stream) - 1), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
