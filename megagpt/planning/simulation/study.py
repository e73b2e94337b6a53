"""A plan played many times, with and without asynchronous checkpoints and spare nodes, beside the closed form.

Runs of the same number meet the same failures in every scenario, so differences are told apart with few runs. Intervals
are Student's t over the runs. What the closed form assumes (exponential failures that take one restart each, equal
nodes, one always at hand) is played, too: only that can agree with it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from scipy import stats

from megagpt.errors import ConfigError, UsageError
from megagpt.planning.checkpoints import CheckpointCost, checkpoint_cost
from megagpt.planning.failures import goodput, reliability
from megagpt.planning.memory import memory
from megagpt.planning.plan import Plan, run_layout
from megagpt.planning.report import verdict
from megagpt.planning.settings import Settings
from megagpt.planning.simulation.job import PARTS, Job, Played, Team, play
from megagpt.planning.simulation.nodes import Wear
from megagpt.planning.simulation.stint import Saving
from megagpt.planning.simulation.stragglers import Stragglers
from megagpt.planning.units import duration_text, size_text
from megagpt.scaling.measurements import Interval

DAY = 86400.0
ENOUGH = 0.99
"""Of the time, the default number of spares is at least that of the broken nodes."""
MOST_FAILURES = 2_000_000
"""In all runs together; each takes about a tenth of a millisecond."""
SWEPT_INTERVALS = (0.25, 0.4, 0.63, 1.0, 1.6, 2.5, 4.0)
"""Times of training between checkpoints, in the best ones of the closed form."""


@dataclass(frozen=True)
class Conditions:
    """What is played, besides what the plan says."""

    spares: int | None = None
    """Nodes beyond those that train; None: enough for ENOUGH of the time."""
    repair_seconds: float = 4 * 3600.0
    """Mean time until a failed node is back."""
    shape: float = 1.0
    """Of the Weibull distribution of a node's life; 1: exponential."""
    stragglers: Stragglers = field(default_factory=Stragglers)
    detection_seconds: float = 300.0
    """Part of the plan's restart: until a failure is noticed."""
    replacement_seconds: float = 0.0
    """Beyond the plan's restart: until another node has taken a failed one's place."""
    fewer_nodes: bool = False
    """Whether the run goes on with fewer nodes if there are not enough, or waits."""
    every_seconds: float | None = None
    """Training between two checkpoints; None: the closed form's best."""
    days: float = 30.0
    """To play."""
    runs: int = 20
    seed: int = 0


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


@dataclass(frozen=True)
class Outcome:
    """What the runs of a scenario came to."""

    scenario: Scenario
    runs: tuple[Played, ...]

    @property
    def goodputs(self) -> np.ndarray:
        """Of the runs."""
        return np.array([run.goodput for run in self.runs])

    @property
    def goodput(self) -> Interval:
        """Share of the time that trains as planned."""
        return estimate(self.goodputs)

    @property
    def parts(self) -> dict[str, Interval]:
        """Shares of the time by PARTS."""
        return {part: estimate([run.seconds[part] / sum(run.seconds.values()) for run in self.runs]) for part in PARTS}

    @property
    def interruptions(self) -> Interval:
        """Failures that stopped the job."""
        return estimate([run.interruptions for run in self.runs])

    @property
    def goodput_of_all_nodes(self) -> Interval:
        """The same, spares counted as nodes that could train."""
        job, whole = self.scenario.job, self.goodput
        share = job.nodes / (job.nodes + job.spares)
        return Interval(*(share * value for value in (whole.value, whole.low, whole.high)))

    def gain(self, other: "Outcome") -> Interval:
        """Goodput beyond that of another scenario, run by run."""
        return estimate(self.goodputs - other.goodputs)


@dataclass(frozen=True)
class Agreement:
    """The closed form beside a simulation of what it assumes."""

    asynchronous: bool
    every_seconds: float
    closed_form: float
    """Goodput."""
    simulated: Interval

    @property
    def agrees(self) -> bool:
        """Whether the closed form is in the interval."""
        return self.simulated.low <= self.closed_form <= self.simulated.high


