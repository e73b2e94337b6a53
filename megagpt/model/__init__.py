"""The network: a GPT built from a ModelConfig, its initial weights, its loss, its sizes.

Nothing here knows DeepSpeed, process groups or configuration files.
"""

from megagpt.model.attention import missing_for_flex_attention
from megagpt.model.counts import flops_per_token, parameter_count
from megagpt.model.gpt import GPT, compile_attention, compile_blocks, compile_loss, compile_model, use_flex_attention
from megagpt.model.init import initialize_weights, learning_rate_scale, parameter_kind, stacked_heights
from megagpt.model.loss import IGNORE_INDEX

__all__ = [
    "GPT",
    "IGNORE_INDEX",
    "compile_attention",
    "compile_blocks",
    "compile_loss",
    "compile_model",
    "flops_per_token",
    "initialize_weights",
    "learning_rate_scale",
    "missing_for_flex_attention",
    "parameter_count",
    "parameter_kind",
    "stacked_heights",
    "use_flex_attention",
]
