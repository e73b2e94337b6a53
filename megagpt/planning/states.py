"""Weights, gradients and optimizer state of a rank to the byte, as our engine and deepspeed 0.19 hold them.

Stage 0 keeps fp32 weights and computes 16-bit copies of them. At stages 1 and 2 each optimizer group is laid end to
end and padded to a multiple of 2 x ranks, at stage 3 every parameter is padded to a multiple of the ranks. A 16-bit
ZeRO-1 keeps fp32 sums of all gradients, and 16-bit ones beside them (DeepSpeed's BF16_Optimizer); ZeRO-2 and 3 keep the
rank's part, in fp32. All of them hold fp32 master weights, in fp32 runs too, and what the optimizer keeps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from megagpt.config.schema import ModelConfig, OptimizerConfig
from megagpt.model.gpt import GPT
from megagpt.model.init import parameter_kind
from megagpt.planning.layout import Layout
from megagpt.planning.settings import Settings
from megagpt.training.optimizer import parameter_groups

_FP32 = 4
_STEP = 4
"""Bytes of AdamW's count of steps, an fp32 scalar for each tensor that it updates."""


@dataclass(frozen=True)
class States:
    """Bytes of one rank; what offload moves to the host counts in `host` only."""

    weights: int
    gradients: int
    """When the optimizer begins its step: the sums over all micro-batches."""
    gradients_before: int
    """Those that are there when the last micro-batch's backward begins."""
    optimizer: int
    """Master weights, moments and step counts; with offload, what of it needs the device."""
    backward: int
    """What gradients take beside that during backward, but for buckets."""
    step: int
    """What the optimizer's step takes besides."""
    host: int
    """Memory of the host a rank."""


@dataclass(frozen=True)
class Group:
    """One optimizer group."""

    sizes: tuple[int, ...]
    """Elements of its parameters."""
    is_muon: bool

    @property
    def state_bytes(self) -> int:
        """Of the optimizer an element: two moments, or Muon's momentum."""
        return _FP32 if self.is_muon else 2 * _FP32


def states(model: ModelConfig, layout: Layout, settings: Settings) -> States:
    """The states of the rank that holds most."""
    groups = optimizer_groups(model, settings.optimizer)
    if layout.zero_stage == 0:
        return _unsharded(groups, layout)
    if layout.zero_stage == 3:
        return _fully_sharded(groups, layout, settings)
    return _sharded(groups, layout, settings)


