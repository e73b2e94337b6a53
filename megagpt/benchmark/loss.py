"""The output head with its loss, forward and backward: ours beside full logits, and beside Liger Kernel on a GPU.

All get the same hidden states, weight and targets, in bf16, and give the sum of cross-entropies and both gradients.
"""

import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.benchmark.turns import ratio, take_turns
from megagpt.config.schema import ModelConfig
from megagpt.model.loss import EAGER_KERNELS, linear_cross_entropy

LIGER = "liger_kernel"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states (tokens, hidden), weight (vocab, hidden), targets (tokens) -> the sum."""


def compare_losses(
    model: ModelConfig, tokens: int, repeats: int, device: torch.device, report: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds, and on a GPU bytes at most beside the inputs, of each; medians of `repeats`; JSON types."""
    generator = torch.Generator().manual_seed(0)
    sizes = (tokens, model.padded_vocab_size)
    hidden, weight = (torch.randn(size, model.hidden_size, generator=generator) * 0.1 for size in sizes)
    targets = torch.randint(model.vocab_size, (tokens,), generator=generator).to(device)
    hidden, weight = (value.to(device, torch.bfloat16).requires_grad_() for value in (hidden, weight))
    losses = _losses(model, device, report)
    sums: dict[str, float] = {}
    memory: dict[str, list[int]] = {name: [] for name in losses}

    def run(name: str) -> None:
        before = _begin(device)
        loss = losses[name](hidden, weight, targets)
        torch.autograd.grad(loss, (hidden, weight))
        sums[name] = loss.item()  # waits for the device
        if before is not None:
            torch.cuda.synchronize(device)
            memory[name].append(torch.cuda.max_memory_allocated(device) - before)

    contenders: dict[str, Callable[[], object]] = {name: _turn(run, name) for name in losses}
    take_turns(contenders, 2)  # compile; let the allocator find its size
    times = take_turns(contenders, repeats)
    for name, seconds in times.items():
        peak = f", at most {max(memory[name]) / 1e6:,.0f} MB" if memory[name] else ""
        report(f"{name}: {statistics.median(seconds):.4f} s{peak}, a loss of {sums[name] / tokens:.5f} a token")
    return {
        "tokens": tokens,
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "seconds": {name: statistics.median(seconds) for name, seconds in times.items()},
        "peak_bytes": {name: max(found) if found else None for name, found in memory.items()},
        "loss_a_token": {name: total / tokens for name, total in sums.items()},
        "speedup_over": {
            name: ratio(seconds, times["megagpt"]) for name, seconds in times.items() if name != "megagpt"
        },
    }


def _losses(model: ModelConfig, device: torch.device, report: Callable[[str], None]) -> dict[str, Loss]:
    kernels = EAGER_KERNELS.compiled()
    losses: dict[str, Loss] = {
        "megagpt": lambda hidden, weight, targets: linear_cross_entropy(
            hidden, weight, targets, kernels, model.vocab_size
        ),
        "full logits, compiled": torch.compile(_full_logits),
    }
    if device.type == "cuda" and importlib.util.find_spec(LIGER):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        theirs = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        version = importlib.metadata.version("liger-kernel")
        losses[f"liger {version}"] = lambda hidden, weight, targets: theirs(weight, hidden, targets)
    elif device.type == "cuda":
        report("Liger Kernel is not installed: pip install liger-kernel, to compare with it")
    return losses


def _full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


def _turn(run: Callable[[str], None], name: str) -> Callable[[], None]:
    return lambda: run(name)


def _begin(device: torch.device) -> int | None:
    """Bytes that are allocated, from where the peak begins anew; None: not on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
