"""How DeepSpeed's optimizer of ZeRO 1 in bf16 treats gradients, without its copies of them.

It keeps the fp32 sums of a group's gradients end to end. DeepSpeed converts each 16-bit gradient to an fp32 copy before
it adds it to zeros, copies all sums into a bucket to reduce them, and back. Here a gradient is converted in the pass
that adds it, or the first time stored, and the sums are reduced where they are: the same numbers, with a third of the
passes over memory and without the bucket's, 4 bytes a parameter.
"""

from functools import partial

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn


def keep_gradients_flat(engine: DeepSpeedEngine) -> None:
    """Replace, in an engine whose optimizer is a BF16_Optimizer, what sums, reduces and clears gradients."""
    optimizer = engine.optimizer
    optimizer._update_hp_grad = partial(_add_gradient, optimizer)
    optimizer.clear_hp_grads = partial(_forget_gradients, optimizer)
    engine.buffered_allreduce_fallback = partial(_average_gradients, engine)


def _add_gradient(
    optimizer: BF16_Optimizer, parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool
) -> None:
    """Move a 16-bit gradient into its fp32 sum."""
    if parameter.grad is None:
        return
    total, gradient = optimizer.fp32_groups_gradients[group][index], parameter.grad.view(-1)
    if optimizer.fp32_groups_has_gradients[group][index]:
        total.add_(gradient)
    else:
        total.copy_(gradient)
        optimizer.fp32_groups_has_gradients[group][index] = True
    parameter._hp_grad = total  # type: ignore[attr-defined]
    parameter.grad = None


def _forget_gradients(optimizer: BF16_Optimizer) -> None:
    """Let the next gradients overwrite the sums."""
    for has_gradients in optimizer.fp32_groups_has_gradients:
        has_gradients[:] = [False] * len(has_gradients)


@torch.no_grad()
def _average_gradients(engine: DeepSpeedEngine, grads: None, elements_per_buffer: int) -> None:
    """Average the sums over ranks, in place; DeepSpeed reduces a bucket of one tensor where it is."""
    optimizer = engine.optimizer
    for sums, has_gradients in zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True):
        for total, has_gradient in zip(sums, has_gradients, strict=True):
            if not has_gradient:
                total.zero_()  # it is of a step before
    for flat in optimizer.fp32_groups_gradients_flat:
        for part in flat.split(elements_per_buffer):
            engine.allreduce_bucket([part], dp_group=None)
