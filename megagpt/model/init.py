"""GPT-2's initial weights (Radford et al. 2019), each a pure function of the seed and the parameter's name.

Matrices and embeddings are N(0, initializer_range); the projections that write into the residual stream, two a layer,
are scaled by 1 / sqrt(2 num_layers); biases are 0, norm weights 1. What pads the vocabulary is 0, and stays so, as it
gets no gradient. Since no generator is shared, sharded and unsharded models, and models built in another order, start
from the same numbers.

With model.mup_base_width they are muP's (Yang et al. 2022, table 8, for AdamW; heads of one size at all widths): in a
model r times as wide as the base, matrices inside the blocks start at 1/sqrt(r) of that and learn at 1/r of the rate.
The output multiplier 1/r is no part of the model: the gain of the last norm starts at 1/r and learns at 1/r of the
rate, which for Adam is the same thing, so that checkpoints and exports are those of an ordinary model.
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megagpt.config.schema import ModelConfig
from megagpt.model.gpt import GPT

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]

VOCABULARY_WEIGHTS = {"embedding.weight", "head.weight"}
"""Parameters with a row for each token id, and maybe rows of padding."""

_LAST_GAIN, _LAST_BIAS = "norm.weight", "norm.bias"
_RESIDUAL_PROJECTIONS = ("attention.out.weight", "feedforward.down.weight")


@torch.no_grad()
def initialize_weights(model: GPT, seed: int, gather: Gather = nullcontext) -> None:
    """Set every parameter of `model` in place, drawn in fp32 on the CPU, then cast and copied.

    `gather([parameter])` opens a context in which the parameter is whole and may be written; sharded models need one:
    `lambda p: deepspeed.zero.GatheredParameters(p, modifier_rank=0)`.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        with gather([parameter]):
            kind = parameter_kind(name)
            if name.endswith("bias"):
                parameter.zero_()
            elif kind == "norm":
                parameter.fill_(1.0 / config.mup_width_ratio if name == _LAST_GAIN else 1.0)
            else:
                std = config.initializer_range
                if kind == "matrix":
                    std /= math.sqrt(config.mup_width_ratio)
                if name.endswith(_RESIDUAL_PROJECTIONS):
                    std /= math.sqrt(2 * config.num_layers)
                shape = unpadded_shape(name, parameter.shape, config)
                parameter.zero_()
                parameter[: shape[0]].copy_(_normal(shape, std, seed, name))


def parameter_kind(name: str) -> Literal["norm", "bias", "embedding", "head", "matrix"]:
    """What parameter `name` is: of a norm, bias of a linear layer, embedding table, output head, or matrix inside."""
    module, _, leaf = name.rpartition(".")
    if module.endswith("norm"):
        return "norm"
    if leaf == "bias":
        return "bias"
    if module == "head":
        return "head"
    return "embedding" if module.endswith("embedding") else "matrix"


def learning_rate_scale(name: str, config: ModelConfig) -> float:
    """The learning rate of parameter `name` over the run's: 1, but for what muP slows down in wider models."""
    is_slowed = parameter_kind(name) == "matrix" or name in (_LAST_GAIN, _LAST_BIAS)
    return 1.0 / config.mup_width_ratio if is_slowed else 1.0


def unpadded_shape(name: str, shape: torch.Size, config: ModelConfig) -> torch.Size:
    """The shape of parameter `name` without the rows that pad the vocabulary."""
    return torch.Size((config.vocab_size, *shape[1:])) if name in VOCABULARY_WEIGHTS else shape


def stacked_heights(name: str, config: ModelConfig) -> list[int] | None:
    """Rows of each of the matrices stacked in matrix `name`: of queries, keys and values; None if it is one matrix."""
    if not name.endswith("attention.qkv.weight"):
        return None
    return [heads * config.head_dim for heads in (config.num_attention_heads, config.kv_heads, config.kv_heads)]


def _normal(shape: torch.Size, std: float, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)
