"""Is what was written the model that was read? Its weights bit for bit, and its logits on random and on real tokens.

Both are read again from the disk. Weights are compared after the same mapping backwards; logits do without any mapping
where one side is a Hugging Face folder, which transformers' own classes compute. If the type of the weights changes,
the written model is compared with the source rounded to that type, so that no error hides behind the rounding, and the
rounding's own effect is told beside it.
"""

from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from megagpt.config.schema import ModelConfig
from megagpt.convert.writing import Report
from megagpt.errors import UserError
from megagpt.tokenizer import Tokenizer
from megagpt.training.weights import Weights

TOLERANCE = 1e-5
"""Largest difference of logits, as a share of the largest logit where that is above 1; sums in another order differ."""

SEQ_LEN = 128
"""Tokens of each of the two sequences, if the model reads so many."""

TEXT = (
    "The quick brown fox jumps over the lazy dog, 3.14159 times out of 2,718. In principio creavit Deus caelum et "
    "terram. Größe, naïveté, señor; Война и мир, 世界、こんにちは。\n\n"
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total\n"
    '\n"It was the best of times, it was the worst of times," she read aloud, and didn\'t look up. The train had left '
    "an hour before; nobody on the platform knew where the next one would go, or whether there was going to be one.\n"
)
"""What the real tokens are made of."""


class Difference(NamedTuple):
    """Between the logits of two models on the same tokens."""

    largest: float
    mean: float
    top1: float
    """Share of positions at which both hold the same token for the likeliest."""
    scale: float
    """The largest logit, 1 if it is smaller."""

    def __str__(self) -> str:
        return f"max {self.largest:.2e}, mean {self.mean:.2e}, top-1 agreement {self.top1:.2%}"


def sample_tokens(model: ModelConfig, tokenizer: Tokenizer | None) -> list[Tensor]:
    """Sequences (1, seq) of random ids of the model's vocabulary and, if there is a tokenizer, of TEXT's."""
    length = min(SEQ_LEN, model.max_seq_len)
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(model.vocab_size, (1, length), generator=generator)]
    if tokenizer is not None and tokenizer.vocab_size <= model.vocab_size:
        found.append(torch.tensor([tokenizer.encode(TEXT)[:length]]))
    return found


def compare_weights(expected: Weights, found: Weights, report: Report) -> None:
    """Raises UserError unless both have the same tensors, bit for bit; one of either side is in memory at a time."""
    if differing := sorted(expected.keys() ^ found.keys()):
        raise UserError(f"verification failed: weight {differing[0]} is on one side only")
    for name, weight in expected.items():
        other = found[name]
        same_form = (weight.shape, weight.dtype) == (other.shape, other.dtype)
        if not same_form or _digest(weight.read()) != _digest(other.read()):
            raise UserError(f"verification failed: weight {name} is not what the source holds")
        report(weight.nbytes)


def _digest(value: Tensor) -> bytes:
    return xxhash.xxh3_128(value.contiguous().flatten().view(torch.uint8).numpy().data).digest()


def compare_logits(expected: list[Tensor], found: list[Tensor]) -> Difference:
    """Of logits (1, seq, vocab) each; differences that are no numbers are infinite."""
    apart = torch.cat([(one - other).abs().flatten() for one, other in zip(expected, found, strict=True)])
    apart = apart.nan_to_num(nan=torch.inf)
    agree = torch.cat(
        [(one.argmax(-1) == other.argmax(-1)).flatten() for one, other in zip(expected, found, strict=True)]
    )
    scale = max(1.0, *(one.abs().max().item() for one in expected))
    return Difference(apart.max().item(), apart.mean().item(), agree.float().mean().item(), scale)


def check(difference: Difference, tolerance: float) -> None:
    """Raises UserError if it is above tolerance x scale."""
    if not difference.largest <= tolerance * difference.scale:
        raise UserError(
            f"verification failed: logits differ by up to {difference.largest:.2e}, more than {tolerance:g} x "
            f"{difference.scale:.3g} (the largest logit); nothing was kept"
        )
