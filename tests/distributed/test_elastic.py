"""A run goes on at another world size, ZeRO stage, micro-batch size or precision as if it had never been another."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from megagpt.config.schema import RunConfig
from megagpt.data.loader import ValidationData
from megagpt.training import engine as engine_module
from megagpt.training.checkpoint import CheckpointManifest, read_manifest
from megagpt.training.engine import Engine
from megagpt.training.saving import CheckpointWriter
from megagpt.training.universal import universal_form
from megagpt.training.universal_loading import convert_together
from tests.distributed.cuts import CUT, STEPS, Setup, States, config_of, contents, identical
from tests.distributed.jobs import losses, tiny_config, train_and_report
from tests.distributed.ranks import Ranks


def save(engine: Engine, manifest: CheckpointManifest, folder: Path) -> None:
    """Write a checkpoint into `folder` and wait for it."""
    writer = CheckpointWriter(folder, keep=9)
    writer.begin(manifest, lambda aside: engine.save(aside, snapshot=False))
    writer.finish(beat=lambda: None)


def load_and_save(config: RunConfig, checkpoint: Path) -> tuple[States, bool, float]:
    """Load `checkpoint` into an engine and save it again without a step, into config's run folder.

    Returns what rank 0's optimizer then holds, whether the model's weights are the fp32 ones rounded, and the loss on
    the validation data.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    world_size, folder = dist.get_world_size(), Path(config.train.run_dir) / "checkpoints"
    size = config.train.micro_batch_size or config.train.global_batch_size // world_size
    engine = Engine(config, size, config.train.global_batch_size // size // world_size, torch.device("cpu"))
    engine.load_universal(convert_together(checkpoint, folder, Console(quiet=True)))
    ours = {"world_size": world_size, "zero_stage": config.parallel.zero_stage, "precision": config.train.precision}
    save(engine, read_manifest(checkpoint).model_copy(update=ours), folder)
    live, derived = {}, True
    inner = engine._engine.optimizer
    if config.parallel.zero_stage in (1, 2):
        inner._hp_optimizer_states_linked = False  # DeepSpeed links what the two functions below read at its first step
        inner._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if config.parallel.zero_stage == 0:
            live[name] = {"fp32": parameter.detach(), **inner.state[parameter]}
            continue
        live[name] = {"fp32": safe_get_full_fp32_param(parameter)}
        for key in ("exp_avg", "exp_avg_sq"):
            live[name][key] = safe_get_full_optimizer_state(parameter, key)
        live[name]["step"] = next(state["step"] for state in inner.state.values())
        with engine_module._gathered([parameter]) if config.parallel.zero_stage == 3 else torch.no_grad():
            derived &= torch.equal(parameter, live[name]["fp32"].to(parameter.dtype))
    validation = ValidationData(
        config.data.validation[0],
        config.seq_len,
        False,
        config.model.vocab_size,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=size,
        rank=dist.get_rank(),
        world_size=world_size,
        max_batches=1,
    )
    found = engine.evaluate(validation)
    assert found is not None
    engine.close()
    return live, derived, found.loss


@pytest.fixture(scope="module")
def worlds(one_rank, two_ranks, three_ranks, four_ranks) -> dict[int, Ranks]:
    return {ranks.world_size: ranks for ranks in (one_rank, two_ranks, three_ranks, four_ranks)}


# Pairwise: every stage to every other, every world size, both precisions and their changes, offload, micro-batches.


@pytest.mark.parametrize(
    ("source", "target", "tied"),
    [
        (Setup(2, 1, "bf16"), Setup(1, 0, "bf16"), True),
        (Setup(1, 0), Setup(2, 1, micro_batch_size=3), False),
        (Setup(2, 2, micro_batch_size=2), Setup(4, 3), True),
        (Setup(4, 3, "bf16"), Setup(3, 2, "bf16", micro_batch_size=1), False),
        (Setup(3, 0, "bf16"), Setup(2, 3, "fp32", offload=True), True),
        (Setup(2, 3, option=("sub_group_size", 2000)), Setup(3, 1, "bf16"), False),
        (Setup(2, 1, "bf16", offload=True), Setup(2, 2), True),
        (Setup(4, 2, option=("round_robin_gradients", True)), Setup(1, 0), True),
    ],
    ids=str,
)
def test_run_goes_on_with_the_same_bits_and_losses(source, target, tied, worlds, corpus, tmp_path):
    whole = worlds[source.ranks].run(train_and_report, config_of(source, corpus, tmp_path / "whole", tied))[0]
    checkpoint = tmp_path / f"whole/checkpoints/step_{CUT:08d}"
    before = contents(universal_form(checkpoint, tmp_path))
    assert {key for state in before.values() for key in state} == {"fp32", "exp_avg", "exp_avg_sq", "step"}

    saved = config_of(target, corpus, tmp_path / "saved", tied)
    live, derived, validation = worlds[target.ranks].run(load_and_save, saved, checkpoint)[0]
    assert identical(live, before)
    assert derived
    assert identical(contents(universal_form(tmp_path / "saved/checkpoints" / checkpoint.name, tmp_path)), before)
    assert [
        path.name for path in tmp_path.glob("saved/checkpoints/*universal*")
    ] == []  # the own checkpoint replaced it
    expected = next(r["loss"] for r in whole if r["kind"] == "validation" and r["step"] == CUT)
    exact = source.precision == target.precision == "fp32"
    assert validation == pytest.approx(expected, abs=1e-6 if exact else 5e-3)

    moved = config_of(target, corpus, tmp_path / "moved", tied, resume=str(checkpoint), every=CUT + 1)
    after = losses(worlds[target.ranks].run(train_and_report, moved)[0])
    assert after == pytest.approx(losses(whole)[CUT:], abs=1e-5 if exact else 2e-2)
    shutil.rmtree(tmp_path / f"moved/checkpoints/step_{STEPS:08d}")
    assert losses(worlds[target.ranks].run(train_and_report, moved)[0]) == after  # an ordinary resume, bit-identical


def with_momentum(function: Any, *arguments: Any) -> Any:
    """Call `function` where the optimizer is SGD with momentum, whose only state is momentum_buffer."""
    original = engine_module.build_optimizer
    engine_module.build_optimizer = lambda groups, config, precision: torch.optim.SGD(
        groups, lr=0.1, momentum=0.9, fused=True
    )
    try:
        return function(*arguments)
    finally:
        engine_module.build_optimizer = original


def test_state_of_another_optimizer_than_adam_moves_as_well(two_ranks, one_rank, corpus, tmp_path):
    whole = config_of(Setup(2, 3), corpus, tmp_path / "whole")
    expected = losses(two_ranks.run(with_momentum, train_and_report, whole)[0])
    checkpoint = tmp_path / f"whole/checkpoints/step_{CUT:08d}"
    assert all(state.keys() == {"fp32", "momentum_buffer"} for state in contents(universal_form(checkpoint)).values())
    for zero_stage in (0, 2):
        moved = config_of(Setup(1, zero_stage), corpus, tmp_path / f"moved{zero_stage}", resume=str(checkpoint))
        found = losses(one_rank.run(with_momentum, train_and_report, moved)[0])
        assert found == pytest.approx(expected[CUT:], abs=1e-5)


def scale_after_moving(config: RunConfig, checkpoint: Path, folder: Path) -> float:
    """Load an fp16 checkpoint, save it into `folder` with a loss scale of 512, move that; the scale that arrives."""
    source = Engine(config, 12, 1, torch.device("cpu"))
    source.load(checkpoint)
    scaler = source._engine.torch_autocast_z0_gradscaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 512.0})
    save(source, read_manifest(checkpoint), folder)
    source.close()
    target = Engine(config, 12, 1, torch.device("cpu"))
    target.load_universal(convert_together(folder / checkpoint.name, folder, Console(quiet=True)))
    scale = target._engine.torch_autocast_z0_gradscaler.get_scale()
    target.close()
    return scale


