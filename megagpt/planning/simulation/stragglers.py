"""How long a step takes where nodes differ: as long as on the slowest one.

A node's step takes the plan's time, times a factor whose logarithm is normal around 0, independent by node and step;
on a slow node also times a constant. The slowest of n equal nodes has the distribution function of one to the power n,
so its factor is drawn at once, whatever n is, and exactly. Moments come from that function on a grid.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr, ndtri_exp

EXACT_STEPS = 512
"""The sum of more steps is drawn as a normal variable with its mean and variance (central limit theorem)."""
_GRID_POINTS, _GRID_DEVIATIONS = 20_001, 9.0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stragglers:
    """How nodes differ."""

    jitter: float = 0.0
    """Standard deviation of the logarithm of a node's step time."""
    slow_share: float = 0.0
    """Of nodes that are slow, each with this probability from when it joins until it is repaired."""
    slow_factor: float = 1.0
    """By which their steps take longer."""


@dataclass(frozen=True)
class SlowestNode:
    """The time of a step over the plan's, of a job on `normal` and `slow` nodes."""

    normal: int
    slow: int
    stragglers: Stragglers

    def draw(self, generator: np.random.Generator, steps: int) -> Floats:
        """Of `steps` steps, independent of each other."""
        factors = [
            scale * self._largest(generator, nodes, steps)
            for nodes, scale in ((self.normal, 1.0), (self.slow, self.stragglers.slow_factor))
            if nodes
        ]
        return np.maximum.reduce(factors)

    def sums(self, generator: np.random.Generator, steps: int, count: int) -> Floats:
        """`count` sums of `steps` steps each, in the plan's step times."""
        if not self.stragglers.jitter:
            return np.full(count, steps * self.mean)
        if steps <= EXACT_STEPS:
            return self.draw(generator, steps * count).reshape(count, steps).sum(axis=1)
        return steps * self.mean + math.sqrt(steps) * self.deviation * generator.standard_normal(count)

    @property
    def mean(self) -> float:
        """Of a step."""
        return self._moments[0]

    @property
    def deviation(self) -> float:
        """Standard deviation of a step."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[float, float]:
        jitter, slowness = self.stragglers.jitter, math.log(self.stragglers.slow_factor)
        if not jitter:
            return (self.stragglers.slow_factor if self.slow else 1.0), 0.0
        logs = np.linspace(-_GRID_DEVIATIONS * jitter, max(0.0, slowness) + _GRID_DEVIATIONS * jitter, _GRID_POINTS)
        cumulated = np.exp(self.normal * log_ndtr(logs / jitter) + self.slow * log_ndtr((logs - slowness) / jitter))
        weights, middles = np.diff(cumulated), np.exp((logs[1:] + logs[:-1]) / 2)
        mean = float(weights @ middles)
        return mean, math.sqrt(float(weights @ (middles - mean) ** 2))

    def _largest(self, generator: np.random.Generator, nodes: int, steps: int) -> Floats:
        """The largest of `nodes` factors: the quantile at U^(1/nodes), by the logarithm of that, -exponential/nodes."""
        jitter = self.stragglers.jitter
        if not jitter:
            return np.ones(steps)
        return np.exp(jitter * ndtri_exp(generator.standard_exponential(steps) / -nodes))


@lru_cache(maxsize=512)
def slowest_node(normal: int, slow: int, stragglers: Stragglers) -> SlowestNode:
    """The same object for the same nodes, which keeps its moments."""
    return SlowestNode(normal, slow, stragglers)
