"""Batches for training and evaluation, read by global position, so that ranks only divide what a step consumes.

A step consumes a window of samples, the next after the last step's; rank r of W reads the r-th of its W equal
contiguous parts, in micro-batches. What a window holds depends on datasets, seed and seq_len alone: not on the number
of ranks, the micro-batches or where a run was resumed.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from megagpt.config.batch import BatchSizes
from megagpt.config.schema import DataSource
from megagpt.data.history import BlendedDataset, BlendHistory, DatasetIdentity, Segment
from megagpt.data.indexed import IndexedDataset, bin_path
from megagpt.data.manifest import common_tokenizer
from megagpt.data.names import distinct_names
from megagpt.data.samples import IGNORE_INDEX, SequentialSamples, TokenArray, TokenSamples, Windows
from megagpt.errors import UsageError, UserError

_MEMORY_SHARE = 0.5
"""Of the machine's memory: datasets that are larger do not stay in it while a run reads them."""


@dataclass(frozen=True)
class Batch:
    """Samples for one forward pass."""

    input_ids: torch.Tensor
    """int64 (batch, seq)."""
    targets: torch.Tensor
    """int64 (batch, seq): the token after each input; IGNORE_INDEX where there is none."""
    document_ids: torch.Tensor | None = None
    """int32 (batch, seq): number of each input's document within its sample, from 0; None without a document mask."""
    target_bytes: torch.Tensor | None = None
    """int64 (batch,): bytes of UTF-8 that the targets of each sample stand for; None unless they were asked for."""

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.input_ids)

    def __getitem__(self, samples: slice) -> "Batch":
        """The batch of some of the samples, as views."""
        return self._of_each(lambda tensor: tensor[samples])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on `device`; a non-blocking copy from pinned memory overlaps with computation."""
        return self._of_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked host memory."""
        return self._of_each(torch.Tensor.pin_memory)

    def _of_each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch of what `function` makes of each tensor."""
        return replace(self, **{name: function(tensor) for name, tensor in vars(self).items() if tensor is not None})


class SampleReader(Protocol):
    """What a BatchLoader reads from: an endless sequence of samples."""

    def read(self, start: int, count: int) -> Batch:
        """Samples [start, start + count)."""


class TrainingData:
    """The endless sequence of training samples of a weighted blend of datasets.

    To go on with a run whose blend may have changed:

        data = TrainingData(config.data.train, ...)
        history, differences = continue_history(checkpoint_history, consumed, data.history)
        ...                                                              # refuse the differences, or log them
        data.follow(history)
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        seq_len: int,
        seed: int,
        document_mask: bool,
        vocab_size: int | None = None,
    ) -> None:
        """Open the datasets.

        seq_len: tokens a sample. document_mask: whether batches have document ids. vocab_size: number of ids that the
        model knows; given it, a dataset or a batch with others is refused. UserError: a dataset is damaged or too
        small. UsageError: its tokenizer is larger than vocab_size, or another one than the other datasets'; or a
        dataset or name is given twice.
        """
        names = distinct_names(sources, "data.train")
        self.datasets = [IndexedDataset(source.path) for source in sources]
        size = sum(dataset.num_tokens * dataset.dtype.itemsize for dataset in self.datasets)
        if size > _MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            for dataset in self.datasets:
                dataset.read_at_random()
        self.tokenizer = common_tokenizer(self.datasets, vocab_size)
        """The tokenizer of the datasets, as far as they have manifests; None if none has."""
        self._document_mask, self._vocab_size = document_mask, vocab_size
        self._dtype = np.result_type(*(dataset.dtype for dataset in self.datasets))
        self._has_loss_mask = any(dataset.loss_mask is not None for dataset in self.datasets)
        identities = [DatasetIdentity.of(dataset) for dataset in self.datasets]
        _refuse_equal(identities, names)
        self._samples = {
            identity: TokenSamples(dataset, seq_len, seed)
            for identity, dataset in zip(identities, self.datasets, strict=True)
        }
        datasets = [
            BlendedDataset(name=name, weight=source.weight, identity=identity)
            for name, source, identity in zip(names, sources, identities, strict=True)
        ]
        segment = Segment(start=0, seq_len=seq_len, tokenizer=self.tokenizer, datasets=datasets)
        self.follow(BlendHistory(seed=seed, segments=[segment]))

    def follow(self, history: BlendHistory) -> None:
        """Go on from the start of the history's current segment, which blends exactly the datasets opened here."""
        segment = history.current
        self.history = history
        """What was read of each dataset before, and how they are blended: what a checkpoint must keep."""
        self.blend = segment.blend()
        """The datasets of the samples from the current segment's start on, in its order."""
        self._blended = [self._samples[dataset.identity] for dataset in segment.datasets]
        assert len(self._blended) == len(self._samples), "a history of other datasets"
        self._offsets = np.array([dataset.offset for dataset in segment.datasets])

    def epochs(self, consumed: int) -> dict[str, float]:
        """How often each dataset, by name, has been read after `consumed` samples of the whole run."""
        segment = self.history.current
        counts = self.blend.counts(consumed - segment.start).tolist()
        return {
            dataset.name: dataset.epochs + count / len(samples)
            for dataset, count, samples in zip(segment.datasets, counts, self._blended, strict=True)
        }

    def read(self, start: int, count: int) -> Batch:
        """Samples [start, start + count). UserError: a token id is not below vocab_size."""
        segment = self.history.current
        assert start >= segment.start, f"sample {start} is before the blend that begins at {segment.start}"
        datasets, numbers = self.blend.lookup(np.arange(start, start + count) - segment.start)
        numbers += self._offsets[datasets]
        drawn = set(datasets.tolist())
        if len(drawn) == 1:
            return _batch(self._windows(drawn.pop(), numbers))
        tokens = np.empty((count, segment.seq_len + 1), self._dtype)
        document_ids = np.empty((count, segment.seq_len), np.int32) if self._document_mask else None
        learned = np.ones((count, segment.seq_len), np.bool_) if self._has_loss_mask else None
        for dataset in drawn:
            rows = np.flatnonzero(datasets == dataset)
            part = self._windows(dataset, numbers[rows])
            tokens[rows] = part.tokens
            if document_ids is not None and part.document_ids is not None:
                document_ids[rows] = part.document_ids
            if learned is not None and part.learned is not None:
                learned[rows] = part.learned
        return _batch(Windows(tokens, document_ids, learned))

    def _windows(self, dataset: int, numbers: npt.NDArray[np.int64]) -> Windows:
        """Samples of one dataset of the blend, by their numbers in it."""
        samples = self._blended[dataset]
        windows = samples.read(numbers, self._document_mask)
        _check_ids(windows.tokens, samples.dataset, self._vocab_size)
        return windows


