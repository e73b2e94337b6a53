"""What the planner says forward keeps for backward is what autograd saves, storage by storage."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megagpt.config import ModelConfig
from megagpt.model import GPT
from megagpt.planning.activations import Activations, activations, weight_copies
from megagpt.planning.layout import Layout
from tests.unit.model.configs import GPT2, LLAMA, SINUSOIDAL

BATCH, SEQ = 3, 40
LAYOUT = Layout(1, 1, BATCH, BATCH, SEQ, zero_stage=1, compile=False)
MODELS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "sinusoidal": SINUSOIDAL,
    "padded": LLAMA.model_copy(update={"vocab_multiple_of": 64, "norm": "layernorm", "position": "learned"}),
}
PARTITIONED = "aot_eager_decomp_partition"
"""torch.compile without its last part: what is saved is decided, but no kernel is built."""


@pytest.fixture(autouse=True)
def compiled_anew(monkeypatch) -> None:
    """As for a GPU, by SDPA. What earlier tests compiled would count against a block's versions, or vary its sizes."""
    monkeypatch.setattr("megagpt.model.attention._STRIPS_UP_TO", 0)
    torch.compiler.reset()


def saved_bytes(config: ModelConfig, layout: Layout) -> int:
    """Bytes of the storages, parameters aside, that a forward pass under `layout` saves."""
    model = GPT(config, layout.checkpointing_every if layout.checkpointing == "full" else 0).train()
    mixed = layout.zero_stage == 0 and layout.precision == "bf16"
    if not mixed and layout.precision == "bf16":
        model.to(torch.bfloat16)
    for block in model.blocks:
        block.attention.dropout = 0.0  # a CPU's attention with dropout stores scores, a GPU's does not
        if layout.compile:
            block.compile(backend=PARTITIONED)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    ids = torch.randint(0, config.vocab_size, (layout.micro_batch, layout.seq_len))
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    with saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        loss = model(ids, ids)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def planned_bytes(config: ModelConfig, layout: Layout) -> int:
    copies = 0 if layout.checkpointing == "full" else weight_copies(config, layout)
    return activations(config, layout, "cpu").saved + copies


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "changes", [{}, {"precision": "fp32"}, {"zero_stage": 0}, {"zero_stage": 3}], ids=["bf16", "fp32", "mixed", "zero3"]
)
@pytest.mark.parametrize("name", MODELS)
def test_uncompiled_it_is_exact(name, changes, dropout):
    layout = Layout(**{**vars(LAYOUT), **changes})
    config = MODELS[name].model_copy(update={"dropout": dropout})
    # Mixed precision casts biases, too, which are not worth a formula.
    allowed = 0.01 if changes.get("zero_stage") == 0 else 0.0
    assert planned_bytes(config, layout) == pytest.approx(saved_bytes(config, layout), rel=allowed)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_it_is_within_two_percent(name, mixed):
    layout = Layout(**{**vars(LAYOUT), "compile": True, "zero_stage": 0 if mixed else 2})
    assert planned_bytes(MODELS[name], layout) == pytest.approx(saved_bytes(MODELS[name], layout), rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_with_checkpointing_the_inputs_of_the_blocks_remain(name):
    layout = Layout(**{**vars(LAYOUT), "checkpointing": "full"})
    config = MODELS[name]
    # The checkpoints hold the rotary tables where the hooks do not see it.
    tables = 2 * 4 * SEQ * config.head_dim if config.position == "rope" else 0
    assert planned_bytes(config, layout) == saved_bytes(config, layout) + tables


@pytest.mark.parametrize("every", [1, 2, 3, 4])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5])
def test_with_some_blocks_checkpointed_the_others_keep_theirs(blocks, every):
    layout = Layout(**{**vars(LAYOUT), "checkpointing": "full", "checkpointing_every": every})
    config = GPT2.model_copy(update={"num_layers": blocks})
    assert planned_bytes(config, layout) == saved_bytes(config, layout)


def test_a_last_block_that_is_recomputed_comes_on_top():
    def kept(blocks: int) -> Activations:
        layout = Layout(**{**vars(LAYOUT), "checkpointing": "full", "checkpointing_every": 2})
        return activations(GPT2.model_copy(update={"num_layers": blocks}), layout, "cpu")

    assert kept(4).recomputed_last == 0
    assert kept(3).recomputed_last == kept(3).recomputed == kept(4).recomputed > 0


def test_a_recomputed_block_is_one_of_those_kept_without_checkpointing():
    one, two = (GPT2.model_copy(update={"num_layers": count}) for count in (1, 2))
    block = saved_bytes(two, LAYOUT) - saved_bytes(one, LAYOUT)
    assert activations(two, Layout(**{**vars(LAYOUT), "checkpointing": "full"}), "cpu").recomputed == block


def test_on_a_gpu_norms_keep_no_fp32_copy():
    on_gpu, on_cpu = (activations(LLAMA, LAYOUT, kernels) for kernels in ("cuda", "cpu"))
    tokens, norms = BATCH * SEQ, 2 * LLAMA.num_layers + 1
    assert on_cpu.norms - on_gpu.norms == norms * tokens * LLAMA.hidden_size * (2 * 4 - 2)
    assert on_cpu.attention == on_gpu.attention
    assert on_cpu.feedforward == on_gpu.feedforward
