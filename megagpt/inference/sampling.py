"""From logits to the next token: temperature, top-k (Fan et al. 2018), nucleus or top-p (Holtzman et al. 2020).

Each sample has its own generator, seeded by (seed, number of the sample), and spends one uniform number a token on an
inverse-CDF draw: so a sample depends neither on how many others are drawn beside it nor on the device.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megagpt.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How to choose among the next tokens. Raises UsageError for values out of range."""

    temperature: float = 1.0
    """Divides the logits: below 1 bolder, above 1 more even; 0: always the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only; None: among all."""
    top_p: float | None = None
    """Choose among the fewest likeliest tokens whose probabilities reach p together; None: among all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be 0 or more, but it is {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top-k must be 1 or more, but it is {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must be above 0 and at most 1, but it is {self.top_p}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (batch, vocab) -> the distribution (batch, vocab) fp64 that is drawn from."""
        logits = logits.double()
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()
        # The largest logit becomes 0 first, so that no temperature is too small.
        probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / self.temperature).softmax(dim=-1)
        if self.top_k is None and self.top_p is None:
            return probabilities
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ordered[:, self.top_k :] = 0
            ordered /= ordered.sum(dim=-1, keepdim=True)
        if self.top_p is not None:
            before = ordered.cumsum(dim=-1) - ordered
            ordered[before >= self.top_p] = 0
            ordered /= ordered.sum(dim=-1, keepdim=True)
        return torch.zeros_like(ordered).scatter(-1, order, ordered)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """One token a row by inverse CDF: probabilities (batch, vocab), uniforms (batch,) in [0, 1) -> (batch,) int64."""
    cumulative = probabilities.cumsum(dim=-1)
    # Scaled by the last sum, which rounding keeps from being 1, so that no draw falls behind the last token.
    thresholds = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)


def sample_generators(seed: int, num_samples: int) -> list[torch.Generator]:
    """One CPU generator a sample; the i-th depends on seed and i only."""
    return [torch.Generator().manual_seed(_hash(f"{seed}/{index}")) for index in range(num_samples)]


def uniforms(generators: Sequence[torch.Generator]) -> Tensor:
    """The next uniform number in [0, 1) of each generator: (batch,) fp64 on the CPU."""
    return torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
