"""Attention as strips of matrix products against SDPA, and when a compiler gets it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.model import GPT, initialize_weights
from megagpt.model.attention import Attention, _attend_in_strips, attention_mask, missing_for_sdpa_kernel
from megagpt.model.gpt import use_sdpa_kernel
from tests.unit.model.configs import GPT2, tokens


def inputs(heads: int, kv_heads: int, seq_len: int, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(2, count, seq_len, 16) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("seq_len", [2, 127, 128, 129, 256, 257, 700])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("documents", [False, True])
def test_strips_and_their_gradients_are_those_of_sdpa(seq_len, kv_heads, documents):
    query, key, value = inputs(4, kv_heads, seq_len)
    document_ids = (torch.arange(seq_len) * 3 // seq_len).repeat(2, 1) if documents else None
    mask = attention_mask(seq_len, document_ids, query.device)
    strips = _attend_in_strips(query, key, value, mask)
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=kv_heads < 4
    )
    torch.testing.assert_close(strips, expected)
    weights = torch.randn_like(strips)
    got, wanted = (torch.autograd.grad(result, (query, key, value), weights) for result in (strips, expected))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("dtype", "seq_len", "dropout", "in_strips"),
    [
        (torch.bfloat16, 64, 0.0, True),
        (torch.float32, 64, 0.0, False),
        (torch.bfloat16, 1025, 0.0, False),
        (torch.bfloat16, 64, 0.1, False),
    ],
)
def test_compiled_on_cpus_bf16_attention_is_products_of_matrices(dtype, seq_len, dropout, in_strips):
    torch._dynamo.reset()
    called = set()

    def backend(graph, _):
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    attention = Attention(GPT2.model_copy(update={"dropout": dropout})).to(dtype)
    hidden_states = torch.randn(1, seq_len, attention.qkv.in_features, dtype=dtype)
    compiled = torch.compile(attention, backend=backend)(hidden_states)
    assert any("scaled_dot_product_attention" in name for name in called) != in_strips
    if not dropout:
        torch.testing.assert_close(compiled, attention(hidden_states), atol=2e-3, rtol=2e-2)


class Calls(TorchDispatchMode):
    """Names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("kernel", "fused"), [("flash", True), ("math", False)])
def test_a_chosen_kernel_computes_attention_in_training_and_no_other_in_evaluation(kernel, fused, compiled):
    torch.compiler.reset()
    model = GPT(GPT2).to(torch.bfloat16)
    initialize_weights(model, 0)
    use_sdpa_kernel(model, kernel)
    if compiled:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    for training in (True, False):
        with Calls() as calls:
            model.train(training)(tokens(GPT2))
        name = "_scaled_dot_product_flash_attention_for_cpu.default"
        assert (name in calls.names) == (fused or not training)


def test_a_kernel_that_torch_does_not_have_here_is_known_before_training():
    cpu = torch.device("cpu")
    assert missing_for_sdpa_kernel(GPT2, "cudnn", False, cpu, torch.bfloat16)
    assert missing_for_sdpa_kernel(GPT2, "flash", True, cpu, torch.bfloat16) is None
