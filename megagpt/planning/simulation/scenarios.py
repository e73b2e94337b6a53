"""What is played of a plan: the conditions of the cluster, one way to run on it, and the closed form of that."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from scipy import stats

from megagpt.errors import ConfigError, UsageError
from megagpt.planning.checkpoints import CheckpointCost, checkpoint_cost
from megagpt.planning.failures import goodput, reliability
from megagpt.planning.memory import memory
from megagpt.planning.plan import Plan, run_layout
from megagpt.planning.settings import Settings
from megagpt.planning.simulation.job import Job, Preemption, Team
from megagpt.planning.simulation.nodes import Wear
from megagpt.planning.simulation.stint import Saving
from megagpt.planning.simulation.stragglers import Stragglers
from megagpt.planning.units import duration_text, size_text

ENOUGH = 0.99
"""Of the time, the default number of spares is at least that of the broken nodes."""


@dataclass(frozen=True)
class Conditions:
    """What is played, besides what the plan says."""

    spares: int | None
    """Nodes beyond those that train; None: enough for ENOUGH of the time."""
    repair_seconds: float
    """Mean time until a failed node is back."""
    shape: float
    """Of the Weibull distribution of a node's life; 1: exponential."""
    stragglers: Stragglers
    detection_seconds: float
    """Part of the plan's restart: until a failure is noticed."""
    replacement_seconds: float
    """Beyond the plan's restart: until another node has taken a failed one's place."""
    fewer_nodes: bool
    """Whether the run goes on with fewer nodes if there are not enough, or waits."""
    preemption: Preemption | None
    every_seconds: float | None
    """Training between two checkpoints; None: the closed form's best."""
    days: float
    """To play."""
    runs: int
    seed: int


@dataclass(frozen=True)
class Scenario:
    """One way to run the plan."""

    asynchronous: bool
    """Whether checkpoints are written while training goes on."""
    job: Job

    @property
    def name(self) -> str:
        """In words."""
        spares = f"{self.job.spares} spare{'s' * (self.job.spares != 1)}" if self.job.spares else "no spares"
        return f"{'asynchronous' if self.asynchronous else 'synchronous'}, {spares}"

    @property
    def every_seconds(self) -> float:
        """Training between two checkpoints."""
        return self.job.saving.every_steps * self.job.step_seconds


def make_job(
    plan: Plan,
    conditions: Conditions,
    asynchronous: bool,
    spares: int,
    every_seconds: float | None,
    fewer: Callable[[int], Team | None] | None,
) -> Job:
    """The plan's run. every_seconds: of training between two checkpoints, None: the closed form's best.

    fewer: of a Job. Raises UsageError for a restart that is shorter than its parts.
    """
    cost, step = _cost(plan, asynchronous), plan.time.total
    steps = max(1, round((every_seconds or best_seconds(plan, asynchronous)) / step))
    if asynchronous:  # a checkpoint cannot begin before the last one is written
        steps = max(steps, math.ceil(cost.write_seconds / step))
    return Job(
        nodes=node_count(plan),
        step_seconds=step,
        saving=Saving(steps, cost.stall_seconds, cost.write_seconds),
        spares=spares,
        wear=Wear(plan.circumstances.node_mtbf_seconds, conditions.repair_seconds, conditions.shape),
        stragglers=conditions.stragglers,
        detection_seconds=conditions.detection_seconds,
        replacement_seconds=conditions.replacement_seconds,
        start_seconds=_start_seconds(plan, conditions),
        fewer_nodes=fewer,
        preemption=conditions.preemption,
    )


def as_assumed(job: Job) -> Job:
    """What the closed form assumes of `job`."""
    restart = job.detection_seconds + job.replacement_seconds + job.start_seconds
    return replace(job, spares=0, wear=Wear(job.wear.mtbf_seconds, 0.0), stragglers=Stragglers(), preemption=None,
                   detection_seconds=0.0, replacement_seconds=0.0, start_seconds=restart)  # fmt: skip


def closed_form(job: Job, every_seconds: float | None = None) -> float:
    """Goodput of `job` as megagpt.planning.failures has it; every_seconds: instead of its own."""
    restart = job.detection_seconds + job.replacement_seconds + job.start_seconds
    unwritten = job.saving.write_seconds - job.saving.stall_seconds
    every = every_seconds or job.saving.every_steps * job.step_seconds
    return goodput(every, job.saving.stall_seconds, restart + unwritten, job.wear.mtbf_seconds / job.nodes)


def enough_spares(plan: Plan, conditions: Conditions) -> int:
    """Spares that are as many as the broken nodes for ENOUGH of the time.

    Nodes that fail independently and are repaired beside each other are broken in a number that is Poisson's, whatever
    the distribution of the time that it takes (Palm's theorem).
    """
    broken = node_count(plan) * conditions.repair_seconds / plan.circumstances.node_mtbf_seconds
    return max(1, int(stats.poisson.ppf(ENOUGH, broken)))


def best_seconds(plan: Plan, asynchronous: bool) -> float:
    """Training between two checkpoints that is best by the closed form."""
    cost, around = _cost(plan, asynchronous), plan.circumstances
    return reliability(
        node_count(plan), around.node_mtbf_seconds, cost.stall_seconds, cost.write_seconds, around.restart_seconds
    ).interval_seconds


def fewer_nodes(plan: Plan) -> Callable[[int], Team | None]:
    """Of whole nodes, the most over which the batch can be cut and the model fits, and how long a step takes on them.

    The others stay idle, as in a job that Slurm has started on fewer nodes.
    """
    settings = Settings.of_run(plan.config)

    def team(nodes: int) -> Team | None:
        gpus = nodes * plan.layout.gpus_per_node
        if plan.layout.global_batch % gpus:
            return None
        try:
            layout = run_layout(plan.config, gpus, plan.layout.gpus_per_node)
        except ConfigError:
            return None
        if not plan.machine.limits.allow(memory(plan.config.model, layout, settings)):
            return None
        return nodes, plan.machine.step_time(plan.config.model, layout).total

    @cache
    def most(whole: int) -> Team | None:
        return next((found for nodes in range(whole, 0, -1) if (found := team(nodes))), None)

    return most


def node_count(plan: Plan) -> int:
    """Nodes that train."""
    return -(-plan.layout.gpus // plan.layout.gpus_per_node)


def _start_seconds(plan: Plan, conditions: Conditions) -> float:
    """What the plan's restart leaves for starting processes and reading the checkpoint. Raises UsageError."""
    restart, detection = plan.circumstances.restart_seconds, conditions.detection_seconds
    reading = plan.checkpoint.size / plan.circumstances.storage_bytes_per_second
    if restart < detection + reading:
        raise UsageError(
            f"--restart {duration_text(restart)} is less than --detection {duration_text(detection)} and reading the "
            f"checkpoint, {size_text(plan.checkpoint.size)} in {duration_text(reading)}: give --restart "
            f"{math.ceil((detection + reading) / 60)}min or more"
        )
    return restart - detection


def _cost(plan: Plan, asynchronous: bool) -> CheckpointCost:
    return checkpoint_cost(
        plan.checkpoint.size,
        plan.layout,
        plan.machine.cluster.device.host_bandwidth,
        plan.circumstances.storage_bytes_per_second,
        asynchronous,
    )
