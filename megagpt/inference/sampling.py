"""From logits to the next token: penalties, temperature, top-k (Fan et al. 2018), nucleus or top-p (Holtzman et al.
2020), min-p (Nguyen et al. 2024), in the order of transformers' logits processors.

Tokens are drawn by exponential races (the Gumbel-max trick): each token of the vocabulary has a random time of its own,
a hash of (key of the sample, step, token), and the one of smallest time / probability wins. So a sample depends neither
on what is drawn beside it nor on the device, and a rounding error of size e in the logits changes a draw with a
probability of about 2e, whatever the size of the vocabulary. An inverse-CDF draw would add up the errors of all tokens.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from megagpt.errors import UsageError

# SplitMix64 (Steele et al. 2014), in torch's signed integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


@dataclass(frozen=True)
class Sampling:
    """How to choose among the next tokens. Raises UsageError for values out of range."""

    temperature: float = 1.0
    """Divides the logits: below 1 bolder, above 1 more even; 0: always the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only; None: among all."""
    top_p: float | None = None
    """Choose among the fewest likeliest tokens whose probabilities reach p together; None: among all."""
    min_p: float | None = None
    """Choose among tokens at least this times as probable as the likeliest; None: among all."""
    repetition_penalty: float = 1.0
    """Logits of tokens in the text so far are divided by it if positive, else multiplied (Keskar et al. 2019)."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it is in the continuation."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be 0 or more, but it is {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top-k must be 1 or more, but it is {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must be above 0 and at most 1, but it is {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UsageError(f"min-p must be 0 to 1, but it is {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(f"repetition penalty must be above 0, but it is {self.repetition_penalty}")
        if not abs(self.frequency_penalty) < float("inf"):
            raise UsageError(f"frequency penalty must be a finite number, but it is {self.frequency_penalty}")

    def penalized(self, logits: Tensor, in_text: Tensor | None, counts: Tensor | None) -> Tensor:
        """Logits (batch, vocab) after the penalties.

        in_text: (batch, vocab) bool, tokens of prompt and continuation; counts: (batch, vocab), how often each is in
        the continuation. Each is read only, and may be None only, where its penalty does anything.
        """
        if self.repetition_penalty != 1:
            assert in_text is not None
            penalized = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(in_text, penalized, logits)
        if self.frequency_penalty != 0:
            assert counts is not None
            logits = logits - self.frequency_penalty * counts
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (batch, vocab) after the penalties -> the distribution (batch, vocab) fp64 that is drawn from."""
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()
        probabilities, ids = self.candidates(logits)
        return probabilities if ids is None else torch.zeros_like(logits.double()).scatter(-1, ids, probabilities)

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same as n candidates a row, at a temperature above 0: (probabilities, ids), both (batch, n).

        ids is None where all tokens are candidates, in their order.
        """
        ids = None
        if self.top_k is not None:
            logits, ids = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1)
        elif self.top_p is not None:
            logits, ids = logits.sort(dim=-1, descending=True, stable=True)
        logits = logits.double()
        # The largest logit becomes 0 first, so that no temperature is too small.
        probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / self.temperature).softmax(dim=-1)
        if self.top_p is not None:
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0)
        if self.min_p is not None:
            least = self.min_p * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0)
        return probabilities / probabilities.sum(dim=-1, keepdim=True), ids


def choose(sampling: Sampling, logits: Tensor, keys: Tensor, steps: Tensor, vocabulary: Tensor) -> Tensor:
    """The next token of each row, (batch,) int64, of logits (batch, vocab) after penalties; keys and steps: see draw.

    vocabulary: (vocab,) int64, all ids in order.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, ids = sampling.candidates(logits)
    return draw(probabilities, vocabulary if ids is None else ids, keys, steps)


def draw(probabilities: Tensor, ids: Tensor, keys: Tensor, steps: Tensor) -> Tensor:
    """One token a row, (batch,) int64, of ids (n,) or (batch, n) int64 with probabilities (batch, n) fp64.

    keys: see sample_key; steps: how many tokens the row's sample has already drawn; both (batch,) int64.
    """
    winner = (probabilities / exponentials(keys, steps, ids)).argmax(dim=-1, keepdim=True)
    return ids.expand_as(probabilities).gather(1, winner).squeeze(1)


def exponentials(keys: Tensor, steps: Tensor, tokens: Tensor) -> Tensor:
    """Random times of an exponential distribution, hashes of key, step and token.

    keys, steps: (batch,); tokens: (n,) or (batch, n); all int64 -> (batch, n) fp64.
    """
    rows = _mixed(keys + steps * _GOLDEN)
    bits = _shifted(_mixed(rows[:, None] + tokens * _GOLDEN), 11)
    return bits.double().add_(0.5).mul_(2.0**-53).log_().neg_()


def sample_key(*names: object) -> int:
    """What a sample's random numbers come from: a hash of its names (seed, id, number), as a signed 64-bit integer."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:8], "little", signed=True)


def _mixed(x: Tensor) -> Tensor:
    """x after a bijection of 64-bit integers in which every bit depends on all, in place; they overflow silently."""
    for shift, factor in _ROUNDS:
        x ^= _shifted(x, shift)
        x *= factor
    x ^= _shifted(x, 31)
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left: torch's own shift repeats the sign."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)
