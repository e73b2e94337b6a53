"""The law L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022), and the best N and D that compute C can buy.

Compute is k N^kappa D: k = 6 and kappa = 1 is the usual estimate (Kaplan et al. 2020); a ladder of small models, whose
attention and head count for more, has a k and kappa of its own. Minimizing L with C = k N^kappa D gives, with
a = beta / (alpha + kappa beta) and G = (alpha A / (kappa beta B))^(1 / (alpha + kappa beta)),

    N = G (C / k)^a,    D = C / (k N^kappa).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megagpt.training.history import Floats


@dataclass(frozen=True)
class Cost:
    """FLOPs of training a model of N parameters on D tokens: k N^kappa D."""

    k: float = 6.0
    kappa: float = 1.0
    misfit: float = 0.0
    """Largest relative distance from the counted FLOPs that it was fitted to."""

    @classmethod
    def fitted(cls, parameters: Sequence[float], flops_per_token: Sequence[float]) -> "Cost":
        """The power law through what a token costs, by the sizes of a ladder; two different ones at least."""
        x, y = np.log(parameters), np.log(flops_per_token)
        kappa, log_k = np.polyfit(x, y, 1)
        misfit = np.expm1(np.abs(log_k + kappa * x - y)).max()
        return cls(float(np.exp(log_k)), float(kappa), float(misfit))


class Optimum(NamedTuple):
    """What a budget is best spent on."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Law:
    """Losses in nats a token, by parameters N and tokens D; all coefficients are above 0."""

    E: float
    """Loss of an infinite model on infinite data."""
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float | Floats, tokens: float | Floats) -> Floats:
        """L(N, D), elementwise."""
        by_size = self.A * np.asarray(parameters, dtype=float) ** -self.alpha
        return np.asarray(self.E + by_size + self.B * np.asarray(tokens, dtype=float) ** -self.beta)

    def size_exponent(self, cost: Cost = Cost()) -> float:
        """a of N = G (C / k)^a."""
        return self.beta / (self.alpha + cost.kappa * self.beta)

    def optimum(self, flops: float, cost: Cost = Cost()) -> Optimum:
        """The compute-optimal N and D for so many FLOPs."""
        power = 1 / (self.alpha + cost.kappa * self.beta)
        log_g = power * np.log(self.alpha * self.A / (cost.kappa * self.beta * self.B))
        log_n = log_g + self.size_exponent(cost) * np.log(flops / cost.k)
        log_d = np.log(flops / cost.k) - cost.kappa * log_n
        parameters, tokens = float(np.exp(log_n)), float(np.exp(log_d))
        return Optimum(parameters, tokens, float(self.loss(parameters, tokens)))


PUBLISHED = {
    "Hoffmann et al. 2022": Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "Besiroglu et al. 2024": Law(E=1.82, A=482.0, B=2085.0, alpha=0.35, beta=0.37),
}
"""Of Chinchilla's runs, N with embeddings: as published (arXiv 2203.15556, eq. 10), and refitted to the data of its
figure (arXiv 2404.10102). Losses depend on tokenizer and text; exponents and optima can be compared with care."""
