"""A model for compiled decoding on a CPU, where a step takes as long as it takes to read the weights once.

torch's bf16 products of a few rows read memory at a third to half of its speed. Here one row meets each row of a weight
in a sum, which inductor makes a loop that keeps up with memory; more rows take oneDNN's products of weights in its own
order, which are a copy. Both add in fp32. The compiler must be told (INDUCTOR_OPTIONS) to store what a product reads:
fused into that loop, a norm would be computed again for each row of the weight.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.model import GPT
from megagpt.model.attention import Attention

INDUCTOR_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_reads_threshold": 0,
    "realize_opcount_threshold": 0,
}
"""What torch.compile should be given for a decoder."""

_MOST_KEYS = 2048
"""Of all rows, up to which sums are faster than SDPA: beyond, what the compiler stores of them grows too large."""

_LIBRARY = torch.library.Library("megagpt", "DEF")
_LIBRARY.define("packed_linear(Tensor hidden_states, Tensor packed, Tensor? bias) -> Tensor")


def decoder_of(model: GPT, rows: int, max_len: int) -> GPT:
    """`model` with the same weights, but with products for `rows` rows of one token; to be compiled.

    max_len: the most positions that a row sees; attention is written out as sums where they are few. On other devices
    than CPUs it is `model` itself.
    """
    weight = model.embedding.weight
    if weight.device.type != "cpu":
        return model
    head = weight if model.config.tie_embeddings else model.head.weight
    if rows == 1:
        decoder = _with_linears(model, lambda linear: _RowLinear(linear.weight, linear.bias))
        decoder.output_kernel = row_linear
    elif weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        decoder = _with_linears(model, lambda linear: _PackedLinear(linear.weight, linear.bias, rows))
        packed_head = _PackedLinear(head, None, rows)
        decoder.output_kernel = lambda hidden_states, _: packed_head(hidden_states)
    else:
        decoder = _with_linears(model, lambda linear: linear)
    if rows * max_len <= _MOST_KEYS:
        for module in decoder.modules():
            if isinstance(module, Attention):
                module.sums_at_one_position = True
    return decoder


def row_linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of one row, (..., in) of in elements -> (..., out), as a sum in fp32."""
    row = hidden_states.reshape(-1).float()
    product = (weight.float() * row).sum(-1)
    if bias is not None:
        product = product + bias.float()
    return product.to(hidden_states.dtype).reshape(*hidden_states.shape[:-1], -1)


class _RowLinear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        return row_linear(hidden_states, self.weight, self.bias)


class _PackedLinear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.bias = bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.ops.megagpt.packed_linear(hidden_states, self.packed, self.bias)


# An operator of our own around oneDNN's, for which the compiler wants weights that it has packed itself.
@torch.library.impl(_LIBRARY, "packed_linear", "MkldnnCPU")
def _packed_linear(hidden_states: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(hidden_states, packed, bias, "none", [], "")


@torch.library.register_fake("megagpt::packed_linear", lib=_LIBRARY)
def _packed_linear_shape(hidden_states: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return hidden_states.new_empty(*hidden_states.shape[:-1], packed.shape[0])


def _with_linears(model: GPT, replacement: Callable[[nn.Linear], nn.Module]) -> GPT:
    """A copy of the tree of modules, of the same parameters, with all linear layers replaced."""

    def copied(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Linear):
            return replacement(module)
        twin = copy.copy(module)
        twin._modules = {name: child and copied(child) for name, child in module._modules.items()}
        return twin

    twin = copy.copy(model)
    twin._modules = {
        name: child if name == "head" or child is None else copied(child) for name, child in model._modules.items()
    }
    return twin
