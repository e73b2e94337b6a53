"""Muon trains like a plain torch loop with torch's own Muon, however ranks, ZeRO and accumulation divide the work."""

import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megagpt.config.schema import RunConfig
from megagpt.data.loader import TrainingData
from megagpt.model.gpt import GPT
from megagpt.model.init import initialize_weights
from tests.distributed.jobs import exact_numbers, losses, tiny_config, train_and_report

STEPS = 20
STAGES = (0, 1, 2)
MODEL = {"num_kv_heads": 2, "activation": "swiglu", "ffn_hidden_size": 83, "tie_embeddings": False}


def muon_config(corpus: Path, run_dir: Path, **sections: dict) -> RunConfig:
    optimizer = {"name": "muon", "lr": 3e-3, "muon_momentum": 0.9} | sections.pop("optimizer", {})
    return tiny_config(corpus, run_dir, model=MODEL, optimizer=optimizer, **sections)


def plain_loop(config: RunConfig, skipped: int | None = None) -> list[float]:
    """The same training with nothing but torch: queries, keys, values apart, each matrix stepped by torch.optim.Muon.

    skipped: a step whose update is left out.
    """
    model = GPT(config.model)
    initialize_weights(model, config.train.seed)
    hidden = {name: p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    others = [p for name, p in model.named_parameters() if name not in hidden]
    decay = [p for p in others if p.ndim > 1]
    no_decay = [p for p in others if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    # Views, so that what steps them steps the stacked matrix.
    heights = (48, 24, 24)
    parts = [(p, p.detach().split(heights if "qkv" in name else len(p))) for name, p in hidden.items()]
    matrices = [matrix for _, views in parts for matrix in views]
    muon = torch.optim.Muon(matrices, lr=1.0, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    data = TrainingData(config.data.train, config.seq_len, config.train.seed, document_mask=False)
    found = []
    for step in range(STEPS):
        batch = data.read(step * 8, 8)
        loss = F.cross_entropy(model(batch.input_ids).flatten(0, 1), batch.targets.flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for parameter, views in parts:
            for matrix, grad in zip(views, parameter.grad.split([len(view) for view in views]), strict=True):
                matrix.grad = grad
        warmup, progress = (step + 1) / 5, (step - 5) / (STEPS - 5)
        shape = warmup if step < 5 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in (*adamw.param_groups, *muon.param_groups):
            group["lr"] = 3e-3 * shape
        if step != skipped:
            muon.step()
            adamw.step()
        found.append(loss.item())
    return found


def in_fp32(grad: torch.Tensor, coefficients: tuple[float, ...], steps: int, eps: float) -> torch.Tensor:
    """What torch's Newton-Schulz iteration, which is bf16, comes near to: its polynomial of the singular values."""
    u, s, v = torch.linalg.svd(grad.double() / grad.double().norm().clamp(min=eps), full_matrices=False)
    for _ in range(steps):
        s = sum(c * s**power for c, power in zip(coefficients, (1, 3, 5), strict=True))
    return (u * s @ v).to(grad.dtype)


exactly = patch("torch.optim._muon._zeropower_via_newtonschulz", in_fp32)


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    with exactly:
        return plain_loop(muon_config(corpus, tmp_path_factory.mktemp("reference")))


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_two_ranks_train_like_a_plain_torch_loop(zero_stage, micro_batch_size, two_ranks, corpus, tmp_path, reference):
    train = {"micro_batch_size": micro_batch_size}
    config = muon_config(corpus, tmp_path / "run", parallel={"zero_stage": zero_stage}, train=train)
    found = losses(two_ranks.run(train_and_report, config)[0])
    assert found == pytest.approx(reference, abs=1e-5)
    assert found[-1] < found[0] - 0.5  # it learned, so the comparison covers real updates


@pytest.mark.parametrize("zero_stage", STAGES)
def test_one_rank_trains_like_a_plain_torch_loop(zero_stage, one_rank, corpus, tmp_path, reference):
    config = muon_config(corpus, tmp_path / "run", parallel={"zero_stage": zero_stage}, train={"micro_batch_size": 4})
    assert losses(one_rank.run(train_and_report, config)[0]) == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_bf16_stays_within_one_percent_of_fp32(zero_stage, two_ranks, corpus, tmp_path, reference):
    settings = {"precision": "bf16", "micro_batch_size": 2}
    config = muon_config(corpus, tmp_path / "run", parallel={"zero_stage": zero_stage}, train=settings)
    assert losses(two_ranks.run(train_and_report, config)[0]) == pytest.approx(reference, rel=0.01)


def train_with_one_bad_step(config: RunConfig, bad_step: int) -> list[float]:
    """Losses of a run in which the last rank's loss is infinite in one step."""

    def build(*arguments: object, **options: object) -> GPT:
        calls = 0

        def spoil(module: nn.Module, inputs: object, loss: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
            return loss * torch.inf if is_last and calls == bad_step + 1 else loss

        model = GPT(*arguments, **options)
        model.register_forward_hook(spoil)
        return model

    with patch("megagpt.training.engine.GPT", build):
        return losses(train_and_report(config))


@pytest.fixture(scope="module", params=[0, 3])
def without_a_step(request, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[float]]:
    """A step, and the losses of the plain loop that leaves it out."""
    with exactly:
        return request.param, plain_loop(muon_config(corpus, tmp_path_factory.mktemp("without")), skipped=request.param)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing(zero_stage, without_a_step, two_ranks, corpus, tmp_path):
    bad_step, expected = without_a_step
    config = muon_config(corpus, tmp_path / "run", parallel={"zero_stage": zero_stage}, data={"validation": []})
    found = two_ranks.run(train_with_one_bad_step, config, bad_step)[0]
    assert found[:bad_step] + found[bad_step + 1 :] == pytest.approx(
        expected[:bad_step] + expected[bad_step + 1 :], abs=1e-5
    )


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_identical(precision, zero_stage, two_ranks, corpus, tmp_path):
    def config(run_dir: Path, steps: int) -> RunConfig:
        return muon_config(
            corpus,
            run_dir,
            train={"steps": steps, "precision": precision, "micro_batch_size": 2},
            schedule={"decay_steps": 15},
            parallel={"zero_stage": zero_stage},
            data={"validation": []},
        )

    two_ranks.run(train_and_report, config(tmp_path / "whole", 12))
    two_ranks.run(train_and_report, config(tmp_path / "cut", 5))
    two_ranks.run(train_and_report, config(tmp_path / "cut", 12))
    assert exact_numbers(tmp_path / "cut") == exact_numbers(tmp_path / "whole")


def test_settings_changed_at_a_resume_count(one_rank, corpus, tmp_path):
    def run(name: str, steps: int = 20, **optimizer: object) -> list[float]:
        config = muon_config(
            corpus,
            tmp_path / name,
            optimizer={"grad_clip": 0.0} | optimizer,
            train={"steps": steps},
            schedule={"name": "constant"},
        )
        return losses(one_rank.run(train_and_report, config)[0])

    plain = run("plain")
    for changed in ({"muon_momentum": 0.0}, {"weight_decay": 5.0}):
        name = "".join(changed)
        run(name, steps=10)
        found = run(name, **changed)
        assert found[:11] == plain[:11]
        assert found[-1] != pytest.approx(plain[-1], abs=1e-3)


@pytest.mark.parametrize(("source", "target"), [((2, 2), (1, 0)), ((1, 0), (3, 1)), ((3, 2), (2, 1))])
def test_a_run_goes_on_at_another_world_size_and_stage(
    source, target, one_rank, two_ranks, three_ranks, corpus, tmp_path
):
    worlds = {1: one_rank, 2: two_ranks, 3: three_ranks}
    train = {"global_batch_size": 6}

    def run(cut: tuple[int, int], steps: int, name: str) -> list[float]:
        config = muon_config(
            corpus,
            tmp_path / name,
            parallel={"zero_stage": cut[1]},
            train=train | {"steps": steps},
            schedule={"name": "constant"},
            data={"validation": []},
        )
        return losses(worlds[cut[0]].run(train_and_report, config)[0])

    run(source, 6, "cut")
    assert run(target, 12, "cut") == pytest.approx(run(source, 12, "whole"), abs=1e-5)
