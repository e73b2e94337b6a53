"""The model as it decodes when compiled: against F.linear, SDPA, and the plain model."""

import pytest
import torch
import torch.nn.functional as F

from megagpt.inference.decoder import decoder_of, row_linear
from megagpt.model.attention import _attend_at_one
from tests.unit.model.configs import FAMILIES, build, tokens

FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 7), (1, 7), (7,)])
def test_the_sum_of_one_row_is_the_product(bias, shape):
    torch.manual_seed(0)
    row, weight = torch.randn(shape), torch.randn(5, 7)
    offset = torch.randn(5) if bias else None
    torch.testing.assert_close(row_linear(row, weight, offset), F.linear(row, weight, offset))


def test_the_sum_of_one_row_is_exact_to_one_rounding_in_bf16():
    torch.manual_seed(0)
    row, weight = torch.randn(1, 3000).bfloat16(), torch.randn(50, 3000).bfloat16()
    exact = F.linear(row.double(), weight.double()).bfloat16()
    assert ((row_linear(row, weight) != exact).sum()) <= 1
    torch.testing.assert_close(row_linear(row, weight), exact)


@FAMILY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_a_decoder_has_the_models_weights_and_logits(family, dtype, rows):
    config = FAMILIES[family]
    model = build(config).to(dtype)
    before = {name: type(module) for name, module in model.named_modules()}
    decoder = decoder_of(model, rows, max_len=8)
    assert {name: type(module) for name, module in model.named_modules()} == before, "the model itself is changed"
    ids = tokens(config, batch=rows, seq=1)
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(decoder(ids), model(ids), **tolerance)
    model.blocks[-1].attention_norm.weight *= 3
    torch.testing.assert_close(decoder(ids), model(ids), **tolerance)
    shared = {id(value) for value in model.parameters()}
    assert all(id(value) in shared for value in decoder.parameters()), "a parameter was copied"


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_at_one_position_is_that_of_sdpa(heads, kv_heads, dtype):
    torch.manual_seed(0)
    query = torch.randn(5, heads, 1, 8, dtype=dtype)
    key, value = torch.randn(2, 5, kv_heads, 11, 8, dtype=dtype)
    mask = (torch.arange(11) <= torch.tensor([[0], [10], [4], [7], [1]]))[:, None, None]
    for seen in (mask, None):
        exact = [values.double() for values in (query, key, value)]
        expected = F.scaled_dot_product_attention(*exact, attn_mask=seen, enable_gqa=True).to(dtype)
        torch.testing.assert_close(_attend_at_one(query, key, value, seen), expected)
