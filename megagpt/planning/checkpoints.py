"""How large a checkpoint is, and how long writing it takes: what megagpt.training.saving writes at every ZeRO stage.

Stage 0 writes fp32 weights and moments once; at stages 1 to 3 every rank writes its part of master weights and moments,
12 bytes a parameter in all, at stages 1 and 2 beside the whole 16-bit weights. Headers and names are not counted.
"""

from dataclasses import dataclass

from megagpt.config.schema import ModelConfig
from megagpt.planning.layout import Layout
from megagpt.planning.settings import Settings
from megagpt.planning.states import element_bytes, optimizer_groups


@dataclass(frozen=True)
class CheckpointCost:
    """Of one checkpoint."""

    size: int
    """Bytes of all its files."""
    stall_seconds: float
    """How long training stands still: with asynchronous saving the copy to the host's memory, else all of it."""
    write_seconds: float
    """From its beginning until it counts."""


def checkpoint_bytes(model: ModelConfig, layout: Layout, settings: Settings) -> int:
    """Bytes of all files of a checkpoint, but for headers."""
    groups = optimizer_groups(model, settings.optimizer)
    elements = sum(sum(group.sizes) for group in groups)
    moments = sum(sum(group.sizes) * group.state_bytes for group in groups)
    weights = 4 + (element_bytes(layout) if layout.zero_stage in (1, 2) else 0)
    return weights * elements + moments


def checkpoint_cost(
    size: int, layout: Layout, host_bandwidth: float, storage_bandwidth: float, asynchronous: bool
) -> CheckpointCost:
    """host_bandwidth: bytes a second from one GPU to its host; storage_bandwidth: of all nodes together."""
    copy = size / layout.data_parallel / host_bandwidth
    write = copy + size / storage_bandwidth
    return CheckpointCost(size, copy if asynchronous else write, write)
