"""Samples of seq_len + 1 tokens: views of a token stream, cut at stride seq_len.

Consecutive samples share one token, the last target of one and the first input of the next: a stream of T tokens has
T - 1 targets. Training samples begin at an offset drawn anew for each epoch and are visited in a permuted order;
validation samples begin at 0, in file order, the last one padded. Both are pure functions of their index. A loss mask
says which tokens count where they are targets; as inputs all of them stay.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from megagpt.data.indexed import IndexedDataset, bin_path
from megagpt.data.order import FEW, epoch_offset, permutation_key, permute, place_one
from megagpt.errors import UserError

IGNORE_INDEX = -100
"""Target that the loss leaves out (torch.nn.functional.cross_entropy's default)."""

TokenArray = npt.NDArray[np.integer[Any]]
DocumentIds = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


class Windows(NamedTuple):
    """Samples as they were read."""

    tokens: TokenArray
    """(count, seq_len + 1), in the type that they are stored in, or int64: inputs, and shifted by one their targets."""
    document_ids: DocumentIds | None
    """int32 (count, seq_len): document of each input, from 0 in each sample; None: not asked for."""
    learned: BoolArray | None
    """(count, seq_len): whether each target counts, by the loss mask; None: the dataset has none."""


def samples_per_epoch(tokens: int, seq_len: int) -> int:
    """Training samples of `seq_len` that one epoch has of a dataset of so many tokens, seq_len + 1 or more."""
    return max(1, (tokens - seq_len) // seq_len)


class TokenSamples:
    """The infinite sequence of training samples of one dataset: sample n is number n % N of epoch n // N.

    Each epoch visits its N = `len(self)` samples once. Its offset lies in [0, seq_len), as far as N samples still fit;
    the fewer than 2 x seq_len tokens before and after them are left out of that epoch.
    """

    def __init__(self, dataset: IndexedDataset, seq_len: int, seed: int) -> None:
        """Samples of `seq_len` inputs and targets. UserError: the dataset has fewer than seq_len + 1 tokens."""
        tokens = dataset.num_tokens
        if tokens < seq_len + 1:
            raise UserError(
                f"{bin_path(dataset.prefix)}: one sample of seq_len {seq_len} needs {seq_len + 1} tokens, but there "
                f"are {tokens}; add text or choose a smaller seq_len"
            )
        self.dataset, self.seq_len, self.seed = dataset, seq_len, seed
        self._num_samples = samples_per_epoch(tokens, seq_len)
        self._offsets = min(seq_len, tokens - self._num_samples * seq_len)
        self._windows = sliding_window_view(dataset.stream, seq_len + 1)
        mask = dataset.loss_mask
        self._mask_windows = None if mask is None else sliding_window_view(mask[1:], seq_len)

    def __len__(self) -> int:
        """Samples an epoch."""
        return self._num_samples

    def starts(self, indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Stream position of the first token of samples `indices`, shape (count)."""
        numbers = np.atleast_1d(np.asarray(indices, np.int64))
        if numbers.size <= FEW:
            return np.array([self._start(number) for number in numbers.tolist()], np.int64)
        epochs, positions = np.divmod(numbers, len(self))
        if (epochs == epochs[:1]).all():
            epochs = epochs[:1]  # one key for all is faster
        order = permute(positions, len(self), permutation_key(self.seed, epochs))
        return epoch_offset(self.seed, epochs, self._offsets) + order * self.seq_len

    def _start(self, index: int) -> int:
        epoch, position = divmod(index, len(self))
        place, offset = place_one(self.seed, epoch, position, len(self), self._offsets)
        return offset + place * self.seq_len

    def read(self, indices: npt.ArrayLike, document_ids: bool = False) -> Windows:
        """Samples `indices` (count), and if asked for the document ids of their inputs."""
        starts = self.starts(indices)
        self.dataset.will_need(starts, self.seq_len + 1)
        tokens = self._windows[starts]
        ids = _document_ids(self.dataset, starts, self.seq_len) if document_ids else None
        return Windows(tokens, ids, None if self._mask_windows is None else self._mask_windows[starts] != 0)


class SequentialSamples:
    """Validation samples of one dataset: every token but the first is a target of exactly one of `len(self)` samples.

    The last sample is padded with IGNORE_INDEX, and samples beyond it consist of IGNORE_INDEX only.
    """

    def __init__(self, dataset: IndexedDataset, seq_len: int) -> None:
        """Samples of `seq_len` inputs and targets. UserError: the dataset has fewer than 2 tokens."""
        if dataset.num_tokens < 2:
            raise UserError(
                f"{bin_path(dataset.prefix)}: a validation dataset needs at least 2 tokens, but there are "
                f"{dataset.num_tokens}; add text or evaluate on another dataset"
            )
        self.dataset, self.seq_len = dataset, seq_len

    def __len__(self) -> int:
        """Samples with at least one target."""
        return -(-self.num_targets // self.seq_len)

    @property
    def num_targets(self) -> int:
        """Targets in all samples, those included that a loss mask leaves out."""
        return self.dataset.num_tokens - 1

    def read(self, indices: npt.ArrayLike, document_ids: bool = False) -> Windows:
        """As `TokenSamples.read`, in int64; padding is IGNORE_INDEX and belongs to the document before it."""
        starts = np.asarray(indices, np.int64) * self.seq_len
        last = self.dataset.num_tokens - 1
        positions = starts[:, None] + np.arange(self.seq_len + 1)
        tokens = self.dataset.stream[np.minimum(positions, last)].astype(np.int64)
        # A window that begins at the last token has no target: that token is one of the window before it.
        tokens[(positions > last) | (starts >= last)[:, None]] = IGNORE_INDEX
        ids = _document_ids(self.dataset, np.minimum(starts, last), self.seq_len) if document_ids else None
        mask = self.dataset.loss_mask
        return Windows(tokens, ids, None if mask is None else mask[np.minimum(positions[:, 1:], last)] != 0)


def _document_ids(dataset: IndexedDataset, starts: npt.NDArray[np.int64], seq_len: int) -> DocumentIds:
    """Number of document beginnings in (start, start + i] for input i of each sample: (count, seq_len)."""
    ends = np.minimum(starts + seq_len, dataset.num_tokens)
    first, last = dataset.document_of(np.array((starts, ends - 1)).T).T
    parts = last - first + 1  # documents that each sample has a part of
    stop = parts.cumsum()
    rows = np.arange(starts.size).repeat(parts)
    numbers = np.arange(rows.size) - (stop - parts)[rows]
    begins = dataset.pointers[dataset.document_indices[first[rows] + numbers]] // dataset.dtype.itemsize - starts[rows]
    begins[stop - parts] = 0
    lengths = np.empty_like(begins)
    lengths[:-1] = begins[1:]
    lengths[stop - 1] = seq_len
    lengths -= begins
    return numbers.astype(np.int32).repeat(lengths).reshape(starts.size, seq_len)
