"""Fits L(N, D) = E + A / N^alpha + B / D^beta to runs: Hoffmann et al. 2022, approach 3, with bootstrap intervals.

The Huber loss (delta 1e-3) of log L against the log of the law, minimized by L-BFGS from the best points of a grid of
starts. N and D are divided by their geometric means first: without that A and alpha, B and beta are nearly the same
direction, and L-BFGS stops early (Besiroglu et al. 2024 on the published fit).

Intervals are percentiles of fits to redrawn losses (a parametric bootstrap): the law's own, with normal noise whose
size is that of the residuals over n - 5 degrees of freedom, and as uncertain as that (chi-square). Runs or residuals
drawn with replacement, as is usual, give intervals that are too narrow for a dozen runs: the fit goes through five of
them exactly. A fit of 100 runs takes about half a second of a core, its DRAWS redraws 4.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from megagpt.errors import UserError
from megagpt.scaling.laws.law import Cost, Law
from megagpt.scaling.measurements import Interval
from megagpt.training.history import Floats

DELTA = 1e-3
"""Of the Huber loss, in nats of log loss: a run that is off by more than 0.1 % counts linearly."""
DRAWS = 200
COEFFICIENTS = ("E", "A", "B", "alpha", "beta")
LEAST_RUNS = 6
"""One more than coefficients."""

_STARTS = 12
_EXPONENTS = (0.1, 0.25, 0.4, 0.6, 1.0)
_FLOORS = (0.05, 0.3, 0.6, 0.9)
_SHARES = (0.02, 0.08, 0.25, 0.7)
_EXACTLY = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-7, "maxcor": 20}
_ROUGHLY = {"maxiter": 300, "ftol": 1e-9, "gtol": 1e-4, "maxcor": 20}  # enough for an interval
# Exponents outside mean that the ladder is too short to see the term; log E of -9 is no floor at all.
_BOUNDS = ((-9.0, None), (-14.0, None), (-14.0, None), (1e-2, 3.0), (1e-2, 3.0))


class Sample(NamedTuple):
    """Runs as three arrays of shape (runs,)."""

    parameters: Floats
    tokens: Floats
    losses: Floats
    """Nats a token."""

    @classmethod
    def of(cls, parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> "Sample":
        """From numbers of any kind."""
        return cls(*(np.array(values, dtype=float) for values in (parameters, tokens, losses)))


@dataclass(frozen=True)
class LawFit:
    """A law and its uncertainty."""

    law: Law
    sample: Sample
    residuals: Floats
    """log L of each run less that of the law, (runs,)."""
    draws: tuple[Law, ...]
    """Fits to redrawn losses."""
    noise: float
    """Standard deviation of a run's log loss about the law."""
    noises: Floats
    """What the draws took it to be, (draws,)."""
    at_bounds: tuple[str, ...]
    """Coefficients that the fit left at the end of what it may try, so that the runs do not determine them."""

    def coefficient(self, name: str) -> Interval:
        """One of COEFFICIENTS, with its 95 % interval."""
        return _interval(getattr(self.law, name), [getattr(law, name) for law in self.draws])

    def size_exponent(self, cost: Cost) -> Interval:
        """Of the compute-optimal size in compute."""
        return _interval(self.law.size_exponent(cost), [law.size_exponent(cost) for law in self.draws])

    def loss(self, parameters: float, tokens: float, seed: int = 1) -> Interval:
        """What a further run would reach: the law's loss; its interval holds a run's own residual, too."""
        random = np.random.default_rng(seed)
        drawn = [float(law.loss(parameters, tokens)) for law in self.draws]
        reached = np.array(drawn) * np.exp(self.noises * random.standard_normal(len(drawn)))
        return _interval(float(self.law.loss(parameters, tokens)), reached)

    def optimum(self, flops: float, cost: Cost) -> tuple[Interval, Interval, Interval]:
        """Compute-optimal parameters and tokens, and the loss that the law gives there."""
        best, drawn = self.law.optimum(flops, cost), [law.optimum(flops, cost) for law in self.draws]
        sizes, tokens, losses = zip(*drawn, strict=True)
        return (
            _interval(best.parameters, sizes),
            _interval(best.tokens, tokens),
            _interval(best.loss, losses),
        )


def too_few(parameters: Sequence[float]) -> str | None:
    """Why a law cannot be fitted to runs of these sizes (one a run); None: it can."""
    sizes = {size: list(parameters).count(size) for size in parameters}
    if len(parameters) < LEAST_RUNS or sum(count > 1 for count in sizes.values()) < 3:
        runs, s = len(parameters), "s" * (len(sizes) != 1)
        there = f"{runs} finished run{'s' * (runs != 1)} of {len(sizes)} size{s}"
        return f"{there}, but five coefficients need {LEAST_RUNS} runs, of 3 sizes with 2 budgets or more each"
    return None


