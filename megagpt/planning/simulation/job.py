"""One run of a job on a cluster in which nodes fail, as a discrete-event simulation (simpy), and where its time went.

The events are failures, repairs and what the job does about them; steps and checkpoints between two of them are
`stint.play_stint`. A failed node stops the whole job. It is noticed after some time; then the job waits for enough
nodes, starts, reads its newest checkpoint, and goes on, until the next of its nodes fails, be it during the start.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from megagpt.planning.simulation.nodes import Nodes, Wear
from megagpt.planning.simulation.stint import Saving, play_stint
from megagpt.planning.simulation.stragglers import Stragglers, slowest_node

PARTS = (
    "training", "stragglers", "fewer nodes", "checkpoints", "lost work", "detection", "waiting", "pre-empted", "restart"
)  # fmt: skip
"""Where the time goes. training: kept steps at the plan's step time; stragglers: what they took longer; fewer nodes:
what they took longer because nodes were missing; checkpoints: stalls; lost work: what failures destroyed; detection:
until a failure is noticed; waiting: for a node; pre-empted: others had the nodes; restart: until training goes on."""

_PREEMPTED = "pre-empted"

Team = tuple[int, float]
"""Nodes to train on, and seconds of a step on them, without stragglers."""


@dataclass(frozen=True)
class Preemption:
    """Others take the nodes: the job saves a checkpoint, leaves, and comes back."""

    every_seconds: float
    """Mean time between two, exponential; none while the job does not run."""
    away_seconds: float


@dataclass(frozen=True)
class Job:
    """What is played."""

    nodes: int
    """That it trains on."""
    step_seconds: float
    """On these, without stragglers."""
    saving: Saving
    spares: int
    """Nodes beyond those."""
    wear: Wear
    stragglers: Stragglers
    detection_seconds: float
    """From a failure until it is noticed."""
    replacement_seconds: float
    """Until another node has taken the place of a failed one."""
    start_seconds: float
    """From then until training goes on: processes start and read the checkpoint."""
    fewer_nodes: Callable[[int], Team | None] | None = None
    """What a start makes of so many whole nodes, None: nothing, it waits; None: it always waits for all."""
    preemption: Preemption | None = None

    def team(self, whole: int) -> Team | None:
        """That starts where so many nodes are whole; None: it waits."""
        if whole >= self.nodes:
            return self.nodes, self.step_seconds
        return self.fewer_nodes(whole) if self.fewer_nodes else None


@dataclass
class Played:
    """What became of one run."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    """By PARTS; together all the time that was played."""
    interruptions: int = 0
    """Failures that stopped the job."""
    progress: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, 0.0)])
    """When an interruption came, and the training that was kept until then, in seconds."""

    @property
    def goodput(self) -> float:
        """Share of the time that trains as planned."""
        return self.share("training")

    def share(self, part: str) -> float:
        """Of the time that went into one of PARTS."""
        return self.seconds[part] / sum(self.seconds.values())


def play(job: Job, seconds: float, seed: list[int]) -> Played:
    """Run `job` for `seconds`, from when it trains for the first time.

    The same seed gives the same nodes the same failures, whatever else the job has.
    """
    environment = simpy.Environment()
    nodes = Nodes(environment, job.nodes + job.spares, job.wear, job.stragglers.slow_share, seconds, [*seed, 0])
    run = _Run(job, environment, nodes, np.random.default_rng([*seed, 1]))
    nodes.user = environment.process(run.live())
    if job.preemption:
        environment.process(run.preempt(job.preemption, np.random.default_rng([*seed, 2])))
    environment.run(until=seconds)
    run.stop()
    return run.played


class _Run:
    """The job's life, and its account."""

    def __init__(self, job: Job, environment: simpy.Environment, nodes: Nodes, generator: np.random.Generator) -> None:
        self.played = Played()
        self._job, self._environment, self._nodes, self._generator = job, environment, nodes, generator
        self._phase, self._since = "restart", 0.0
        self._team: Team = (job.nodes, job.step_seconds)
        self._slow = 0

    def live(self) -> Generator[simpy.Event, Any, None]:
        """The process: train, fail, start, again and again. The first start is not played."""
        replaced = started = 0.0
        while True:
            self._enter("waiting")
            yield from self._gather()
            try:
                if replaced:
                    yield self._environment.timeout(replaced)
                self._enter("restart")
                yield self._environment.timeout(started)
                self._enter("training")
                yield self._environment.event()
            except simpy.Interrupt as interrupt:
                preempted = interrupt.cause == _PREEMPTED
            yield from self._leave() if preempted else self._notice()
            replaced = 0.0 if preempted else self._job.replacement_seconds
            started = self._job.start_seconds

    def preempt(self, preemption: Preemption, generator: np.random.Generator) -> Generator[simpy.Event, Any, None]:
        """The process that interrupts the job, if it has nodes."""
        while True:
            yield self._environment.timeout(preemption.every_seconds * generator.standard_exponential())
            if self._nodes.used:
                self._nodes.used = frozenset()
                assert self._nodes.user is not None
                self._nodes.user.interrupt(_PREEMPTED)

    def stop(self) -> None:
        """At the end of what is looked at; what is not saved yet is not lost."""
        self._enter("", fails=False)
        self.played.progress.append((self._environment.now, self.played.seconds["training"]))

    def _notice(self) -> Generator[simpy.Event, Any, None]:
        """After a failure."""
        self._enter("detection")
        self.played.interruptions += 1
        self.played.progress.append((self._environment.now, self.played.seconds["training"]))
        yield self._environment.timeout(self._job.detection_seconds)

    def _leave(self) -> Generator[simpy.Event, Any, None]:
        """Save, if there is anything to, which no failure disturbs here, and be away."""
        assert self._job.preemption is not None
        if self._phase == "training":
            self._enter("checkpoints", fails=False)
            yield self._environment.timeout(self._job.saving.write_seconds)
        self._enter("pre-empted")
        yield self._environment.timeout(self._job.preemption.away_seconds)

    def _gather(self) -> Generator[simpy.Event, Any, None]:
        """Take nodes, once there are enough."""
        while (team := self._job.team(len(self._nodes.whole))) is None:
            yield self._nodes.returned
        self._team = team
        self._nodes.used = frozenset(self._nodes.whole[: team[0]])
        self._slow = self._nodes.slow()

    def _enter(self, phase: str, fails: bool = True) -> None:
        """Settle the phase that ends now."""
        seconds = self._environment.now - self._since
        if self._phase == "training":
            self._settle(seconds, fails)
        else:
            self.played.seconds[self._phase] += seconds
        self._phase, self._since = phase, self._environment.now

    def _settle(self, seconds: float, fails: bool) -> None:
        (nodes, step_seconds), account = self._team, self.played.seconds
        slowest = slowest_node(nodes - self._slow, self._slow, self._job.stragglers)
        stint = play_stint(seconds, fails, step_seconds, slowest, self._job.saving, self._generator)
        account["training"] += stint.steps * self._job.step_seconds
        account["fewer nodes"] += stint.steps * (step_seconds - self._job.step_seconds)
        account["stragglers"] += stint.step_seconds - stint.steps * step_seconds
        account["checkpoints"] += stint.stall_seconds
        account["lost work"] += stint.lost_seconds
