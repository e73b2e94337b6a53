"""Memory of a GPU: what grows with what, the peak among its parts, and which micro-batch fits."""

from dataclasses import replace
from itertools import pairwise

import pytest

from megagpt.config import ModelConfig
from megagpt.config.schema import RunConfig
from megagpt.planning.layout import Layout
from megagpt.planning.memory import memory
from megagpt.planning.plan import Limits, largest_micro_batch
from megagpt.planning.settings import Settings

GPT2_XL = ModelConfig(vocab_size=50257, num_layers=48, hidden_size=1600, num_attention_heads=25, max_seq_len=1024)
PARAMETERS = 1_557_611_200
LAYOUT = Layout(64, 8, 4, 512, 1024, zero_stage=2)


def test_the_classic_sixteen_bytes_a_parameter_fall_with_the_stage():
    """Rajbhandari et al. 2020, figure 1, but with gradients summed in fp32: 2 + 4 + 12 bytes a parameter."""
    whole = 4 + 4 + 8  # stage 0: fp32 weights, gradients and two moments, and 16-bit copies of most weights
    expected = {0: whole, 1: 2 + 6 + 12 / 64, 2: 2 + 4 / 64 + 12 / 64, 3: 2 / 64 + 4 / 64 + 12 / 64}
    for stage, bytes_a_parameter in expected.items():
        parts = memory(GPT2_XL, replace(LAYOUT, zero_stage=stage))
        held = parts.weights + parts.gradients + parts.optimizer
        # Copies at stage 0; at stage 3 norms and biases, a thousandth of the weights, that stay whole.
        assert held / PARAMETERS == pytest.approx(bytes_a_parameter, rel=0.13 if stage in (0, 3) else 1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_more_ranks_checkpointing_and_offload_never_take_more_of_the_device(stage):
    totals = [memory(GPT2_XL, replace(LAYOUT, zero_stage=stage, gpus=gpus, global_batch=8 * gpus)).total
              for gpus in (8, 64, 512)]  # fmt: skip
    assert totals == sorted(totals, reverse=True)
    layout = replace(LAYOUT, zero_stage=stage)
    checkpointed = [memory(GPT2_XL, replace(layout, checkpointing="full", checkpointing_every=every)).total
                    for every in (1, 2, 4, 100)]  # fmt: skip
    assert checkpointed == sorted(checkpointed)
    assert checkpointed[-1] < memory(GPT2_XL, layout).total
    if stage:
        offloaded = memory(GPT2_XL, replace(layout, offload_optimizer=True))
        assert offloaded.optimizer < memory(GPT2_XL, layout).optimizer
        assert offloaded.host > 12 * PARAMETERS / 64


def test_the_peak_is_at_least_each_part_and_at_most_their_sum():
    for stage in range(4):
        for checkpointing in ("none", "full"):
            parts = memory(GPT2_XL, replace(LAYOUT, zero_stage=stage, checkpointing=checkpointing))
            assert parts.activations < parts.peak
            assert max(parts.parts.values()) <= parts.peak <= sum(parts.parts.values())
            assert parts.total == parts.peak + parts.margin


def test_activations_grow_with_the_micro_batch_and_nothing_held_does():
    parts = [memory(GPT2_XL, replace(LAYOUT, micro_batch=size, global_batch=size * 128)) for size in (1, 2, 4)]
    for less, more in pairwise(parts):
        assert more.activations == pytest.approx(2 * less.activations, rel=1e-3)
        assert (more.weights, more.gradients, more.optimizer) == (less.weights, less.gradients, less.optimizer)


def test_raw_deepspeed_options_change_the_buckets():
    config = run_config({"zero_optimization": {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 7}})
    settings = Settings.of_run(config)
    assert (settings.reduce_bucket_size, settings.prefetch_bucket_size) == (1000, 7)
    assert memory(GPT2_XL, LAYOUT, settings).buckets < memory(GPT2_XL, LAYOUT).buckets


def test_immediate_gradient_updates_save_two_bytes_a_parameter_of_zero_1():
    settings = Settings.of_run(run_config({"bf16": {"immediate_grad_update": True}}))
    layout = replace(LAYOUT, zero_stage=1)
    saved = memory(GPT2_XL, layout).gradients - memory(GPT2_XL, layout, settings).gradients
    assert saved == 2 * PARAMETERS


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    config, device = run_config({}), 80e9

    def total(micro_batch: int) -> int:
        return memory(GPT2_XL, replace(LAYOUT, micro_batch=micro_batch, global_batch=micro_batch * 128)).total

    largest = largest_micro_batch(config, LAYOUT, Limits(device, 0))
    assert total(largest) <= device < total(largest + 1)
    assert largest_micro_batch(config, LAYOUT, Limits(5e9, 0)) == 0


def test_other_parallelism_is_refused():
    with pytest.raises(ValueError, match="data parallelism"):
        memory(GPT2_XL, replace(LAYOUT, tensor=2))


def run_config(raw: dict) -> RunConfig:
    return RunConfig.model_validate(
        {"model": GPT2_XL.model_dump(), "data": {"train": [{"path": "x"}]}, "deepspeed": raw,
         "train": {"global_batch_size": 512}}
    )  # fmt: skip
