"""All layouts that a configuration can ask for, by predicted throughput; the smallest cluster; curves over GPUs.

What is varied is what keys of the configuration say: ZeRO stage, micro-batch, activation checkpointing, offload, and
the ranks that share a second copy of ZeRO-3's weights (hpZ). Model, batch and precision stay: they belong to the
experiment.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megagpt.config.batch import check_batches, nearest_divisors
from megagpt.config.schema import RunConfig
from megagpt.errors import ConfigError, UsageError
from megagpt.planning.layout import Checkpointing, Layout
from megagpt.planning.memory import MemoryParts, memory
from megagpt.planning.plan import Machine, run_layout
from megagpt.planning.settings import Settings
from megagpt.planning.time import StepTime

MOST_GPUS = 2**17
"""Up to which clusters are tried."""
_CHECKPOINTED_ONE_IN = (1, 2, 4)


@dataclass(frozen=True)
class Option:
    """A layout that fits."""

    layout: Layout
    memory: MemoryParts
    time: StepTime

    @property
    def overrides(self) -> list[str]:
        """What a command adds to the configuration to run it."""
        layout = self.layout
        words = [
            f"parallel.zero_stage={layout.zero_stage}",
            f"train.micro_batch_size={layout.micro_batch}",
            f"train.activation_checkpointing={str(layout.checkpointing == 'full').lower()}",
            f"train.activation_checkpointing_every={layout.checkpointing_every}",
            f"parallel.offload_optimizer={str(layout.offload_optimizer).lower()}",
            f"parallel.offload_parameters={str(layout.offload_parameters).lower()}",
        ]
        if layout.shard_gpus:
            words.append(f"deepspeed.zero_optimization.zero_hpz_partition_size={layout.shard_gpus}")
        return words


@dataclass(frozen=True)
class CurvePoint:
    """A number of GPUs of a scaling curve."""

    gpus: int
    layout: Layout | None
    time: StepTime | None
    problem: str | None
    """Why there is no time."""


def search(config: RunConfig, machine: Machine, gpus: int) -> list[Option]:
    """The layouts on `gpus` that fit, the fastest first, one of each kind: that with its fastest micro-batch.

    Raises ConfigError for a batch that the GPUs cannot divide.
    """
    check_batches(config.train.batches, None, gpus)
    share = config.train.global_batch_size // gpus
    base = replace(run_layout(_with_micro_batch(config, None), gpus, machine.cluster.gpus_per_node), shard_gpus=None)
    settings, found = Settings.of_run(config), []
    for kind in _kinds(config, base):
        options = []
        for micro_batch in nearest_divisors(share, 1, count=share):
            layout = replace(kind, micro_batch=micro_batch)
            parts = memory(config.model, layout, settings)
            if not machine.limits.allow(parts):
                break
            options.append(Option(layout, parts, machine.step_time(config.model, layout)))
        if options:
            found.append(max(options, key=lambda option: option.time.tokens_per_second_per_gpu))
    return sorted(found, key=lambda option: -option.time.tokens_per_second_per_gpu)


def smallest_cluster(config: RunConfig, machine: Machine, gpus: int) -> int | None:
    """The fewest GPUs, `gpus` doubled again and again, on which one sequence a GPU fits somehow; None: none do."""
    settings = Settings.of_run(config)
    while gpus <= MOST_GPUS:
        base = Layout(
            gpus, min(gpus, machine.cluster.gpus_per_node), 1, gpus, config.seq_len, 0, precision=config.train.precision
        )
        for kind in _kinds(config, base):
            if machine.limits.allow(memory(config.model, kind, settings)):
                return gpus
        gpus *= 2
    return None


def check_possible(config: RunConfig, machine: Machine, gpus: int) -> None:
    """Raises UsageError, naming the smallest cluster that could, for a model that no layout brings into `gpus`."""
    least = smallest_cluster(config, machine, gpus)
    if least == gpus:
        return
    name, size = machine.cluster.device.name, f"{gpus} x {machine.cluster.device.name}"
    if least is None:
        raise UsageError(
            f"no number of {name} can train this model: one sequence of {config.seq_len} tokens does not fit even with "
            "ZeRO-3, offload and activation checkpointing; lower data.seq_len or take GPUs with more memory"
        )
    raise UsageError(
        f"{size} cannot train this model, whatever ZeRO stage, offload, checkpointing and micro-batch: the smallest "
        f"cluster that could has {least} GPUs; give --gpus {least} or GPUs with more memory"
    )


def curve(
    config: RunConfig, machine: Machine, gpu_counts: Sequence[int], kind: Literal["strong", "weak"]
) -> list[CurvePoint]:
    """Step times over numbers of GPUs: of the same batch (strong), or of a batch that grows with them (weak).

    A micro-batch that a GPU's share does not hold any more shrinks to the largest that divides it.
    """
    first, points = gpu_counts[0], []
    for gpus in gpu_counts:
        batch = config.train.global_batch_size
        if kind == "weak":
            batch = batch * gpus // first
        points.append(_point(config, machine, gpus, batch))
    return points


def _point(config: RunConfig, machine: Machine, gpus: int, batch: int) -> CurvePoint:
    try:
        check_batches(replace(config.train.batches, final=batch, samples=0), None, gpus)
    except ConfigError:
        return CurvePoint(gpus, None, None, f"{batch} sequences cannot be divided among {gpus} GPUs")
    share, wanted = batch // gpus, config.train.micro_batch_size
    settings = Settings.of_run(config)
    layout = run_layout(_with_batch(config, batch), gpus, machine.cluster.gpus_per_node)
    for micro_batch in sorted(nearest_divisors(share, 1, count=share), reverse=True):
        candidate = replace(layout, micro_batch=micro_batch)
        too_large = wanted and micro_batch > wanted
        if not too_large and machine.limits.allow(memory(config.model, candidate, settings)):
            return CurvePoint(gpus, candidate, machine.step_time(config.model, candidate), None)
    return CurvePoint(gpus, None, None, f"not even one sequence fits into {machine.cluster.device.name}")


def _kinds(config: RunConfig, base: Layout) -> Iterator[Layout]:
    """Layouts of one micro-batch: whatever the configuration's optimizer allows."""
    is_muon = config.optimizer.name == "muon"
    ways: list[tuple[Checkpointing, int]] = [("none", 1), *(("full", every) for every in _CHECKPOINTED_ONE_IN)]
    # A matrix of which every rank has a part can neither be Muon's nor in a graph of the whole model.
    stages = 3 if is_muon or config.train.compile_scope == "model" else 4
    for stage, (checkpointing, every) in itertools.product(range(stages), ways):
        layout = replace(base, zero_stage=stage, checkpointing=checkpointing, checkpointing_every=every, micro_batch=1,
                         shard_gpus=None, offload_optimizer=False, offload_parameters=False)  # fmt: skip
        yield layout
        if stage and not is_muon:
            yield replace(layout, offload_optimizer=True)
        if stage == 3:
            yield replace(layout, offload_optimizer=True, offload_parameters=True)
            if base.gpus > base.gpus_per_node > 1 and base.gpus % base.gpus_per_node == 0:
                yield replace(layout, shard_gpus=base.gpus_per_node)


def _with_micro_batch(config: RunConfig, micro_batch: int | None) -> RunConfig:
    train = config.train.model_copy(update={"micro_batch_size": micro_batch})
    return config.model_copy(update={"train": train})


def _with_batch(config: RunConfig, batch: int) -> RunConfig:
    changes = {"micro_batch_size": None, "global_batch_size": batch, "rampup_start": None, "rampup_increment": None,
               "rampup_samples": None}  # fmt: skip
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})
