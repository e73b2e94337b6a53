"""Documents in one row are as far apart as in passes of their own, whichever kernel keeps them so."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.attention.flex_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megagpt.config import ModelConfig
from megagpt.model import (
    GPT,
    compile_attention,
    compile_blocks,
    missing_for_flex_attention,
    use_flex_attention,
)
from megagpt.model.attention import attention_mask, block_sparse_mask
from tests.unit.model.configs import LLAMA, build, tokens

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

SEQ = 140  # more than one block of 128, and not two
ROWS = [[1, 60, 1, 75, 2, 1], [SEQ]]  # lengths of the documents of each row
POSITIONS = ("learned", "sinusoidal", "rope")
KERNELS = ("sdpa", "flex")


def shaped(position: str = "rope", kv_heads: int = 2) -> ModelConfig:
    shape = {"position": position, "num_kv_heads": kv_heads, "max_seq_len": SEQ, "num_layers": 2}
    return LLAMA.model_copy(update=shape)


def model_with(kernel: str, config: ModelConfig, **options: bool) -> GPT:
    model = build(config, **options)
    if kernel == "flex":
        use_flex_attention(model, flex_attention)
    return model


def ids_of(rows: list[list[int]]) -> Tensor:
    return torch.tensor([[number for number, n in enumerate(row) for _ in range(n)] for row in rows], dtype=torch.int32)


def separate_logits(model: GPT, ids: Tensor, rows: list[list[int]]) -> Tensor:
    parts = [[model(part[None]) for part in row.split(lengths)] for row, lengths in zip(ids, rows, strict=True)]
    return torch.cat([torch.cat(row, dim=1) for row in parts])


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.13 refuses FlexAttention's backward on a CPU for want of a fused kernel; the unfused one is there."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kv_heads", [6, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.usefixtures("backward_on_cpu")
def test_logits_and_gradients_are_those_of_separate_passes(position, kv_heads, kernel):
    config = shaped(position, kv_heads)
    model, ids = model_with(kernel, config), tokens(config, seq=SEQ)
    targets = tokens(config, seq=SEQ, seed=2)
    alone = build(config)
    logits, expected_logits = model(ids, document_ids=ids_of(ROWS)), separate_logits(alone, ids, ROWS)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=0)
    expected_loss = torch.nn.functional.cross_entropy(expected_logits.flatten(0, 1), targets.flatten())
    loss = model(ids, targets, ids_of(ROWS)) / targets.numel()
    torch.testing.assert_close(gradients(model, loss), gradients(alone, expected_loss), atol=1e-5, rtol=0)


cuts = st.lists(st.sampled_from([1, 2, 30, 64, 127, 128, 129]) | st.integers(1, SEQ), max_size=8)


def cut(lengths: list[int], seq: int) -> list[int]:
    """The first of `lengths` that fit into `seq`, and what remains of it as a last document."""
    row: list[int] = []
    for length in lengths:
        if sum(row) + length < seq:
            row.append(length)
    return [*row, seq - sum(row)]


@given(first=cuts, second=cuts)
@settings(max_examples=10, deadline=None)
@torch.no_grad()
def test_any_cut_gives_the_logits_of_separate_passes(first, second):
    config = shaped().model_copy(update={"num_layers": 1})
    rows, ids = [cut(first, SEQ), cut(second, SEQ)], tokens(config, seq=SEQ)
    expected = separate_logits(build(config), ids, rows)
    for kernel in KERNELS:
        found = model_with(kernel, config)(ids, document_ids=ids_of(rows))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@given(lengths=st.lists(cuts, min_size=1, max_size=3), seq=st.sampled_from([1, 127, 128, 129, 300, 512]))
@settings(max_examples=40, deadline=None)
def test_blocks_are_those_that_torch_finds_in_the_whole_mask(lengths, seq):
    ids = ids_of([cut(row, seq) for row in lengths])

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (ids[batch, query] == ids[batch, key]) & (key <= query)

    expected = create_block_mask(visible, len(ids), None, seq, seq, device="cpu")
    found = block_sparse_mask(ids).block_mask()
    assert found.shape == expected.shape
    assert found.BLOCK_SIZE == expected.BLOCK_SIZE
    for part in ("num_blocks", "indices"):
        for kind in ("kv", "full_kv", "q", "full_q"):
            ours, theirs = getattr(found, f"{kind}_{part}"), getattr(expected, f"{kind}_{part}")
            assert torch.equal(ours, theirs)
            assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
    index = torch.arange(seq)
    rows = torch.arange(len(ids))[:, None, None]
    mask = found.mask_mod(rows, torch.tensor(0), index[:, None], index)
    assert torch.equal(mask[:, None], attention_mask(seq, ids, torch.device("cpu")))


@pytest.mark.parametrize("compiled", ["in blocks", "alone"])
@pytest.mark.usefixtures("backward_on_cpu")
def test_compiled_and_recomputed_it_gives_the_same_gradients_from_one_compilation(compiled, monkeypatch):
    torch.compiler.reset()
    config = shaped()
    ids, documents = tokens(config, seq=SEQ), [ids_of(ROWS), ids_of(ROWS[::-1])]
    eager = build(config)
    expected = [gradients(eager, eager(ids, ids, each) / ids.numel()) for each in documents]

    model = build(config, checkpointing_every=1).train()
    counter, compile_function = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_function(function, backend=counter))
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=counter))
    compile_attention(model)
    if compiled == "in blocks":
        compile_blocks(model)
    found = [gradients(model, model(ids, ids, each) / ids.numel()) for each in documents]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert counter.frame_count == 1


def test_the_mask_is_built_once_a_forward_pass(monkeypatch):
    config, calls = shaped(), []
    model = model_with("flex", config)
    monkeypatch.setattr("megagpt.model.gpt.block_sparse_mask", lambda ids: calls.append(1) or block_sparse_mask(ids))
    with torch.no_grad():
        model(tokens(config, seq=SEQ), document_ids=ids_of(ROWS))
    assert len(calls) == 1


def counted(kernel: Callable[..., Tensor], calls: list[int]) -> Callable[..., Tensor]:
    def call(*tensors: Tensor, **options: object) -> Tensor:
        calls.append(1)
        return kernel(*tensors, **options)

    return call


@torch.no_grad()
def test_training_with_dropout_masks_by_sdpa_since_flex_attention_knows_none():
    config = shaped().model_copy(update={"dropout": 0.2})
    model, plain, calls = build(config).train(), build(config).train(), []
    use_flex_attention(model, counted(flex_attention, calls))
    ids = tokens(config, seq=SEQ)
    torch.manual_seed(0)
    found = model(ids, document_ids=ids_of(ROWS))
    torch.manual_seed(0)
    assert torch.equal(found, plain(ids, document_ids=ids_of(ROWS)))
    assert not calls
    model.eval()(ids, document_ids=ids_of(ROWS))
    assert len(calls) == config.num_layers


@torch.no_grad()
def test_without_documents_flex_attention_has_no_part():
    config = shaped()
    model, calls = build(config), []
    use_flex_attention(model, counted(flex_attention, calls))
    assert torch.equal(model(tokens(config)), build(config)(tokens(config)))
    assert not calls


@pytest.mark.parametrize(
    ("capability", "version", "settings", "missing"),
    [
        ((8, 0), "2.6.0", {}, None),
        ((9, 0), "2.6.0", {"hidden_size": 288}, "torch 2.7 or a head size that is a power of two, but it is 48"),
        ((9, 0), "2.13.0", {"hidden_size": 288}, None),
        ((7, 5), "2.13.0", {}, "an NVIDIA GPU of compute capability 8.0 or higher"),
        ((9, 0), "2.13.0", {"dropout": 0.1}, "model.dropout 0, but it is 0.1"),
        ((9, 0), "2.13.0", {"hidden_size": 72}, "a head size .* of 16 to 128, but it is 12"),
        ((9, 0), "2.13.0", {"hidden_size": 1536}, "a head size .* of 16 to 128, but it is 256"),
    ],
)
def test_what_flex_attention_cannot_do_is_named(capability, version, settings, missing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
    config = ModelConfig(**({"hidden_size": 384, "num_attention_heads": 6} | settings))
    found = missing_for_flex_attention(config, torch.device("cuda"))
    assert (found is None) == (missing is None)
    if missing:
        assert re.search(missing, found)


def test_flex_attention_is_not_for_cpus():
    assert "NVIDIA GPU" in missing_for_flex_attention(shaped(), torch.device("cpu"))
