"""How fast a training step is, side by side with a plain torch loop on the same model, and with peers.

The plain loop is what a careful user writes without this project: fp32 weights, the model compiled as a whole, forward
under autocast, full logits into cross_entropy, clipping, fused AdamW. nanoGPT runs as it ships on a CPU (fp32, eager)
and at its best (compiled, autocast), transformers' model in the same loop, eager and compiled. All take turns
(A B A B ...), so that whatever else the machine does slows all of them: on a GPU in one process, on CPUs each in its
own with all of them, so that the allocator that this project tunes for itself serves no other. There a turn is two
steps of which the second counts: a virtual machine's host may take back what a process has freed before its next turn,
and to touch it again would cost some a quarter of their speed. Where we are several ranks, they sleep in a barrier
while another is at work.
"""

import os
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from megagpt.benchmark.fresh import joined, turns
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
    unfused: bool = False
    """The plain loop once more, with AdamW as torch has it by default: on GPUs a few kernels for all weights, on CPUs
    one after the other for each."""
    variants: Mapping[str, RunConfig] = field(default_factory=dict)
    """Ourselves, configured otherwise but with the same batch, by name."""

    @property
    def loops(self) -> list[str]:
        """The names of all training loops in plain torch, that of our own model first."""
        names = ["plain"]
        if self.unfused:
            names.append("plain, unfused AdamW")
        for peer, takes_part in (("nanogpt", self.nanogpt), ("transformers", self.transformers)):
            if takes_part:
                names += [peer, f"{peer}, compiled"]
        return names


