"""A plan played many times, with and without asynchronous checkpoints and spare nodes, beside the closed form.

Runs of the same number meet the same failures in every scenario, so differences are told apart with few runs. Intervals
are Student's t over the runs. What the closed form assumes (exponential failures that take one restart each, equal
nodes, one always at hand) is played, too: only that can agree with it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from megagpt.errors import UsageError
from megagpt.planning.plan import Plan
from megagpt.planning.simulation.job import PARTS, Job, Played, play
from megagpt.planning.simulation.scenarios import (
    Conditions,
    Scenario,
    as_assumed,
    best_seconds,
    closed_form,
    enough_spares,
    fewer_nodes,
    make_job,
    node_count,
)
from megagpt.planning.units import size_text
from megagpt.scaling.measurements import Interval

DAY = 86400.0
MOST_FAILURES = 2_000_000
"""In all runs together; each takes about a tenth of a millisecond."""
LEAST_FAILURES = 100
"""In all runs of a scenario, below which Student's t says little."""
SWEPT_INTERVALS = (0.25, 0.4, 0.63, 1.0, 1.6, 2.5, 4.0)
"""Times of training between checkpoints, in the best ones of the closed form."""
SWEPT_SPARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Numbers of spares beside 0 and 1, in that of the conditions."""


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
        return mean_share(self.goodputs)

    @property
    def parts(self) -> dict[str, Interval]:
        """Shares of the time by PARTS."""
        return {
            part: mean_share([run.seconds[part] / sum(run.seconds.values()) for run in self.runs]) for part in PARTS
        }

    @property
    def interruptions(self) -> Interval:
        """Failures that stopped the job."""
        return estimate([run.interruptions for run in self.runs])

    @property
    def goodput_of_all_nodes(self) -> Interval:
        """The same, spares counted as nodes that could train."""
        job, whole = self.scenario.job, self.goodput
        training = job.nodes / (job.nodes + job.spares)
        return Interval(*(training * value for value in (whole.value, whole.low, whole.high)))

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
    failures: int
    """In all runs."""

    @property
    def agrees(self) -> bool | None:
        """Whether the closed form is in the interval; None: too few failures for one."""
        if self.failures < LEAST_FAILURES:
            return None
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
    """Play all scenarios, with `sweeps` also other times between checkpoints and numbers of spares.

    Raises UsageError for a plan that does not fit, conditions that contradict each other, and too much to play.
    """
    if not plan.fits:
        limits = plan.machine.limits
        raise UsageError(
            f"does not fit: {size_text(plan.memory.total)} of a GPU's {size_text(limits.device)}, "
            f"{size_text(plan.memory.host)} of its host's {size_text(limits.host)}; python -m tools.plan --search "
            "finds layouts that fit"
        )
    spares = enough_spares(plan, conditions) if conditions.spares is None else conditions.spares
    player = _Player(plan, replace(conditions, spares=spares))
    player.check_length(sweeps)
    kinds = [(asynchronous, count) for asynchronous in (False, True) for count in sorted({0, spares})]
    asked = plan.config.checkpoint.asynchronous
    return Simulation(
        plan=plan,
        conditions=player.conditions,
        outcomes=[player.play(player.scenario(*kind)) for kind in kinds],
        chosen=kinds.index((asked, spares)),
        agreements=[player.agreement(player.scenario(asynchronous, spares)) for asynchronous in (False, True)],
        sweeps=[player.sweep(asynchronous, spares) for asynchronous in (False, True)] if sweeps else [],
        over_spares=[player.play(player.scenario(asked, count)) for count in spare_counts(spares)] if sweeps else [],
    )


def estimate(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of independent values and its 95% interval (Student's t)."""
    mean, count = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def mean_share(values: Sequence[float] | np.ndarray) -> Interval:
    """The same of shares, whose mean is in 0 to 1."""
    whole = estimate(values)
    return Interval(whole.value, max(0.0, whole.low), min(1.0, whole.high))


def spare_counts(spares: int) -> list[int]:
    """From none to twice as many, and at least 2."""
    return sorted({0, 1, 2, *(round(spares * share) for share in SWEPT_SPARES)})


class _Player:
    """Plays scenarios of one plan under the same conditions."""

    def __init__(self, plan: Plan, conditions: Conditions) -> None:
        self.plan, self.conditions = plan, conditions
        self._fewer = fewer_nodes(plan) if conditions.fewer_nodes else None

    def scenario(self, asynchronous: bool, spares: int, every_seconds: float | None = None) -> Scenario:
        every = every_seconds or self.conditions.every_seconds
        return Scenario(asynchronous, make_job(self.plan, self.conditions, asynchronous, spares, every, self._fewer))

    def play(self, scenario: Scenario) -> Outcome:
        seconds, seed = self.conditions.days * DAY, self.conditions.seed
        return Outcome(scenario, tuple(play(scenario.job, seconds, [seed, run]) for run in range(self.conditions.runs)))

    def agreement(self, scenario: Scenario) -> Agreement:
        assumed = self.play(replace(scenario, job=as_assumed(scenario.job)))
        failures = sum(run.interruptions for run in assumed.runs)
        every, expected = scenario.every_seconds, closed_form(scenario.job)
        return Agreement(scenario.asynchronous, every, expected, assumed.goodput, failures)

    def sweep(self, asynchronous: bool, spares: int) -> Sweep:
        """Each number of steps between checkpoints once: asynchronous ones have a least."""
        best = best_seconds(self.plan, asynchronous)
        tried = [self.scenario(asynchronous, spares, share * best) for share in SWEPT_INTERVALS]
        swept = {scenario.job.saving.every_steps: scenario for scenario in tried}.values()
        points = [(self.agreement(scenario), self.play(scenario).goodput) for scenario in swept]
        return Sweep(asynchronous, best, tried[0].job, points)

    def check_length(self, sweeps: bool) -> None:
        """Raises UsageError for what would take many minutes."""
        conditions, spares = self.conditions, self.conditions.spares or 0
        plays = 6 + (4 * len(SWEPT_INTERVALS) + len(spare_counts(spares)) if sweeps else 0)
        seconds = conditions.days * DAY * conditions.runs * plays
        failures = seconds * (node_count(self.plan) + spares) / self.plan.circumstances.node_mtbf_seconds
        if failures > MOST_FAILURES:
            days = conditions.days * MOST_FAILURES / failures
            raise UsageError(
                f"{failures:,.0f} failures to play, beyond {MOST_FAILURES:,}: give --days {days:.2g}, or fewer --runs"
            )
