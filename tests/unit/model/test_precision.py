"""What a bf16 model computes in fp32 inside: the result is the exact one, rounded once."""

import pytest
import torch

from megagpt.model.norm import build_norm
from megagpt.model.positions import apply_rotary, position_ids, rotary_tables
from tests.unit.model.configs import GPT2, LLAMA

ROUNDING = 1.02 * 2.0**-8  # largest relative error of one rounding to bf16's 8 bits, and 2% for fp32's own


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=ROUNDING, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["layernorm", "rmsnorm"])
def test_norms_of_bf16(config):
    """Around a mean of 30, where sums of squares in bf16 would lose the variance."""
    x = (30 + torch.randn(64, config.hidden_size, generator=torch.Generator().manual_seed(0))).bfloat16()
    exact = x.double()
    if config.norm == "layernorm":
        exact = exact - exact.mean(-1, keepdim=True)
    exact = exact / (exact.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    assert_rounded_once(build_norm(config).bfloat16()(x), exact)


@torch.no_grad()
def test_rotations_of_bf16():
    x = torch.randn(1, 2, 512, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    frequencies = 10000.0 ** (-torch.arange(0, 10, 2, dtype=torch.float64) / 10)
    turns = torch.polar(torch.ones(512, 5, dtype=torch.float64), torch.arange(512)[:, None] * frequencies)
    rotated = torch.complex(x[..., :5].double(), x[..., 5:].double()) * turns
    tables = rotary_tables(position_ids(512, None, x.device), head_dim=10, theta=10000.0)
    found = apply_rotary(x, tables)
    torch.testing.assert_close(
        found.double(), torch.cat((rotated.real, rotated.imag), dim=-1), rtol=ROUNDING, atol=2e-4
    )