def test_loss_scale_of_fp16_moves_as_well(one_rank, corpus, tmp_path):
    config = config_of(Setup(1, 0), corpus, tmp_path / "run")
    train = config.train.model_copy(update={"precision": "fp16"})  # which the configuration refuses on a CPU
    fp16 = config.model_copy(update={"train": train})
    one_rank.run(train_and_report, fp16)
    checkpoint = tmp_path / f"run/checkpoints/step_{STEPS:08d}"
    assert one_rank.run(scale_after_moving, fp16, checkpoint, tmp_path / "saved") == [512.0]


@pytest.mark.parametrize("option", [{"round_robin_gradients": True}, {"sub_group_size": 1000}])
def test_a_raw_option_that_cuts_the_shards_otherwise_is_no_danger_at_a_resume(option, two_ranks, corpus, tmp_path):
    """DeepSpeed would load shards of another cut without a word."""
    stage = 3 if "sub_group_size" in option else 2

    def run(name: str, steps: int, raw: dict) -> list[float]:
        config = tiny_config(
            corpus,
            tmp_path / name,
            schedule={"name": "constant", "warmup_steps": 2},
            train={"steps": steps},
            parallel={"zero_stage": stage},
            deepspeed={"zero_optimization": raw},
        )
        return losses(two_ranks.run(train_and_report, config)[0])

    expected = run("whole", 8, {})
    run("run", 4, {})
    assert run("run", 8, option) == pytest.approx(expected, abs=1e-5)
