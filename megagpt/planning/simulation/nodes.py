"""The nodes of a cluster: each works, fails, is repaired and works again, whether a job uses it or not.

A node's life is exponential or Weibull with the same mean, its repair exponential; as good as new after it. At the
beginning all are whole and of all ages (the rest of a life that began long ago). Every node has random numbers of its
own, so that the same nodes fail at the same times whatever the job does, and with more spares beside them.
"""

import bisect
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy


@dataclass(frozen=True)
class Wear:
    """When nodes fail, and how long they are away."""

    mtbf_seconds: float
    """Mean life of a node."""
    repair_seconds: float
    """Mean time until it is back; 0: at once."""
    shape: float = 1.0
    """Of the Weibull distribution; 1: exponential; below 1 nodes fail early or last long."""

    def life(self, generator: np.random.Generator) -> float:
        """Seconds of a node that is new."""
        return float(self._scale * generator.weibull(self.shape))

    def rest_of_life(self, seed: list[int], nodes: int) -> np.ndarray:
        """Seconds of nodes that are of any age: a part of a life that is the likelier, the longer it is."""
        ages, lengths = (np.random.default_rng([*seed, part]) for part in range(2))
        longer = self._scale * lengths.gamma(1 + 1 / self.shape, size=nodes) ** (1 / self.shape)
        return ages.random(nodes) * longer

    @property
    def _scale(self) -> float:
        return self.mtbf_seconds / math.gamma(1 + 1 / self.shape)


class Nodes:
    """`count` nodes in a simpy environment that will be run for `seconds`: those that outlive them are no process."""

    def __init__(
        self,
        environment: simpy.Environment,
        count: int,
        wear: Wear,
        slow_share: float,
        seconds: float,
        seed: list[int],
    ) -> None:
        self.environment = environment
        self.whole = list(range(count))
        """Those that work, in order."""
        self.used: frozenset[int] = frozenset()
        """By the job, which is interrupted when one of them fails."""
        self.user: simpy.Process | None = None
        """The job."""
        self.returned = environment.event()
        """Happens when a node is back."""
        self._wear, self._slow_share, self._seed = wear, slow_share, seed
        slow = np.random.default_rng([*seed, 2]).random(count) < slow_share
        self._slow = set(np.flatnonzero(slow).tolist())
        for node, life in enumerate(wear.rest_of_life(seed, count).tolist()):
            if life < seconds:
                environment.process(self._live(node, life))

    def slow(self) -> int:
        """How many of those in use are slow."""
        return len(self._slow & self.used)

    def _live(self, node: int, life: float) -> Generator[simpy.Event, Any, None]:
        generator: np.random.Generator | None = None
        while True:
            yield self.environment.timeout(life)
            generator = generator or np.random.default_rng([*self._seed, 3, node])
            del self.whole[bisect.bisect_left(self.whole, node)]
            if node in self.used:
                self.used = frozenset()
                assert self.user is not None
                self.user.interrupt(node)
            yield self.environment.timeout(self._wear.repair_seconds * generator.standard_exponential())
            bisect.insort(self.whole, node)
            (self._slow.add if generator.random() < self._slow_share else self._slow.discard)(node)
            self.returned.succeed()
            self.returned = self.environment.event()
            life = self._wear.life(generator)