@dataclass(frozen=True)
class Sweep:
    """Goodput over the time between checkpoints."""

    asynchronous: bool
    best_seconds: float
    """By the closed form."""
    job: Job
    """At one of the points."""
    points: list[tuple[Agreement, Interval]]
    """What the closed form assumes, and goodput under the conditions."""

    def closed_form(self, seconds: np.ndarray) -> list[float]:
        """Goodput with so much time between checkpoints."""
        return [closed_form(self.job, float(every)) for every in seconds]


@dataclass(frozen=True)
class Simulation:
    """All that was played."""

    plan: Plan
    conditions: Conditions
    outcomes: list[Outcome]
    chosen: int
    """Which of them the plan and the conditions ask for."""
    agreements: list[Agreement]
    sweeps: list[Sweep]
    over_spares: list[Outcome]
    """The chosen one with ever more spares."""


def simulate(plan: Plan, conditions: Conditions, sweeps: bool) -> Simulation:
    """Play all scenarios, with `sweeps` also other intervals and numbers of spares.

    Raises UsageError for a plan that does not fit, conditions that contradict each other, and too much to play.
    """
    if not plan.fits:
        raise UsageError(f"{verdict(plan)}; python -m tools.plan --search finds layouts that do")
    spares = enough_spares(plan, conditions) if conditions.spares is None else conditions.spares
    counts = sorted({0, spares})
    more = spare_counts(max(spares, 1)) if sweeps else []
    plays = 2 * len(counts) + 2 + (4 * len(SWEPT_INTERVALS) + len(more) if sweeps else 0)
    _check_length(plan, conditions, spares, plays)
    fewer = fewer_nodes(plan) if conditions.fewer_nodes else None
    asked = plan.config.checkpoint.asynchronous

    def scenario(asynchronous: bool, count: int, every: float | None = conditions.every_seconds) -> Scenario:
        return Scenario(asynchronous, _job(plan, conditions, asynchronous, count, every, fewer))

    def played(one: Scenario) -> Outcome:
        seconds = conditions.days * DAY
        return Outcome(one, tuple(play(one.job, seconds, [conditions.seed, run]) for run in range(conditions.runs)))

    def agreement(one: Scenario) -> Agreement:
        ideal = played(replace(one, job=_as_assumed(one.job)))
        return Agreement(one.asynchronous, one.every_seconds, closed_form(one.job), ideal.goodput)

    def sweep(asynchronous: bool) -> Sweep:
        best = best_seconds(plan, asynchronous)
        swept = list(_swept(scenario, asynchronous, spares, best))
        return Sweep(asynchronous, best, swept[0].job, [(agreement(one), played(one).goodput) for one in swept])

    outcomes = [played(scenario(asynchronous, count)) for asynchronous in (False, True) for count in counts]
    chosen = next(place for place, outcome in enumerate(outcomes)
                  if (outcome.scenario.asynchronous, outcome.scenario.job.spares) == (asked, spares))  # fmt: skip
    return Simulation(
        plan=plan,
        conditions=replace(conditions, spares=spares),
        outcomes=outcomes,
        chosen=chosen,
        agreements=[agreement(scenario(asynchronous, spares)) for asynchronous in (False, True)],
        sweeps=[sweep(asynchronous) for asynchronous in (False, True)] if sweeps else [],
        over_spares=[played(scenario(asked, count)) for count in more],
    )