class ValidationData:
    """One rank's part of a validation dataset: iterating it gives micro-batches, anew each time.

    Over all ranks every target comes once. The last windows are filled up with samples without targets, so that every
    rank gets as many micro-batches as the others: under ZeRO stage 3 they must do their forward passes together.
    """

    def __init__(
        self,
        source: DataSource,
        seq_len: int,
        document_mask: bool,
        vocab_size: int | None = None,
        token_bytes: npt.NDArray[np.int64] | None = None,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        max_batches: int | None = None,
    ) -> None:
        """Open the dataset; sizes are in samples, max_batches in global batches; errors as for TrainingData.

        token_bytes: bytes of each token id, (ids), as `megagpt.tokenizer.token_byte_lengths` gives them; given it,
        batches have `target_bytes`.
        """
        self.dataset = IndexedDataset(source.path)
        self.tokenizer = common_tokenizer([self.dataset], vocab_size)
        """The tokenizer of the dataset; None if it has no manifest."""
        self._samples = SequentialSamples(self.dataset, seq_len)
        self._document_mask, self._vocab_size = document_mask, vocab_size
        self._token_bytes = None if token_bytes is None else torch.from_numpy(token_bytes)
        batches = -(-len(self._samples) // global_batch_size)
        self.num_batches = batches if max_batches is None else min(batches, max_batches)
        """Global batches of an evaluation."""
        self._open_loader = partial(
            BatchLoader,
            self,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        self._batches = BatchSizes(global_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        with self._open_loader(step_windows(self._batches, 0, self.num_batches)) as loader:
            for batches in loader:
                yield from batches.micro_batches

    def read(self, start: int, count: int) -> Batch:
        """Samples [start, start + count). UserError: a token id is not below vocab_size."""
        windows = self._samples.read(np.arange(start, start + count), self._document_mask)
        _check_ids(windows.tokens, self.dataset, self._vocab_size)
        batch = _batch(windows)
        inputs = batch.input_ids.masked_fill(batch.input_ids == IGNORE_INDEX, 0)
        return replace(batch, input_ids=inputs, target_bytes=self._target_bytes(batch.targets))

    def _target_bytes(self, targets: torch.Tensor) -> torch.Tensor | None:
        """Bytes of the targets of each sample, (batch), of targets (batch, seq)."""
        if self._token_bytes is None:
            return None
        if (largest := int(targets.max())) >= len(self._token_bytes):
            raise UserError(
                f"{bin_path(self.dataset.prefix)}: holds token id {largest}, but its tokenizer has "
                f"{len(self._token_bytes)} ids; make the dataset anew"
            )
        return self._token_bytes[targets.clamp(min=0)].masked_fill(targets == IGNORE_INDEX, 0).sum(dim=1)


class Window(NamedTuple):
    """The samples [start, start + size) of the global order, which one step consumes."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        """The sample after the last."""
        return self.start + self.size


class StepBatches(NamedTuple):
    """What one rank computes in one step."""

    window: Window
    """What all ranks together consume."""
    micro_batches: list[Batch]
    """This rank's part of it."""


def step_windows(
    batches: BatchSizes, consumed: int, steps: int, skipped: Sequence[tuple[int, int]] = ()
) -> Iterator[Window]:
    """The windows of the next `steps` steps after `consumed` samples.

    skipped: ranges (start, stop) of samples that no step shall read; a window that would begin in one begins after it.
    """
    for _ in range(steps):
        while stops := [stop for start, stop in skipped if start <= consumed < stop]:
            consumed = max(stops)
        yield (window := Window(consumed, batches.at(consumed)))
        consumed = window.stop


class BatchLoader:
    """Iterates over steps: this rank's micro-batches of each window, read ahead in a background thread.

    An error of the thread is raised where its step is asked for. Use it in a `with` block, or call `close`.
    """

    def __init__(
        self,
        data: SampleReader,
        windows: Iterable[Window],
        *,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        pin_memory: bool = False,
        prefetch: int = 2,
    ) -> None:
        """Begin to read ahead.

        windows: one a step; sizes are in samples. prefetch: steps to read ahead, at least 1. UsageError: a window does
        not divide evenly into micro-batches of all ranks.
        """
        self._data, self._windows, self._micro_batch_size = data, iter(windows), micro_batch_size
        self._rank, self._world_size, self._pin_memory = rank, world_size, pin_memory
        # A new thread's CUDA device is 0: pinning there would cost every rank of a node a context on the first GPU.
        initializer = partial(torch.cuda.set_device, torch.cuda.current_device()) if pin_memory else None
        self._executor = ThreadPoolExecutor(1, "batch-loader", initializer)
        self._pending: deque[Future[StepBatches]] = deque()
        for _ in range(prefetch):
            self._request()

    def _request(self) -> None:
        """Have the next window read, if there is one."""
        window = next(self._windows, None)
        if window is None:
            return
        if window.size % (self._world_size * self._micro_batch_size):
            raise UsageError(
                f"train.global_batch_size: {window.size} is not a multiple of {self._world_size} ranks x "
                f"train.micro_batch_size {self._micro_batch_size}; change one of them"
            )
        self._pending.append(self._executor.submit(self._read, window))

    def _read(self, window: Window) -> StepBatches:
        share, size = window.size // self._world_size, self._micro_batch_size
        batch = self._data.read(window.start + self._rank * share, share)
        if self._pin_memory:
            batch = batch.pin_memory()
        return StepBatches(window, [batch[first : first + size] for first in range(0, share, size)])

    def __iter__(self) -> Iterator[StepBatches]:
        return self

    def __next__(self) -> StepBatches:
        if not self._pending:
            raise StopIteration
        batches = self._pending[0].result()
        self._pending.popleft()
        self._request()
        return batches

    def close(self) -> None:
        """End the thread, after the read that it is in."""
        self._pending.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _refuse_equal(identities: Sequence[DatasetIdentity], names: Sequence[str]) -> None:
    """One dataset in two places of a blend would give each sample twice, soon after one another."""
    seen: dict[DatasetIdentity, str] = {}
    for identity, name in zip(identities, names, strict=True):
        if identity in seen:
            raise UsageError(
                f"data.train: {seen[identity]} and {name} are the same dataset; give it once, with the sum of their "
                "weights"
            )
        seen[identity] = name


def _check_ids(tokens: TokenArray, dataset: IndexedDataset, vocab_size: int | None) -> None:
    """An id beyond the embedding would be an illegal memory access on a GPU: name its dataset instead."""
    if vocab_size is not None and (largest := tokens.max()) >= vocab_size:
        raise UserError(
            f"{bin_path(dataset.prefix)}: holds token id {largest}, but the model knows {vocab_size} ids; raise "
            "model.vocab_size or choose another dataset"
        )


def _batch(windows: Windows) -> Batch:
    """Windows as inputs and targets."""
    stored = torch.from_numpy(windows.tokens)
    inputs, targets = (
        part.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
        for part in (stored[:, :-1], stored[:, 1:])
    )
    if windows.learned is not None:
        targets[torch.from_numpy(~windows.learned)] = IGNORE_INDEX
    ids = None if windows.document_ids is None else torch.from_numpy(windows.document_ids)
    return Batch(inputs, targets, ids)
