"""What this machine reaches is measured in the units that the time model takes."""

import math

import pytest
import torch

from megagpt.config.schema import ModelConfig
from megagpt.errors import UserError
from megagpt.planning import measure
from megagpt.planning.layout import Layout
from megagpt.planning.time import step_time
from megagpt.planning.work import Product


def _broken(rank, *arguments):
    raise OSError("no route to host")


def test_the_share_of_the_peak_is_what_times_were_made_with():
    products = [Product(2048, inner, columns) for inner, columns in ((512, 512), (512, 2048), (4096, 256))]
    times = [product.flops / (0.6 * 1e12) + product.elements * 2 / 5e10 for product in products]
    assert measure._matmul_share(list(zip(products, times, strict=True)), 1e12, 5e10, 2) == pytest.approx(0.6)


def test_a_product_faster_than_its_traffic_does_not_give_more_than_the_peak():
    product = Product(512, 512, 512)
    assert measure._matmul_share([(product, product.flops / 1e12)], 1e12, 1e6, 2) == 1.0


@pytest.mark.slow
def test_this_machine_becomes_a_device_that_steps_can_be_predicted_on():
    torch.set_num_threads(1)
    measured = measure.measure_device("fp32", seconds=1.0)
    device, efficiency = measured.cluster.device, measured.efficiency
    assert measured.cluster.gpus_per_node == 2
    assert device.bf16 is None
    # a CPU's core computes 1e9 to 1e12 and moves 1e8 to 1e12 a second
    assert 1e9 < device.peak_flops("fp32") < 1e13
    assert 1e8 < device.memory_bandwidth < 1e12
    assert 1e6 < device.link_bandwidth < 1e12
    assert 0 < efficiency.matmul <= 1
    assert efficiency.attention > 0
    assert 0 < efficiency.block_seconds < 0.1
    model = ModelConfig(vocab_size=1000, num_layers=2, hidden_size=64, num_attention_heads=2, max_seq_len=64)
    layouts = [Layout(gpus=gpus, gpus_per_node=2, micro_batch=2, global_batch=2 * gpus, seq_len=64, zero_stage=0,
                      precision="fp32") for gpus in (1, 2)]  # fmt: skip
    alone, two = (step_time(model, layout, measured.cluster, efficiency).total for layout in layouts)
    assert 0 < alone < two < math.inf


@pytest.mark.slow
def test_processes_that_cannot_meet_are_an_error_in_one_line(monkeypatch):
    monkeypatch.setattr(measure, "_exchange", _broken)
    with pytest.raises(
        UserError, match=r"2 processes of this machine cannot exchange data: .*no route to host"
    ) as error:
        measure._measure_links("cpu", 2, 0.1)
    assert "\n" not in str(error.value)