def optimizer_groups(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[Group, ...]:
    """The groups in which the engine hands `model` to DeepSpeed; tied weights are there once."""
    return _optimizer_groups(model, optimizer.model_dump_json())


@lru_cache(maxsize=256)
def _optimizer_groups(model: ModelConfig, optimizer: str) -> tuple[Group, ...]:
    with torch.device("meta"):
        network = GPT(model)
    groups = parameter_groups(network, OptimizerConfig.model_validate_json(optimizer), parameter_kind)
    return tuple(Group(tuple(p.numel() for p in group["params"]), "matrices" in group) for group in groups)


def element_count(model: ModelConfig, optimizer: OptimizerConfig) -> int:
    """Parameters of `model`."""
    return sum(sum(group.sizes) for group in optimizer_groups(model, optimizer))


def element_bytes(layout: Layout) -> int:
    """Of an activation, and of a weight in forward and backward."""
    return 4 if layout.precision == "fp32" else 2


def _unsharded(groups: Sequence[Group], layout: Layout) -> States:
    count = sum(sum(group.sizes) for group in groups)
    optimizer = sum(
        sum(group.sizes) * group.state_bytes + (0 if group.is_muon else _STEP * len(group.sizes)) for group in groups
    )
    kept = _FP32 * count if layout.micro_steps > 1 else 0
    return States(_FP32 * count, _FP32 * count, kept, optimizer, backward=0, step=0, host=0)


def _sharded(groups: Sequence[Group], layout: Layout, settings: Settings) -> States:
    """Stages 1 and 2."""
    ranks, size = layout.data_parallel, element_bytes(layout)
    flat = [_round_up(sum(group.sizes), 2 * ranks) for group in groups]
    shard = sum(flat) // ranks
    elements = sum(sum(group.sizes) for group in groups)
    optimizer = sum(
        length // ranks * (_FP32 + group.state_bytes) + (0 if group.is_muon else _STEP)
        for length, group in zip(flat, groups, strict=True)
    )
    weights, host = size * sum(flat), 0
    if layout.offload_optimizer:
        largest = size * max(max(group.sizes) for group in groups)
        # The host has a gradient of its own, a 16-bit shard on its way to the device, and room for one parameter.
        host = optimizer + (_FP32 + size) * shard + largest
        optimizer = largest  # for a sum on its way back from the host
    if layout.precision == "fp32":
        touched = max(_touched(groups, flat, rank, ranks) for rank in range(ranks))
        kept = touched * _FP32
        accumulated = elements * _FP32 if layout.zero_stage == 1 else kept if layout.micro_steps > 1 else 0
        before = (accumulated if layout.zero_stage == 1 else kept) if layout.micro_steps > 1 else 0
        return States(weights, kept, before, optimizer, accumulated, 0, host)
    if layout.zero_stage == 2:
        before = _FP32 * shard if layout.micro_steps > 1 else 0
        return States(weights, _FP32 * shard, before, optimizer, 0, 0, host)
    if layout.precision == "bf16" and not layout.offload_optimizer:
        low = 0 if settings.immediate_grad_update else size * elements
        return States(weights, _FP32 * sum(flat), _FP32 * sum(flat), optimizer, low, 0, host)
    # Each gradient is added to its sum as it comes; a last micro-batch's is reduced at once.
    accumulated = _FP32 * elements if layout.micro_steps > 1 else 0
    return States(weights, _FP32 * shard, accumulated, optimizer, accumulated, 0, host)


def _touched(groups: Sequence[Group], flat: Sequence[int], rank: int, ranks: int) -> int:
    """Elements of all parameters of which the rank owns a part, and the padding that is its own."""
    total = 0
    for group, length in zip(groups, flat, strict=True):
        begin, end, offset = rank * length // ranks, (rank + 1) * length // ranks, 0
        for size in group.sizes:
            total += size if offset < end and offset + size > begin else 0
            offset += size
        total += max(0, end - max(offset, begin))
    return total


def _fully_sharded(groups: Sequence[Group], layout: Layout, settings: Settings) -> States:
    ranks, size = layout.data_parallel, element_bytes(layout)
    shards = [sum(math.ceil(n / ranks) for n in group.sizes) for group in groups]
    shard = sum(shards)
    optimizer = sum(
        part * (_FP32 + group.state_bytes) + _STEP * _sub_groups(group, ranks, settings.sub_group_size)[0]
        for part, group in zip(shards, groups, strict=True)
    )
    gradients = _FP32 * shard
    weights = size * (shard + persistent_elements(groups, ranks, settings))
    if layout.shard_gpus and layout.shard_gpus > 1:
        # The second copy that a group of ranks shares (hpZ) is made in forward, of what does not stay whole.
        second = sum(_round_up(n, ranks) // layout.shard_gpus for n in large_parameters(groups, settings))
        weights += size * second
    step = _FP32 * max(_sub_groups(group, ranks, settings.sub_group_size)[1] for group in groups)
    host = 0
    if layout.offload_parameters:
        weights -= size * shard
        host += size * shard
    if layout.offload_optimizer:
        host += optimizer + 2 * gradients  # those summed, and those that the optimizer reads
        optimizer = gradients = step = 0
    return States(weights, gradients, gradients, optimizer, 0, step, host)


def persistent_elements(groups: Sequence[Group], ranks: int, settings: Settings) -> int:
    """Elements of the parameters that ZeRO-3 leaves whole beside its shards, each padded to a multiple of the ranks."""
    if ranks == 1:
        return 0  # the shard is the whole
    limit = settings.param_persistence_threshold
    return sum(_round_up(n, ranks) for group in groups for n in group.sizes if n <= limit)


def large_parameters(groups: Sequence[Group], settings: Settings) -> list[int]:
    """Elements of those that it gathers and lets go."""
    return [n for group in groups for n in group.sizes if n > settings.param_persistence_threshold]


def _sub_groups(group: Group, ranks: int, limit: int) -> tuple[int, int]:
    """How many tensors ZeRO-3 steps one after another, and the elements of the largest."""
    count, largest, length = 0, 0, 0
    for n in group.sizes:
        length += math.ceil(n / ranks)
        largest = max(largest, length)
        if length >= limit:
            count, length = count + 1, 0
    return count + (length > 0), largest


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
