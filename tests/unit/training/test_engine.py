"""DeepSpeed is asked for what the configuration says, with fp32 where it counts."""

import pytest
import torch

from megagpt.config.schema import RunConfig
from megagpt.errors import UsageError
from megagpt.model.compiling import missing_for_compile
from megagpt.model.gpt import GPT
from megagpt.model.init import parameter_kind
from megagpt.training.engine import deepspeed_options
from megagpt.training.optimizer import parameter_groups

CPU = torch.device("cpu")


def config(**sections: dict) -> RunConfig:
    return RunConfig.model_validate({"data": {"train": [{"path": "x"}]}, **sections})


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bit_training_accumulates_and_reduces_in_fp32(stage, precision):
    run = config(parallel={"zero_stage": stage}, train={"precision": precision})
    options = deepspeed_options(run, 4, 8, CPU)
    assert options[precision]["enabled"] is True
    assert options["data_types"] == {"grad_accum_dtype": "fp32"}
    assert options["communication_data_type"] == "fp32"


def test_the_batch_triple_is_passed_on_whole():
    options = deepspeed_options(config(train={"global_batch_size": 64}), 4, 8, CPU)
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [options[name] for name in names] == [64, 4, 8]


def test_raw_options_are_merged_last_and_deep():
    raw = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    options = deepspeed_options(config(deepspeed=raw, parallel={"zero_stage": 2}), 1, 1, CPU)
    assert options["zero_optimization"]["reduce_bucket_size"] == 1000
    assert options["zero_optimization"]["stage"] == 2
    assert options["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("raw", "owner"),
    [
        ({"zero_optimization": {"stage": 3}}, "parallel.zero_stage"),
        ({"train_batch_size": 8}, "train.global_batch_size"),
        ({"bf16": {"enabled": False}}, "train.precision"),
        ({"optimizer": {"type": "Adam"}}, "the section optimizer"),
        ({"compile": {"deepcompile": True}}, "train.compile and train.compile_scope"),
    ],
)
def test_raw_options_that_contradict_the_configuration_are_refused(raw, owner):
    with pytest.raises(UsageError, match=f"is set by {owner}"):
        deepspeed_options(config(deepspeed=raw), 1, 1, CPU)


@pytest.mark.parametrize("key", ["round_robin_gradients", "offload_optimizer"])
def test_raw_options_that_muon_cannot_follow_are_refused(key):
    raw = {"zero_optimization": {key: True}}
    deepspeed_options(config(deepspeed=raw), 1, 1, CPU)
    with pytest.raises(UsageError, match=f"zero_optimization.{key} does not work with optimizer.name muon"):
        deepspeed_options(config(deepspeed=raw, optimizer={"name": "muon"}), 1, 1, CPU)


def test_offload_goes_to_host_memory_and_needs_no_compiled_optimizer():
    run = config(parallel={"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True})
    options = deepspeed_options(run, 1, 1, CPU)
    assert options["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert options["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert options["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"compile": False, "compile_scope": "model"}}, "is a part of train.compile; set"),
        ({"train": {"compile_scope": "model"}, "parallel": {"zero_stage": 3}}, "compile_scope.*needs whole weights"),
        ({"train": {"activation_checkpointing_every": 2}}, "is a part of train.activation_checkpointing"),
    ],
)
def test_what_would_do_nothing_or_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_machine_that_cannot_build_kernels_is_told_what_it_lacks(monkeypatch, tmp_path):
    assert missing_for_compile() is None  # the tests' own machine can
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "Python.h" in missing_for_compile()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C++ compiler" in missing_for_compile()


@pytest.mark.parametrize("kinds", [[], ["norm", "bias"], ["norm", "bias", "embedding"]])
def test_weight_decay_spares_the_named_kinds_and_every_parameter_is_in_one_group(kinds):
    run = config(optimizer={"no_decay": kinds, "weight_decay": 0.25})
    model = GPT(run.model)
    groups = parameter_groups(model, run.optimizer, parameter_kind)
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay_of) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name
        is_bias = name.endswith("bias") and not is_norm
        is_embedding = "embedding" in name
        flags = {"norm": is_norm, "bias": is_bias, "embedding": is_embedding}
        spared = any(flags[kind] for kind in kinds)
        assert decay_of[id(parameter)] == (0.0 if spared else 0.25), name