def fit_law(sample: Sample, draws: int = DRAWS, seed: int = 0) -> LawFit:
    """The law of these runs. Raises UserError if they are too few, or a loss is not positive and finite."""
    if why := too_few(sample.parameters.tolist()):
        raise UserError(why)
    if not (np.isfinite(sample.losses).all() and (sample.losses > 0).all()):
        raise UserError("a loss is not a positive number")
    problem = _Problem(sample)
    best = problem.solve(sample.losses, problem.starts(sample.losses, _STARTS))
    fitted = problem.predicted_logs(best)
    residuals = np.log(sample.losses) - fitted
    freedom = len(residuals) - len(COEFFICIENTS)
    noise = math.sqrt(float(residuals @ residuals) / freedom)
    random = np.random.default_rng(seed)
    noises = noise * np.sqrt(freedom / random.chisquare(freedom, draws))
    laws = []
    for one in noises:
        losses = np.exp(fitted + one * random.standard_normal(len(fitted)))
        laws.append(problem.law(problem.solve(losses, [best], _ROUGHLY)))
    at_bounds = tuple(
        name for name, value, bounds in zip(COEFFICIENTS, best, _BOUNDS, strict=True)
        if any(bound is not None and abs(value - bound) < 1e-6 for bound in bounds)
    )  # fmt: skip
    return LawFit(problem.law(best), sample, residuals, tuple(laws), noise, noises, at_bounds)


class _Problem:
    """The fit in scaled coordinates: theta = (log E, log A', log B', alpha, beta), A' = A / mean(N)^alpha."""

    def __init__(self, sample: Sample) -> None:
        log_n, log_d = np.log(sample.parameters), np.log(sample.tokens)
        self._mean_n, self._mean_d = log_n.mean(), log_d.mean()
        self._x, self._y = log_n - self._mean_n, log_d - self._mean_d

    def law(self, theta: Floats) -> Law:
        """In N and D as they are."""
        e, a, b, alpha, beta = map(float, theta)
        return Law(math.exp(e), math.exp(a + alpha * self._mean_n), math.exp(b + beta * self._mean_d), alpha, beta)

    def predicted_logs(self, theta: Floats) -> Floats:
        """log L of each run by the law, (runs,)."""
        return special.logsumexp(self._terms(theta), axis=0)

    def starts(self, losses: Floats, count: int) -> list[Floats]:
        """The best points of the grid."""
        middle, least = np.log(np.median(losses)), np.log(losses.min())
        grid = np.array(
            list(
                itertools.product(
                    least + np.log(_FLOORS),
                    middle + np.log(_SHARES),
                    middle + np.log(_SHARES),
                    _EXPONENTS,
                    _EXPONENTS,
                )
            )
        )
        e, a, b, alpha, beta = (column[:, None] for column in grid.T)
        terms = np.stack(np.broadcast_arrays(e, a - alpha * self._x, b - beta * self._y))
        value = _huber(special.logsumexp(terms, axis=0) - np.log(losses))[0].sum(axis=1)
        return list(grid[np.argsort(value)[:count]])

    def solve(self, losses: Floats, starts: Sequence[Floats], options: Mapping[str, float] = _EXACTLY) -> Floats:
        """The best theta that L-BFGS finds from these starts."""
        logs = np.log(losses)
        found = [
            optimize.minimize(
                self._objective, start, args=(logs,), jac=True, method="L-BFGS-B", bounds=_BOUNDS, options=dict(options)
            )
            for start in starts
        ]
        return np.asarray(min(found, key=lambda one: float(one.fun)).x)

    def _terms(self, theta: Floats) -> Floats:
        e, a, b, alpha, beta = theta
        return np.stack([np.full_like(self._x, e), a - alpha * self._x, b - beta * self._y])

    def _objective(self, theta: Floats, logs: Floats) -> tuple[float, Floats]:
        """Sum of the Huber losses over delta^2, which is of the order of the runs, and its gradient."""
        terms = self._terms(theta)
        value, slope = _huber(special.logsumexp(terms, axis=0) - logs)
        weights = special.softmax(terms, axis=0) * slope
        gradient = [*weights.sum(axis=1), -(weights[1] * self._x).sum(), -(weights[2] * self._y).sum()]
        return float(value.sum()) / DELTA**2, np.array(gradient) / DELTA**2


def _huber(residuals: Floats) -> tuple[Floats, Floats]:
    """Huber losses and their slopes, elementwise."""
    size = np.abs(residuals)
    value = np.where(size <= DELTA, 0.5 * residuals**2, DELTA * (size - 0.5 * DELTA))
    return value, np.clip(residuals, -DELTA, DELTA)


def _interval(value: float, drawn: Sequence[float] | Floats) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high))
