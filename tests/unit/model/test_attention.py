"""Attention as strips of matrix products against SDPA, and when a compiler gets it."""

import pytest
import torch
import torch.nn.functional as F

from megagpt.model.attention import Attention, _attend_in_strips, attention_mask
from tests.unit.model.configs import GPT2


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
