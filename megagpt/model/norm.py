"""Normalisation over the hidden dimension: LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019).

torch's kernels take fp16 and bf16 inputs but compute mean and variance in fp32, so nothing is cast here.
"""

from torch import nn

from megagpt.config.schema import ModelConfig


def build_norm(config: ModelConfig) -> nn.Module:
    """The normalisation of `config`, (..., hidden) -> (..., hidden): a weight and, for LayerNorm, an optional bias."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)
