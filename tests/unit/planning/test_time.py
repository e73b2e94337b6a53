"""The parts of a step against formulas written out here, and what must hold of any prediction."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config.schema import ModelConfig
from megagpt.errors import UsageError
from megagpt.model.counts import flops_per_token, parameter_count
from megagpt.planning import work
from megagpt.planning.communication import exposed, ring_bandwidth, ring_seconds
from megagpt.planning.efficiency import NEAREST, Efficiency, fitted
from megagpt.planning.layout import Layout
from megagpt.planning.time import step_time
from megagpt.scaling.devices import DEVICES, Cluster, find_device

GPT = ModelConfig(num_layers=24, hidden_size=2048, num_attention_heads=16, max_seq_len=2048)
LLAMA = ModelConfig(
    vocab_size=128256, num_layers=32, hidden_size=4096, num_attention_heads=32, num_kv_heads=8, ffn_hidden_size=14336,
    max_seq_len=8192, position="rope", norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False,
)  # fmt: skip
H100S = Cluster(find_device("h100-sxm"), 8, 50e9)
IDEAL = Efficiency(matmul=1, attention=1, memory=1, unfused=1, links=1, overlap=1, block_seconds=0)
ONE = Layout(gpus=1, gpus_per_node=8, micro_batch=4, global_batch=4, seq_len=2048, zero_stage=0)
MANY = Layout(gpus=64, gpus_per_node=8, micro_batch=2, global_batch=256, seq_len=2048, zero_stage=3)


@pytest.mark.parametrize("model", [GPT, LLAMA], ids=["gpt", "llama"])
def test_the_products_of_all_layers_and_the_head_are_the_models_flops(model):
    tokens = work.tokens(ONE)
    products = sum(product.flops for product in work.block_products(model, ONE)) * model.num_layers
    attention = work.attention_flops(model, ONE) * model.num_layers
    forward = products + attention + work.head_product(model, ONE).flops
    assert 3 * forward == pytest.approx(tokens * flops_per_token(model, ONE.seq_len, causal=True))


def test_splitting_the_model_splits_its_work_and_its_parameters():
    split = Layout(gpus=16, gpus_per_node=8, micro_batch=4, global_batch=4, seq_len=2048, zero_stage=0, tensor=4,
                   pipeline=4)  # fmt: skip
    whole = sum(product.flops for product in work.block_products(LLAMA, ONE)) * work.stage_layers(LLAMA, ONE)
    part = sum(product.flops for product in work.block_products(LLAMA, split)) * work.stage_layers(LLAMA, split)
    assert part == pytest.approx(whole / 16)
    assert work.gpu_parameters(LLAMA, ONE) == pytest.approx(parameter_count(LLAMA), rel=1e-6)
    assert work.gpu_parameters(LLAMA, split) < parameter_count(LLAMA) / 10


def test_with_no_bandwidth_limits_one_gpu_works_at_its_peak():
    boundless = Cluster(replace(H100S.device, memory_bandwidth=1e30), 8, 50e9)
    step = step_time(LLAMA, ONE, boundless, IDEAL)
    flops = 4 * 2048 * flops_per_token(LLAMA, 2048, causal=True)
    assert step.total == pytest.approx(flops / 989.4e12)
    full = flops_per_token(LLAMA, 2048) / flops_per_token(LLAMA, 2048, causal=True)
    assert step.mfu == pytest.approx(full)  # MFU counts every score, of which flash attention needs half


def test_parts_add_up_and_throughput_follows_from_them():
    step = step_time(LLAMA, MANY, H100S)
    assert step.total == pytest.approx(math.fsum(step.parts.values()))
    assert step.tokens_per_second_per_gpu == pytest.approx(256 * 2048 / step.total / 64)
    assert step.mfu == pytest.approx(step.tokens_per_second_per_gpu * flops_per_token(LLAMA, 2048) / 989.4e12)
    assert all(seconds >= 0 for seconds in step.parts.values())


def test_recomputing_all_blocks_costs_their_forward_once_more():
    none, full = (step_time(LLAMA, replace(ONE, checkpointing=kind), H100S) for kind in ("none", "full"))
    forward = none.matmul / 3 + none.attention / 3 + none.elementwise / 3
    assert full.recompute == pytest.approx(forward)
    assert none.recompute == 0
    third = step_time(LLAMA, replace(ONE, checkpointing="full", checkpointing_every=3), H100S)
    assert third.recompute == pytest.approx(forward * math.ceil(LLAMA.num_layers / 3) / LLAMA.num_layers)
    stored = replace(ONE, flash_attention=False, checkpointing="selective")
    assert step_time(LLAMA, stored, H100S).recompute == pytest.approx(step_time(LLAMA, stored, H100S).attention / 3)


@pytest.mark.parametrize(
    ("stage", "reduced", "gathered"),
    [(0, 2 * 4, 0), (1, 4, 2), (2, 4 * 2, 2), (3, 4 * 2, 2 * 2 * 2)],
)
def test_bytes_that_zero_moves_a_step(stage, reduced, gathered):
    """Two micro-steps in bf16, gradients in fp32: bytes a parameter through a ring, when nothing hides them."""
    layout = Layout(gpus=8, gpus_per_node=8, micro_batch=1, global_batch=16, seq_len=2048, zero_stage=stage)
    step = step_time(GPT, layout, H100S, replace(IDEAL, overlap=0))
    ring = parameter_count(GPT) * 7 / 8 / 450e9
    assert step.gradient_reduction == pytest.approx(reduced * ring, rel=1e-6)
    assert step.weight_gather == pytest.approx(gathered * ring, rel=1e-6)


def test_a_ring_is_as_fast_as_its_slowest_link():
    """nccl-tests on 8 x 400 Gbit/s cards: all eight carry a ring, so that NVLink and the cards are near each other."""
    assert ring_bandwidth(H100S, IDEAL, 8, 8) == 450e9
    assert ring_bandwidth(H100S, IDEAL, 64, 8) == 400e9
    assert ring_bandwidth(H100S, IDEAL, 64, 1) == 50e9
    assert ring_seconds(1e9, 1, 1.0) == 0
    assert ring_seconds(1e9, 4, 1e9) == pytest.approx(0.75)


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 1))
def test_what_is_exposed_is_neither_hidden_nor_more_than_all(communication, hiding, overlap):
    seconds = exposed(communication, hiding, overlap)
    assert communication - hiding - 1e-9 <= seconds <= communication
    assert seconds >= (1 - overlap) * communication - 1e-9


def test_groups_of_a_node_keep_the_weights_gathers_off_the_network():
    slow = Cluster(H100S.device, 8, 1e9)
    whole, grouped = (step_time(LLAMA, replace(MANY, shard_gpus=shards), slow) for shards in (None, 8))
    assert grouped.weight_gather < whole.weight_gather / 2


def test_the_bubble_is_that_of_the_interleaved_schedule():
    """Narayanan et al. 2021: (p - 1) / (v m) of the rest."""
    layout = Layout(gpus=4, gpus_per_node=8, micro_batch=1, global_batch=8, seq_len=2048, zero_stage=0, pipeline=4)
    plain = step_time(LLAMA, layout, H100S)
    rest = plain.matmul + plain.attention + plain.elementwise
    assert plain.pipeline == pytest.approx((rest + plain.loss / 4) * 3 / 8, rel=0.02)
    assert step_time(LLAMA, replace(layout, virtual_pipeline=2), H100S).pipeline == pytest.approx(plain.pipeline / 2)


def test_offloading_costs_the_hosts_link():
    layout = replace(MANY, offload_optimizer=True, offload_parameters=True)
    step = step_time(LLAMA, layout, H100S)
    owned = parameter_count(LLAMA) / 64
    assert step.offload > owned * (4 + 2) / 64e9
    assert step.optimizer < step_time(LLAMA, MANY, H100S).optimizer


@settings(max_examples=60, deadline=None)
@given(
    device=st.sampled_from(DEVICES),
    stage=st.integers(0, 3),
    nodes=st.sampled_from([1, 2, 16, 128]),
    micro_batch=st.sampled_from([1, 4]),
    steps=st.integers(1, 4),
    compiled=st.booleans(),
    checkpointing=st.sampled_from(["none", "full"]),
)
def test_predictions_are_finite_and_slower_with_a_slower_network(
    device, stage, nodes, micro_batch, steps, compiled, checkpointing
):
    layout = Layout(
        gpus=8 * nodes, gpus_per_node=8, micro_batch=micro_batch, global_batch=8 * nodes * micro_batch * steps,
        seq_len=1024, zero_stage=stage, checkpointing=checkpointing, precision="fp16", compile=compiled,
    )  # fmt: skip
    fast, slow = (step_time(GPT, layout, Cluster(device, 8, rate)) for rate in (50e9, 5e9))
    assert 0 < fast.total <= slow.total < math.inf
    assert 0 < fast.mfu < 1
    bound = fast.total * (1 + 1e-9)  # equal where communication is what a step waits for
    assert step_time(GPT, replace(layout, compile=True), Cluster(device, 8, 50e9)).total <= bound
    faster = replace(device, memory_bandwidth=2 * device.memory_bandwidth)
    assert step_time(GPT, layout, Cluster(faster, 8, 50e9)).total <= bound


def test_a_format_that_the_device_does_not_know_is_refused():
    with pytest.raises(UsageError, match=r"V100 computes no bf16 products; choose fp16, fp32"):
        step_time(GPT, ONE, Cluster(find_device("v100"), 8, 50e9))


def test_fp8_speeds_up_the_blocks_products_only():
    bf16, fp8 = (step_time(LLAMA, replace(ONE, precision=name), H100S) for name in ("bf16", "fp8"))
    assert fp8.matmul < 0.65 * bf16.matmul
    assert (fp8.attention, fp8.loss) == (bf16.attention, bf16.loss)


def test_every_generation_of_the_table_has_its_shares():
    for device in DEVICES:
        shares = fitted(device.architecture)
        assert 0.3 < shares.matmul < 1
        assert 0 < shares.attention < 1
    assert fitted("volta") == fitted(NEAREST["volta"])
