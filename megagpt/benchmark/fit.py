"""How deep a model may be for all contenders of a comparison to be on one GPU at once, as taking turns needs."""

from collections.abc import Iterable
from dataclasses import replace

from megagpt.config.schema import RunConfig
from megagpt.errors import UserError
from megagpt.model.counts import parameter_count
from megagpt.planning.activations import activations, weight_copies
from megagpt.planning.memory import FRAGMENTATION, OUTSIDE_ALLOCATOR_BYTES, memory
from megagpt.planning.plan import run_layout
from megagpt.planning.settings import Settings

_PLAIN_STATE_BYTES = 16
"""fp32 weights, gradients and AdamW's two moments, a parameter."""
_LOGIT_BYTES = 10
"""Of the plain loop's full logits: 16 bits, fp32 and the gradient, a logit."""
_HALF = 2
"""Bytes of a 16-bit copy of a weight."""


def most_layers(config: RunConfig, variants: Iterable[RunConfig], plain_loops: int, device_bytes: float) -> int:
    """At most as many as `config` has. Raises UserError where not even one fits.

    variants: ourselves again, configured otherwise; plain_loops: how many plain torch loops take part.
    """
    ours = (config, *variants)
    for layers in range(config.model.num_layers, 0, -1):
        if contenders_bytes([with_layers(one, layers) for one in ours], plain_loops) <= device_bytes:
            return layers
    raise UserError(
        f"not even one layer fits {device_bytes / 2**30:,.0f} GiB beside the plain loop; take fewer --against, or a "
        "smaller train.micro_batch_size"
    )


def with_layers(config: RunConfig, layers: int) -> RunConfig:
    """The same run of a model with another depth."""
    return config.model_copy(update={"model": config.model.model_copy(update={"num_layers": layers})})


def contenders_bytes(ours: list[RunConfig], plain_loops: int) -> float:
    """What all hold between steps, and what the largest of their steps takes beside that."""
    held, largest_step = 0.0, 0.0
    for config in ours:
        parts = memory(config.model, run_layout(config, 1, 1), Settings.of_run(config))
        state = parts.weights + parts.gradients + parts.optimizer
        held, largest_step = held + state, max(largest_step, parts.peak - state)
    if plain_loops:
        model = ours[0].model
        layout = replace(run_layout(ours[0], 1, 1), zero_stage=0, checkpointing="none")
        kept, head = activations(model, layout), model.padded_vocab_size * model.hidden_size
        logits = _LOGIT_BYTES * layout.micro_batch * layout.seq_len * model.padded_vocab_size
        copies = weight_copies(model, layout) + _HALF * head
        held += plain_loops * _PLAIN_STATE_BYTES * parameter_count(model)
        largest_step = max(largest_step, kept.saved - kept.loss + kept.block_backward_moment + copies + logits)
    return (held + largest_step) * (1 + FRAGMENTATION) + OUTSIDE_ALLOCATOR_BYTES
