"""How fast a training step is, side by side with a plain torch loop on the same model, and with peers.

The plain loop is what a careful user writes without this project: fp32 weights, the model compiled as a whole, forward
under autocast, full logits into cross_entropy, clipping, fused AdamW. nanoGPT runs as it ships on a CPU (fp32, eager)
and at its best (compiled, autocast), transformers' model in the same loop, eager and compiled. All take turns in one
process (A B A B ...), so that whatever else the machine does slows all of them. Where we are several ranks on a
machine's CPUs, the others are still one process, rank 0's, with all CPUs, while the other ranks sleep in a barrier.
"""

import copy
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megagpt.benchmark.fresh import joined
from megagpt.benchmark.parts import step_parts
from megagpt.benchmark.peers import nanogpt_model, transformers_model, weights_of
from megagpt.benchmark.turns import ratio, take_turns
from megagpt.config import check_batch
from megagpt.config.schema import RunConfig
from megagpt.data.loader import Batch
from megagpt.errors import UsageError
from megagpt.model.counts import flops_per_token
from megagpt.model.gpt import GPT
from megagpt.model.init import initialize_weights, parameter_kind, stacked_heights
from megagpt.scaling.devices import peak_flops
from megagpt.training.engine import Engine
from megagpt.training.optimizer import build_optimizer, parameter_groups


@dataclass(frozen=True)
class Peers:
    """What to compare with, besides the plain loop."""

    transformers: bool = False
    nanogpt: Path | None = None
    """The model.py of a checkout."""
    variants: Mapping[str, RunConfig] = field(default_factory=dict)
    """Ourselves, configured otherwise but with the same batch, by name."""


