"""DeepSpeed's optimizer step without waiting for the device, in bf16 and fp32.

DeepSpeed 0.19 reads the gradient's norm on the host in every step, to see whether it is finite and whether to clip:
each time the host waits until the device has caught up, and the device then idles until the host has queued the next
kernels. Both decisions can be made on the device: a clipping factor is a tensor, and torch's fused optimizers leave
weights and state alone where their `found_inf` holds 1. The names below are replaced for the duration of a step only.
Offloaded optimizers live on the host and wait in any case.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero import stage3, stage_1_and_2
from torch import Tensor

_host_is_invalid = bf16_optimizer.is_invalid_grad_norm


@contextmanager
def decided_on_device() -> Iterator[None]:
    """Inside, DeepSpeed takes every norm that is a tensor for valid and clips without asking for its value."""
    modules = (stage_1_and_2, stage3, bf16_optimizer)
    host_clip = bf16_optimizer.clip_tensors_by_global_norm
    for module in modules:
        module.is_invalid_grad_norm = _is_invalid
    bf16_optimizer.clip_tensors_by_global_norm = _clip
    try:
        yield
    finally:
        for module in modules:
            module.is_invalid_grad_norm = _host_is_invalid
        bf16_optimizer.clip_tensors_by_global_norm = host_clip


def _is_invalid(norm: Any) -> bool:
    return False if torch.is_tensor(norm) else _host_is_invalid(norm)


def _clip(
    input_tensors: list[Tensor], max_norm: float, global_norm: Tensor, mpu: Any = None, eps: float = 1e-6
) -> None:
    """As DeepSpeed's function, whose `if` on the factor is a clamp here: a factor of exactly 1 changes nothing."""
    factor = torch.clamp(max_norm / (global_norm + eps), max=1.0)
    for tensor in input_tensors:
        tensor.detach().mul_(factor)
