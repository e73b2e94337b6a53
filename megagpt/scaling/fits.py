"""How the time of a step depends on the number of ranks R: Amdahl's law, and the same with communication.

Strong scaling:  T(R) = serial + work / R + c g(R)              Amdahl's law (1967) is c = 0
Weak scaling:    T(R) = work + ring (1 - 1/R) + c g(R)          ring: an all-reduce limited by bandwidth
with g(R) = log2 R (trees) or R - 1 (rings limited by latency, stragglers), and no coefficient below 0. What the data
cannot tell apart, the prediction does not either: the measured times are drawn anew within their errors, every draw is
fitted in both forms and decides between them by its Akaike weight, and intervals are percentiles over the draws. Where
there are more numbers of ranks than coefficients and the fit misses them by more than their errors, the errors are
taken to be larger by that factor (Birge 1932). With two numbers of ranks only one term can be fitted beside the work;
which one is then anybody's guess, and each of them gets its share of the draws.

It costs some thousand tiny non-negative least squares (Lawson and Hanson 1974), about a quarter of a second a curve.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from megagpt.scaling.measurements import Curve, Interval, Mean
from megagpt.scaling.study import Kind
from megagpt.training.history import Floats

DRAWS = 1000

LEAST_RELATIVE_ERROR = 0.005
"""Standard error of a step time below which none is believed: steps of one run do not show placement and clocks."""

Term = Callable[[Floats], Floats]
TERMS: dict[str, Term] = {
    "serial": lambda ranks: np.ones_like(ranks),
    "work / R": lambda ranks: 1 / ranks,
    "work": lambda ranks: np.ones_like(ranks),
    "ring (1 - 1/R)": lambda ranks: 1 - 1 / ranks,
    "c log2 R": lambda ranks: np.log2(ranks),
    "c (R - 1)": lambda ranks: ranks - 1,
}
_GROWTH = ("c log2 R", "c (R - 1)")
_FORMS: dict[Kind, tuple[str, str]] = {"strong": ("work / R", "serial"), "weak": ("work", "ring (1 - 1/R)")}


@dataclass(frozen=True)
class Form:
    """One formula, fitted: a sum of terms, each with a coefficient in seconds."""

    terms: tuple[str, ...]
    weight: float
    """Share of the draws that chose it."""
    coefficients: dict[str, Interval]
    """Seconds, by term; of the fit to the measured times, with intervals over all draws."""


@dataclass(frozen=True)
class Amdahl:
    """T(R) = serial + work / R alone."""

    serial_share: Interval
    """serial / (serial + work): the share of the time on one rank that more ranks do not shorten."""
    coefficients: dict[str, float]
    """Seconds, by term."""
    misfit: float | None
    """Root of chi-square per degree of freedom: how many times larger than the errors the misses are; None: no degree
    of freedom."""


class Fit:
    """The fits of one curve."""

    def __init__(
        self, kind: Kind, ranks: Sequence[int], seconds: Sequence[Mean], seed: int = 0, draws: int = DRAWS
    ) -> None:
        """seconds: mean times of a step on these numbers of ranks, at least two of them, ascending."""
        assert len(ranks) == len(seconds) >= 2
        self.kind, self.ranks = kind, np.array(ranks, dtype=float)
        measured = np.array([mean.value for mean in seconds])
        errors = np.maximum([mean.error for mean in seconds], LEAST_RELATIVE_ERROR * measured)
        work, other = _FORMS[kind]
        forms: list[tuple[str, ...]]
        if len(ranks) > 2:
            forms = [(work, other, growth) for growth in _GROWTH]
        else:
            forms = [(work, term) for term in (other, *_GROWTH)]
        best = [_solve(terms, self.ranks, measured, errors) for terms in forms]
        self.misfit = _misfit(min(chi_square for _, chi_square in best), len(ranks) - len(forms[0]))
        """Of the better form, as Amdahl.misfit."""
        errors = errors * max(1.0, self.misfit or 1.0)

        random = np.random.default_rng(seed)
        freedom = np.array([mean.freedom for mean in seconds])
        drawn = measured + errors * random.standard_t(freedom, (draws, len(ranks)))
        drawn = np.maximum(drawn, 0.1 * measured)  # a time is not negative, however wide its distribution
        solved = [[_solve(terms, self.ranks, times, errors) for times in drawn] for terms in forms]
        chi_squares = np.array([[chi_square for _, chi_square in fits] for fits in solved])
        weights = np.exp(-(chi_squares - chi_squares.min(axis=0)) / 2)
        chosen = (random.random(draws) < np.cumsum(weights / weights.sum(axis=0), axis=0)).argmax(axis=0)
        self._draws = [(forms[number], solved[number][draw][0]) for draw, number in enumerate(chosen)]
        self.forms = [
            Form(
                terms,
                float(np.mean(chosen == number)),
                {
                    term: Interval(float(best[number][0][place]), *_percentiles([fit[place] for fit, _ in fits]))
                    for place, term in enumerate(terms)
                },
            )
            for number, (terms, fits) in enumerate(zip(forms, solved, strict=True))
        ]
        self.amdahl = _amdahl(self.ranks, measured, errors, drawn) if kind == "strong" else None

    def seconds(self, ranks: Sequence[float]) -> list[Interval]:
        """Time of a step on these numbers of ranks: medians and 95% intervals over the draws."""
        return _intervals(self._predicted(ranks))

    def efficiency(self, ranks: Sequence[float]) -> list[Interval]:
        """Tokens/s of a rank over those on the smallest measured number of ranks."""
        predicted, base = self._predicted(ranks), self._predicted(self.ranks[:1])
        ratio = base / predicted
        if self.kind == "strong":
            ratio = ratio * self.ranks[0] / np.array(ranks, dtype=float)
        return _intervals(ratio)

    def _predicted(self, ranks: Sequence[float] | Floats) -> Floats:
        """Seconds by draw and number of ranks, (draws, len(ranks))."""
        at = np.array(ranks, dtype=float)
        basis = {term: TERMS[term](at) for term in {term for terms, _ in self._draws for term in terms}}
        return np.array(
            [sum(c * basis[term] for term, c in zip(terms, fit, strict=True)) for terms, fit in self._draws]
        )


def fit_curve(kind: Kind, curve: Curve) -> Fit | None:
    """The fit of a measured curve, without points whose ranks shared CPU cores; None: fewer than two are left."""
    points = [point for point in curve.points if not point.shared_cores]
    if len(points) < 2:
        return None
    return Fit(kind, [point.ranks for point in points], [point.step_seconds for point in points])


def _solve(terms: Sequence[str], ranks: Floats, seconds: Floats, errors: Floats) -> tuple[Floats, float]:
    """Coefficients of at least 0 by weighted least squares, (len(terms),), and their chi-square."""
    basis = np.stack([TERMS[term](ranks) for term in terms], axis=1)
    coefficients, rest = optimize.nnls(basis / errors[:, None], seconds / errors)
    return coefficients, float(rest) ** 2


def _amdahl(ranks: Floats, measured: Floats, errors: Floats, drawn: Floats) -> Amdahl:
    terms = _FORMS["strong"]

    def share(coefficients: Floats) -> float:
        work, serial = coefficients
        return float(serial / max(work + serial, 1e-300))

    best, chi_square = _solve(terms, ranks, measured, errors)
    shares = [share(_solve(terms, ranks, seconds, errors)[0]) for seconds in drawn]
    coefficients = dict(zip(terms, best.tolist(), strict=True))
    return Amdahl(Interval(share(best), *_percentiles(shares)), coefficients, _misfit(chi_square, len(ranks) - 2))


def _misfit(chi_square: float, freedom: int) -> float | None:
    return float(np.sqrt(chi_square / freedom)) if freedom > 0 else None


def _percentiles(values: Sequence[float] | Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _intervals(values: Floats) -> list[Interval]:
    """Of each column."""
    return [
        Interval(float(m), float(low), float(high)) for low, m, high in np.percentile(values, [2.5, 50, 97.5], axis=0).T
    ]
