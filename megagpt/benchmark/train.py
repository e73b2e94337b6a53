"""How fast a training step is, side by side with a plain torch loop on the same model.

The plain loop is what a careful user writes without this project: fp32 weights, the model compiled as a whole, forward
under autocast, full logits into cross_entropy, clipping, fused AdamW. Both take turns in one process (A B A B ...), so
that whatever else the machine does slows both.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megagpt.config import check_batch
from megagpt.config.schema import RunConfig
from megagpt.data.loader import Batch
from megagpt.errors import UsageError
from megagpt.model.counts import flops_per_token
from megagpt.model.gpt import GPT
from megagpt.model.init import initialize_weights, parameter_kind, stacked_heights
from megagpt.training.engine import Engine
from megagpt.training.optimizer import build_optimizer, parameter_groups


def compare_with_plain_loop(
    config: RunConfig, steps: int, device: torch.device, report: Callable[[str], None]
) -> dict[str, Any]:
    """Median seconds a step of both, after the first (compiling) step of each, and their ratio; one process.

    `report` is given a line about each step. Returns JSON types.
    """
    if dist.get_world_size() > 1:
        raise UsageError("the comparison is of one process; start it without a launcher")
    batch = _random_batch(config, device)
    micro_batch_size, accumulation_steps = check_batch(config.train.global_batch_size, config.train.micro_batch_size, 1)
    engine = Engine(config, micro_batch_size, accumulation_steps, device)
    micro_batches = [batch[i : i + micro_batch_size] for i in range(0, len(batch), micro_batch_size)]
    contenders: dict[str, Callable[[], object]] = {
        "megagpt": lambda: engine.step(micro_batches, config.optimizer.lr).read(),
        "plain": _plain_step(config, micro_batches, device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for step in range(steps + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
        report(f"step {step}: " + ", ".join(f"{name} {times[-1]:.3f} s" for name, times in seconds.items()))
    engine.close()
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    ratios = [plain / ours for ours, plain in zip(seconds["megagpt"][1:], seconds["plain"][1:], strict=True)]
    tokens = config.train.global_batch_size * config.seq_len
    return {
        "steps": steps,
        "tokens_per_step": tokens,
        "precision": config.train.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "first_step_seconds": {name: times[0] for name, times in seconds.items()},
        "step_seconds": medians,
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "model_tflops_per_second": flops_per_token(config.model, config.seq_len) * tokens / medians["megagpt"] / 1e12,
        "speedup": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


class _PlainGPT(nn.Module):
    """The same network with the mean loss over full logits."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(input_ids).flatten(0, 1), targets.flatten())


def _plain_step(config: RunConfig, micro_batches: list[Batch], device: torch.device) -> Callable[[], object]:
    model = GPT(config.model).to(device)
    initialize_weights(model, config.train.seed)
    heights = partial(stacked_heights, config=config.model)
    groups = parameter_groups(model, config.optimizer, parameter_kind, heights)
    optimizer = build_optimizer(groups, config.optimizer, config.train.precision)
    compiled = torch.compile(_PlainGPT(model)) if config.train.compile else _PlainGPT(model)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.train.precision]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for batch in micro_batches:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = compiled(batch.input_ids, batch.targets) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        if config.optimizer.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        return total.item()

    return step


def _random_batch(config: RunConfig, device: torch.device) -> Batch:
    """Random tokens: the time of a step does not depend on which they are."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.train.global_batch_size, config.seq_len + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).to(device)