def compare_on_rank(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`compare` on each of several new processes, which `fresh.call` joins to a job; rank 0 prints its lines.

    arguments: config and variants (by name) as JSON trees, steps, transformers, unfused, nanogpt (a path or null).
    """
    with joined() as rank:
        variants = {name: RunConfig.model_validate(tree) for name, tree in arguments["variants"].items()}
        nanogpt = Path(arguments["nanogpt"]) if arguments["nanogpt"] else None
        return compare(
            RunConfig.model_validate(arguments["config"]),
            arguments["steps"],
            torch.device("cpu"),
            Peers(arguments["transformers"], nanogpt, arguments["unfused"], variants),
            partial(print, flush=True) if rank == 0 else lambda line: None,
        )


def loop_of(arguments: Mapping[str, Any]) -> Callable[[], object]:
    """A loop of `Peers.loops` in this process, on CPUs. arguments: config as a JSON tree, name, nanogpt (a path)."""
    config = RunConfig.model_validate(arguments["config"])
    torch.use_deterministic_algorithms(config.train.deterministic)
    nanogpt = Path(arguments["nanogpt"]) if arguments["nanogpt"] else None
    return _Loops(config, torch.device("cpu"), nanogpt).named(arguments["name"])


def compare(
    config: RunConfig, steps: int, device: torch.device, peers: Peers, report: Callable[[str], None]
) -> dict[str, Any]:
    """Median seconds a step of all, after the first (compiling) step of each, and their ratios; JSON types.

    On a GPU also the bytes that a step takes at most beside what is held between steps (by all contenders):
    activations, logits, and gradients, but for the fp32 sums that ours keeps at ZeRO 1 in bf16.

    All ranks call it; rank 0's times count, and its `report` is given a line about each step. Raises UsageError
    for several ranks on GPUs, which one process could not use.
    """
    ranks = dist.get_world_size()
    if ranks > 1 and device.type != "cpu":
        raise UsageError("several ranks are compared with one process on CPUs only; start it on one GPU")
    with ExitStack() as others:
        return _compare(config, steps, device, peers, report, others)


def _compare(
    config: RunConfig,
    steps: int,
    device: torch.device,
    peers: Peers,
    report: Callable[[str], None],
    others: ExitStack,
) -> dict[str, Any]:
    ranks, batch = dist.get_world_size(), random_batch(config, device)
    share = config.train.global_batch_size // ranks
    own = batch[dist.get_rank() * share : (dist.get_rank() + 1) * share]
    named = {"megagpt": config, **peers.variants}
    cuts = {
        name: check_batch(one.train.global_batch_size, one.train.micro_batch_size, ranks) for name, one in named.items()
    }
    engines = {name: Engine(one, *cuts[name], device) for name, one in named.items()}
    contenders = {name: _engine_turn(engine, _cut(own, cuts[name][0])) for name, engine in engines.items()}
    if dist.get_rank() == 0:
        nanogpt = str(peers.nanogpt) if peers.nanogpt else None
        threads = torch.get_num_threads() if ranks == 1 else len(os.sched_getaffinity(0))
        for name in peers.loops:
            if device.type == "cpu":
                arguments = {"config": config.model_dump(mode="json"), "name": name, "nanogpt": nanogpt}
                contenders[name] = others.enter_context(turns(__name__, "loop_of", arguments, threads, name))
            else:
                contenders[name] = _Loops(config, device, peers.nanogpt).named(name)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    step_bytes: dict[str, int] = {}
    for step in range(steps + 1):
        if device.type == "cuda" and step == 1:  # optimizer state is there, and code is compiled
            step_bytes = {name: _bytes_beside(contender, device) for name, contender in contenders.items()}
        for name, times in take_turns(contenders, 1, uncounted=int(step > 0 and device.type == "cpu")).items():
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
        "num_layers": config.model.num_layers,
        "steps": steps,
        "tokens_per_step": tokens,
        "tokens_per_micro_batch": cuts["megagpt"][0] * config.seq_len,
        "precision": config.train.precision,
        "first_step_seconds": {name: times[0] for name, times in seconds.items()},
        "step_seconds": medians,
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "model_flops_per_second": rate,
        "mfu": rate / peak if peak else None,
        "step_bytes": step_bytes or None,
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


class _Loops:
    """Training loops in plain torch, as functions that do one step."""

    def __init__(self, config: RunConfig, device: torch.device, nanogpt: Path | None) -> None:
        """nanogpt: the model.py of a checkout, if its loops are asked for."""
        self.config, self.device, self.nanogpt = config, device, nanogpt
        micro_batch_size, _ = check_batch(config.train.global_batch_size, config.train.micro_batch_size, 1)
        self.micro_batches = _cut(random_batch(config, device), micro_batch_size)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.train.precision]
        self.model = GPT(config.model)
        initialize_weights(self.model, config.train.seed)

    def named(self, name: str) -> Callable[[], object]:
        """One of Peers.loops."""
        of, _, how = name.partition(", ")
        if of == "plain":
            return self._plain(is_fused=not how)
        return (self._nanogpt if of == "nanogpt" else self._transformers)(is_compiled=bool(how))

    def _plain(self, is_fused: bool) -> Callable[[], object]:
        model = self.model.to(self.device)
        forward = torch.compile(_PlainGPT(model)) if self.config.train.compile else _PlainGPT(model)
        optimizer = self._optimizer(model) if is_fused else self._plain_adamw(model, fused=None)
        return self._step(forward, model, optimizer, self.dtype)

    def _nanogpt(self, is_compiled: bool) -> Callable[[], object]:
        assert self.nanogpt is not None
        model = nanogpt_model(self.nanogpt, self.config.model, weights_of(self.model)).to(self.device)
        forward = torch.compile(model) if is_compiled else model
        settings = self.config.optimizer
        optimizer = model.configure_optimizers(settings.weight_decay, settings.lr, settings.betas, self.device.type)
        dtype = self.dtype if is_compiled or self.device.type == "cuda" else torch.float32
        return self._step(partial(_second, forward), model, optimizer, dtype)

    def _transformers(self, is_compiled: bool) -> Callable[[], object]:
        model = transformers_model(self.config.model, weights_of(self.model), torch.float32).to(self.device).train()
        loss = partial(_logits_loss, torch.compile(model) if is_compiled else model)
        return self._step(loss, model, self._plain_adamw(model), self.dtype)

    def _optimizer(self, model: GPT) -> torch.optim.Optimizer:
        heights = partial(stacked_heights, config=self.config.model)
        groups = parameter_groups(model, self.config.optimizer, parameter_kind, heights)
        return build_optimizer(groups, self.config.optimizer, self.config.train.precision)

    def _plain_adamw(self, model: nn.Module, fused: bool | None = True) -> torch.optim.Optimizer:
        """fused: None is torch's choice, which takes its fused kernel nowhere."""
        settings = self.config.optimizer
        return torch.optim.AdamW(
            model.parameters(), settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=fused
        )

    def _step(
        self,
        loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
    ) -> Callable[[], float]:
        def step() -> float:
            total = torch.zeros((), device=self.device)
            for batch in self.micro_batches:
                with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                    loss = loss_of(batch.input_ids, batch.targets) / len(self.micro_batches)
                loss.backward()
                total += loss.detach()
            if self.config.optimizer.grad_clip:
                nn.utils.clip_grad_norm_(model.parameters(), self.config.optimizer.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return total.item()

        return step


def _bytes_beside(step: Callable[[], object], device: torch.device) -> int:
    """Bytes that a GPU's memory holds at most in a step, beside what it holds before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


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
