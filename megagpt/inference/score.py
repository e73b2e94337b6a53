"""How well a model predicts a given text: the sum of its tokens' losses, of long texts by windows.

The first window predicts all its tokens; each further one begins where the last `stride` tokens that it predicts have
as much context as the model reads. The first token of a text has nothing before it and is not predicted.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from megagpt.errors import UsageError
from megagpt.model import GPT
from megagpt.model.loss import IGNORE_INDEX
from megagpt.tokenizer import Tokenizer, token_byte_lengths

_BATCH_TOKENS = 8192
"""Of the windows that the model reads at a time."""


@dataclass(frozen=True)
class Score:
    """Of one text."""

    tokens: int
    """How many were predicted."""
    text_bytes: int
    """That they stand for."""
    loss: float
    """Mean of -ln(probability) over the tokens."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers; 0 bytes (of control tokens alone): infinite."""
        return self.loss * self.tokens / math.log(2) / self.text_bytes if self.text_bytes else math.inf


def window_sizes(model: GPT, context: int | None, stride: int | None) -> tuple[int, int]:
    """(context, stride) in tokens: by default all that the model was trained for, and half of the context.

    Raises UsageError for those that do not fit.
    """
    longest = model.config.max_seq_len
    context = longest if context is None else context
    if not 1 <= context <= longest:
        raise UsageError(f"context must be 1 to {longest} tokens for this model, but it is {context}")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise UsageError(f"stride must be 1 to {context} tokens, the context, but it is {stride}")
    return context, stride


@torch.no_grad()
def score(model: GPT, ids: Sequence[int], byte_lengths: npt.NDArray[np.int64], *, context: int, stride: int) -> Score:
    """Score the tokens `ids`; byte_lengths: of each id of the vocabulary. Raises UsageError for fewer than two tokens.

    context, stride: see window_sizes; a token is predicted from at least context - stride + 1 earlier ones, where there
    are as many.
    """
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens; it takes 2 to predict one from the other")
    tokens = torch.tensor(ids, device=model.embedding.weight.device)
    windows, total = list(_windows(len(ids), context, stride)), 0.0
    # All are of one length: what does not fit a single window is at least as long as the context.
    size = max(1, _BATCH_TOKENS // context)
    for group in (windows[i : i + size] for i in range(0, len(windows), size)):
        inputs = torch.stack([tokens[begin:end] for begin, _, end in group])
        targets = torch.stack([tokens[begin + 1 : end + 1] for begin, _, end in group])
        for row, (begin, first, _) in zip(targets, group, strict=True):
            row[: first - begin - 1] = IGNORE_INDEX
        total += model(inputs, targets).item()
    return Score(len(ids) - 1, int(byte_lengths[list(ids[1:])].sum()), total / (len(ids) - 1))


def score_text(model: GPT, tokenizer: Tokenizer, text: str, *, context: int, stride: int) -> Score:
    """The same of a text."""
    return score(model, tokenizer.encode(text), token_byte_lengths(tokenizer), context=context, stride=stride)


def _windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end): tokens begin to end - 1 are read, tokens first to end are predicted."""
    first, end = 1, min(context, count - 1)
    while True:
        yield max(0, end - context), first, end
        if end == count - 1:
            return
        first, end = end + 1, min(end + stride, count - 1)
