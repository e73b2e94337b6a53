"""IsoFLOP curves: the best size for a budget as the minimum of a parabola through losses by log N (Hoffmann et al.
2022, approach 2), and the power law N = k C^a through the minima.

It assumes nothing about the law, but needs a minimum between the sizes that were trained. Intervals are percentiles of
parabolas through losses redrawn with the noise of single runs, as it shows in the residuals of the parametric fit; an
interval that would leave the range of sizes ends with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megagpt.scaling.laws.ladder import LadderRun
from megagpt.scaling.measurements import Interval
from megagpt.training.history import Floats

LEAST_SIZES = 3
DRAWS = 1000


@dataclass(frozen=True)
class IsoFlop:
    """The curve of one budget."""

    flops: float
    runs: list[LadderRun]
    coefficients: Floats | None
    """c2, c1, c0 of loss = c2 x^2 + c1 x + c0, x = ln N; None: fewer than LEAST_SIZES sizes."""
    minima: Floats
    """ln N of the least loss of each draw between the smallest size and the largest, ends included, (draws,)."""

    @property
    def best(self) -> Interval | None:
        """The best N; None: the losses have no minimum between the smallest size and the largest."""
        if self.coefficients is None:
            return None
        ends = self._ends()
        minimum = float(_minima(self.coefficients[None], *ends)[0])
        if minimum in ends:
            return None
        low, high = np.percentile(self.minima, [2.5, 97.5])
        return Interval(*(float(np.exp(x)) for x in (minimum, low, high)))

    def loss(self, parameters: Floats) -> Floats:
        """Of the parabola, at sizes N."""
        assert self.coefficients is not None
        return np.asarray(np.polyval(self.coefficients, np.log(parameters)), dtype=float)

    @property
    def problem(self) -> str | None:
        """Why it has no best size; None: it has one."""
        if self.coefficients is None:
            return f"{len(self.runs)} finished sizes of {LEAST_SIZES} that a parabola needs"
        if self.best is not None:
            return None
        side = "smaller" if _minima(self.coefficients[None], *self._ends())[0] == self._ends()[0] else "larger"
        return f"no minimum between the sizes: train {side} ones, too"

    def _ends(self) -> tuple[float, float]:
        return float(np.log(self.runs[0].parameters)), float(np.log(self.runs[-1].parameters))


@dataclass(frozen=True)
class SizeLaw:
    """N = k C^a through the minima."""

    exponent: Interval
    """a."""
    k: float

    def parameters(self, flops: Floats) -> Floats:
        """The best N for budgets C."""
        return self.k * flops**self.exponent.value


def fit_isoflop(flops: float, runs: Sequence[LadderRun], noise: float, seed: int = 0) -> IsoFlop:
    """The parabola of one budget. runs: by size ascending. noise: standard deviation of a run's log loss."""
    ordered = sorted(runs, key=lambda run: run.parameters)
    if len(ordered) < LEAST_SIZES:
        return IsoFlop(flops, ordered, None, np.zeros(0))
    x, losses = np.log([run.parameters for run in ordered]), np.array([run.loss for run in ordered])
    random = np.random.default_rng(seed)
    drawn = losses * np.exp(noise * random.standard_normal((DRAWS, len(losses))))
    curves = np.polyfit(x, drawn.T, 2).T
    return IsoFlop(flops, ordered, np.polyfit(x, losses, 2), _minima(curves, x[0], x[-1]))


def fit_size_law(curves: Sequence[IsoFlop]) -> SizeLaw | None:
    """The power law through the minima of two or more curves; None: fewer have one."""
    found = [curve for curve in curves if curve.best is not None]
    if len(found) < 2:
        return None
    x = np.log([curve.flops for curve in found])
    exponent, log_k = np.polyfit(x, np.log([curve.best.value for curve in found if curve.best]), 1)
    exponents = np.polyfit(x, np.stack([curve.minima for curve in found]), 1)[0]
    low, high = np.percentile(exponents, [2.5, 97.5])
    return SizeLaw(Interval(float(exponent), float(low), float(high)), float(np.exp(log_k)))


def _minima(curves: Floats, low: float, high: float) -> Floats:
    """x of the least value of each parabola (curves, 3) between low and high: the vertex, or one of these ends."""
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = -curves[:, 1] / (2 * curves[:, 0])
    at_low, at_high = (curves @ [x**2, x, 1.0] for x in (low, high))
    inside = (curves[:, 0] > 0) & (vertex > low) & (vertex < high)
    return np.where(inside, vertex, np.where(at_low < at_high, low, high))