def estimate(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of independent values and its 95% interval (Student's t)."""
    mean, count = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


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
    broken = _nodes(plan) * conditions.repair_seconds / plan.circumstances.node_mtbf_seconds
    return max(1, int(stats.poisson.ppf(ENOUGH, broken)))


def spare_counts(enough: int) -> list[int]:
    """From none to twice as many as are enough, about six."""
    return sorted({0, 1, *(max(1, round(enough * share)) for share in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0))})


def best_seconds(plan: Plan, asynchronous: bool) -> float:
    """Training between two checkpoints that is best by the closed form."""
    cost, hours = _cost(plan, asynchronous), plan.circumstances
    return reliability(
        _nodes(plan), hours.node_mtbf_seconds, cost.stall_seconds, cost.write_seconds, hours.restart_seconds
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


def _job(
    plan: Plan,
    conditions: Conditions,
    asynchronous: bool,
    spares: int,
    every_seconds: float | None,
    fewer: Callable[[int], Team | None] | None,
) -> Job:
    cost, step = _cost(plan, asynchronous), plan.time.total
    steps = max(1, round((every_seconds or best_seconds(plan, asynchronous)) / step))
    if asynchronous:  # a checkpoint cannot begin before the last one is written
        steps = max(steps, math.ceil(cost.write_seconds / step))
    return Job(
        nodes=_nodes(plan),
        step_seconds=step,
        saving=Saving(steps, cost.stall_seconds, cost.write_seconds),
        spares=spares,
        wear=Wear(plan.circumstances.node_mtbf_seconds, conditions.repair_seconds, conditions.shape),
        stragglers=conditions.stragglers,
        detection_seconds=conditions.detection_seconds,
        replacement_seconds=conditions.replacement_seconds,
        start_seconds=_start_seconds(plan, conditions),
        fewer_nodes=fewer,
    )


def _as_assumed(job: Job) -> Job:
    """What the closed form assumes of `job`."""
    restart = job.detection_seconds + job.replacement_seconds + job.start_seconds
    return replace(job, spares=0, wear=Wear(job.wear.mtbf_seconds, 0.0), stragglers=Stragglers(),
                   detection_seconds=0.0, replacement_seconds=0.0, start_seconds=restart)  # fmt: skip


def _swept(
    scenario: Callable[[bool, int, float], Scenario], asynchronous: bool, spares: int, best: float
) -> Iterator[Scenario]:
    """Scenarios with other times between checkpoints, each number of steps once."""
    seen = set()
    for share in SWEPT_INTERVALS:
        one = scenario(asynchronous, spares, share * best)
        if one.job.saving.every_steps not in seen:
            seen.add(one.job.saving.every_steps)
            yield one


def _start_seconds(plan: Plan, conditions: Conditions) -> float:
    """What the plan's restart leaves for starting processes and reading the checkpoint. Raises UsageError."""
    restart, detection = plan.circumstances.restart_seconds, conditions.detection_seconds
    reading = plan.checkpoint.size / plan.circumstances.storage_bytes_per_second
    if restart < detection + reading:
        raise UsageError(
            f"--restart {duration_text(restart)} is less than --detection {duration_text(detection)} and reading the "
            f"checkpoint ({size_text(plan.checkpoint.size)} in {duration_text(reading)}): give more, or another part"
        )
    return restart - detection


def _check_length(plan: Plan, conditions: Conditions, spares: int, plays: int) -> None:
    seconds = conditions.days * DAY * conditions.runs * plays
    failures = seconds * (_nodes(plan) + spares) / plan.circumstances.node_mtbf_seconds
    if failures > MOST_FAILURES:
        days = conditions.days * MOST_FAILURES / failures
        raise UsageError(f"{failures:,.0f} failures to play, of at most {MOST_FAILURES:,}: give --days {days:.2g}, "
                         "or fewer --runs")  # fmt: skip


def _cost(plan: Plan, asynchronous: bool) -> CheckpointCost:
    return checkpoint_cost(
        plan.checkpoint.size,
        plan.layout,
        plan.machine.cluster.device.host_bandwidth,
        plan.circumstances.storage_bytes_per_second,
        asynchronous,
    )


def _nodes(plan: Plan) -> int:
    return -(-plan.layout.gpus // plan.layout.gpus_per_node)