def compare_on_rank(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`compare` on each of several new processes, which `fresh.call` joins to a job; rank 0 prints its lines.

    arguments: config and variants (by name) as JSON trees, steps, transformers, nanogpt (a path or null).
    """
    with joined() as rank:
        variants = {name: RunConfig.model_validate(tree) for name, tree in arguments["variants"].items()}
        nanogpt = Path(arguments["nanogpt"]) if arguments["nanogpt"] else None
        return compare(
            RunConfig.model_validate(arguments["config"]),
            arguments["steps"],
            torch.device("cpu"),
            Peers(arguments["transformers"], nanogpt, variants),
            partial(print, flush=True) if rank == 0 else lambda line: None,
        )


def compare(
    config: RunConfig, steps: int, device: torch.device, peers: Peers, report: Callable[[str], None]
) -> dict[str, Any]:
    """Median seconds a step of all, after the first (compiling) step of each, and their ratios; JSON types.

    All ranks call it; rank 0's times count, and its `report` is given a line about each step. Raises UsageError
    for several ranks on GPUs, which one process could not use.
    """
    ranks = dist.get_world_size()
    if ranks > 1 and device.type != "cpu":
        raise UsageError("several ranks are compared with one process on CPUs only; start it on one GPU")
    batch = random_batch(config, device)
    share = config.train.global_batch_size // ranks
    own = batch[dist.get_rank() * share : (dist.get_rank() + 1) * share]
    named = {"megagpt": config, **peers.variants}
    cuts = {
        name: check_batch(one.train.global_batch_size, one.train.micro_batch_size, ranks) for name, one in named.items()
    }
    engines = {name: Engine(one, *cuts[name], device) for name, one in named.items()}
    contenders = {name: _engine_turn(engine, _cut(own, cuts[name][0])) for name, engine in engines.items()}
    if dist.get_rank() == 0:
        micro_batch_size, _ = check_batch(config.train.global_batch_size, config.train.micro_batch_size, 1)
        loops = _Loops(config, _cut(batch, micro_batch_size), device)
        for name, loop in {"plain": loops.plain(), **loops.of(peers)}.items():
            contenders[name] = loop if ranks == 1 else partial(_with_all_cpus, loop)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for step in range(steps + 1):
        for name, times in take_turns(contenders, 1).items():
            seconds[name] += times
        if dist.get_rank() == 0:
            report(f"step {step}: " + ", ".join(f"{name} {times[-1]:.3f} s" for name, times in seconds.items()))
    parts = step_parts(contenders["megagpt"]) if device.type == "cpu" else None
    for engine in engines.values():
        engine.close()
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    reference = seconds["megagpt"][1:]
    tokens = config.train.global_batch_size * config.seq_len
    rate = flops_per_token(config.model, config.seq_len) * tokens / medians["megagpt"]
    peak = peak_flops(torch.cuda.get_device_name(device), config.train.precision) if device.type == "cuda" else None
    return {
        "ranks": ranks,
        "steps": steps,
        "tokens_per_step": tokens,
        "precision": config.train.precision,
        "first_step_seconds": {name: times[0] for name, times in seconds.items()},
        "step_seconds": medians,
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "model_flops_per_second": rate,
        "mfu": rate / peak if peak else None,
        "parts_seconds": parts,
        "speedup_over": {name: ratio(times[1:], reference) for name, times in seconds.items() if name != "megagpt"},
    }


class _PlainGPT(nn.Module):
    """The same network with the mean loss over full logits."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(input_ids).flatten(0, 1), targets.flatten())


def _cut(batch: Batch, micro_batch_size: int) -> list[Batch]:
    return [batch[i : i + micro_batch_size] for i in range(0, len(batch), micro_batch_size)]


def _engine_turn(engine: Engine, micro_batches: list[Batch]) -> Callable[[], object]:
    """A step of all ranks, until the last one is done; they come here first and sleep in gloo while rank 0 is alone."""

    def turn() -> None:
        dist.barrier()
        engine.step(micro_batches, engine.config.optimizer.lr).read()
        dist.barrier()

    return turn


def _with_all_cpus(step: Callable[[], object]) -> None:
    """With a thread for each CPU that this process may use, instead of a rank's share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        step()
    finally:
        torch.set_num_threads(threads)


class _Loops:
    """Training loops in plain torch, as functions that do one step."""

    def __init__(self, config: RunConfig, micro_batches: list[Batch], device: torch.device) -> None:
        self.config, self.micro_batches, self.device = config, micro_batches, device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.train.precision]
        self.model = GPT(config.model)
        initialize_weights(self.model, config.train.seed)

    def plain(self) -> Callable[[], object]:
        """Our model."""
        model = copy.deepcopy(self.model).to(self.device)
        forward = torch.compile(_PlainGPT(model)) if self.config.train.compile else _PlainGPT(model)
        return self._step(forward, model, self._optimizer(model), self.dtype)

    def of(self, peers: Peers) -> dict[str, Callable[[], object]]:
        """Their models, with the weights of ours."""
        found: dict[str, Callable[[], object]] = {}
        weights = weights_of(self.model)
        if peers.nanogpt:
            for name, compiled in {"nanogpt": False, "nanogpt, compiled": True}.items():
                model = nanogpt_model(peers.nanogpt, self.config.model, weights).to(self.device)
                forward = torch.compile(model) if compiled else model
                settings = self.config.optimizer
                optimizer = model.configure_optimizers(
                    settings.weight_decay, settings.lr, settings.betas, self.device.type
                )
                dtype = self.dtype if compiled or self.device.type == "cuda" else torch.float32
                found[name] = self._step(partial(_second, forward), model, optimizer, dtype)
        if peers.transformers:
            for name, compiled in {"transformers": False, "transformers, compiled": True}.items():
                model = transformers_model(self.config.model, weights, torch.float32).to(self.device).train()
                loss = partial(_logits_loss, torch.compile(model) if compiled else model)
                found[name] = self._step(loss, model, self._plain_adamw(model), self.dtype)
        return found

    def _optimizer(self, model: GPT) -> torch.optim.Optimizer:
        heights = partial(stacked_heights, config=self.config.model)
        groups = parameter_groups(model, self.config.optimizer, parameter_kind, heights)
        return build_optimizer(groups, self.config.optimizer, self.config.train.precision)

    def _plain_adamw(self, model: nn.Module) -> torch.optim.Optimizer:
        settings = self.config.optimizer
        return torch.optim.AdamW(
            model.parameters(), settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=True
        )

    def _step(
        self,
        loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
    ) -> Callable[[], float]:
        def step() -> float:
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=self.device)
            for batch in self.micro_batches:
                with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                    loss = loss_of(batch.input_ids, batch.targets) / len(self.micro_batches)
                loss.backward()
                total += loss.detach()
            if self.config.optimizer.grad_clip:
                nn.utils.clip_grad_norm_(model.parameters(), self.config.optimizer.grad_clip)
            optimizer.step()
            return total.item()

        return step


def _second(model: Callable[..., Any], input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return model(input_ids, targets)[1]


def _logits_loss(model: Callable[..., Any], input_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(input_ids).logits.flatten(0, 1), targets.flatten())


def random_batch(config: RunConfig, device: torch.device) -> Batch:
    """Random tokens: the time of a step does not depend on which they are."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.train.global_batch_size, config.seq_len + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).to(device)
