"""AdamW (Loshchilov & Hutter 2019) over two groups of parameters: with and without weight decay."""

from collections.abc import Callable

import torch
from torch import nn

from megagpt.config.schema import OptimizerConfig


def parameter_groups(
    model: nn.Module, config: OptimizerConfig, kind_of: Callable[[str], str]
) -> list[dict[str, object]]:
    """The model's parameters in (at most) two groups; `kind_of(name)` is one of norm, bias, embedding, matrix.

    Groups with no parameters are left out. A shared (tied) parameter appears once, under its first name.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if kind_of(name) in config.no_decay else decayed).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": config.weight_decay, "decayed": True},
        {"params": plain, "weight_decay": 0.0, "decayed": False},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, object]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Torch's fused AdamW, on CPU and GPU; DeepSpeed replaces its parameters by the flat fp32 partitions it owns."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
