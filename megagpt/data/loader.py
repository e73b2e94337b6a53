"""Batches for training and evaluation, read by global position, so that ranks only divide what a step consumes.

A step consumes the window [consumed, consumed + global_batch_size) of samples; rank r of W reads the r-th of its W
equal contiguous parts, in micro-batches. What a window holds depends on datasets, seed and seq_len alone: not on the
number of ranks, the micro-batches or where a run was resumed.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from megagpt.config.schema import DataSource
from megagpt.data.blend import Blend
from megagpt.data.indexed import IndexedDataset, bin_path
from megagpt.data.manifest import common_tokenizer
from megagpt.data.order import ORDER_VERSION
from megagpt.data.samples import IGNORE_INDEX, SequentialSamples, TokenArray, TokenSamples, Windows
from megagpt.errors import UsageError, UserError


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
    """The endless sequence of training samples of a weighted blend of datasets."""

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
        small. UsageError: its tokenizer is larger than vocab_size, or another one than the other datasets'.
        """
        self.datasets = [IndexedDataset(source.path) for source in sources]
        self.tokenizer = common_tokenizer(self.datasets, vocab_size)
        """The tokenizer of the datasets, as far as they have manifests; None if none has."""
        self.blend = Blend([source.weight for source in sources])
        self._samples = [TokenSamples(dataset, seq_len, seed) for dataset in self.datasets]
        self._seq_len, self._document_mask, self._vocab_size = seq_len, document_mask, vocab_size
        self._has_loss_mask = any(dataset.loss_mask is not None for dataset in self.datasets)
        self.identity: dict[str, Any] = {
            "order_version": ORDER_VERSION,
            "seq_len": seq_len,
            "seed": seed,
            "tokenizer": self.tokenizer and self.tokenizer.vocab_sha256,
            "datasets": [
                {
                    "documents": dataset.num_documents,
                    "sequences": len(dataset),
                    "tokens": dataset.num_tokens,
                    "dtype": str(dataset.dtype),
                    "edge_hash": dataset.edge_hash(),
                    "quota": quota,
                }
                for dataset, quota in zip(self.datasets, self.blend.quotas.tolist(), strict=True)
            ],
        }
        """All that decides which sample is which, in JSON types; paths and machines are no part of it."""

    @property
    def fingerprint(self) -> str:
        """Hash of `identity`: runs of equal fingerprints read the same samples in the same order."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.identity, sort_keys=True).encode())

    def epochs(self, consumed: int) -> list[float]:
        """How often each dataset has been read after `consumed` samples of the blend."""
        counts = self.blend.counts(consumed).tolist()
        return [count / len(samples) for count, samples in zip(counts, self._samples, strict=True)]

    def read(self, start: int, count: int) -> Batch:
        """Samples [start, start + count). UserError: a token id is not below vocab_size."""
        datasets, numbers = self.blend.lookup(np.arange(start, start + count))
        tokens = np.empty((count, self._seq_len + 1), np.int64)
        document_ids = np.empty((count, self._seq_len), np.int32) if self._document_mask else None
        learned = np.ones((count, self._seq_len), np.bool_) if self._has_loss_mask else None
        for dataset in np.unique(datasets):
            rows = np.flatnonzero(datasets == dataset)
            part = self._samples[dataset].read(numbers[rows], self._document_mask)
            _check_ids(part.tokens, self._samples[dataset].dataset, self._vocab_size)
            tokens[rows] = part.tokens
            if document_ids is not None:
                document_ids[rows] = part.document_ids
            if learned is not None and part.learned is not None:
                learned[rows] = part.learned
        return _batch(Windows(tokens, document_ids, learned))


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
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            start_sample=0,
            stop_sample=self.num_batches * global_batch_size,
        )

    def __iter__(self) -> Iterator[Batch]:
        with self._open_loader() as loader:
            for micro_batches in loader:
                yield from micro_batches

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


class BatchLoader:
    """Iterates over steps: each item is the list of this rank's micro-batches, read ahead in a background thread.

    An error of the thread is raised where its step is asked for. Use it in a `with` block, or call `close`.
    """

    def __init__(
        self,
        data: SampleReader,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_sample: int,
        stop_sample: int | None = None,
        pin_memory: bool = False,
        prefetch: int = 2,
    ) -> None:
        """Begin to read ahead.

        Sizes and positions are in samples; start_sample is what earlier steps have consumed; no window reaches beyond
        stop_sample. prefetch: steps to read ahead, at least 1. UsageError: the global batch does not divide evenly.
        """
        if global_batch_size % (world_size * micro_batch_size):
            raise UsageError(
                f"train.global_batch_size: {global_batch_size} is not a multiple of {world_size} ranks x "
                f"train.micro_batch_size {micro_batch_size}; change one of them"
            )
        self.consumed = start_sample
        """Samples consumed by all steps so far, the one handed out last included."""
        self._data, self._micro_batch_size, self._pin_memory = data, micro_batch_size, pin_memory
        self._global_batch_size, self._share = global_batch_size, global_batch_size // world_size
        self._rank, self._window, self._stop_sample = rank, start_sample, stop_sample
        # A new thread's CUDA device is 0: pinning there would cost every rank of a node a context on the first GPU.
        initializer = partial(torch.cuda.set_device, torch.cuda.current_device()) if pin_memory else None
        self._executor = ThreadPoolExecutor(1, "batch-loader", initializer)
        self._pending: deque[Future[list[Batch]]] = deque()
        for _ in range(prefetch):
            self._request()

    def _request(self) -> None:
        """Have the next window read, unless it reaches beyond the end."""
        if self._stop_sample is None or self._window + self._global_batch_size <= self._stop_sample:
            self._pending.append(self._executor.submit(self._read, self._window + self._rank * self._share))
            self._window += self._global_batch_size

    def _read(self, start: int) -> list[Batch]:
        batch = self._data.read(start, self._share)
        if self._pin_memory:
            batch = batch.pin_memory()
        size = self._micro_batch_size
        return [batch[first : first + size] for first in range(0, self._share, size)]

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if not self._pending:
            raise StopIteration
        micro_batches = self._pending[0].result()
        self._pending.popleft()
        self._request()
        self.consumed += self._global_batch_size
        return micro_batches

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


def _check_ids(tokens: TokenArray, dataset: IndexedDataset, vocab_size: int | None) -> None:
    """An id beyond the embedding would be an illegal memory access on a GPU: name its dataset instead."""
    if vocab_size is not None and (largest := tokens.max()) >= vocab_size:
        raise UserError(
            f"{bin_path(dataset.prefix)}: holds token id {largest}, but the model knows {vocab_size} ids; raise "
            "model.vocab_size or choose another dataset"
        )


def _batch(windows: Windows) -> Batch:
    """Windows as inputs and targets."""
    samples = torch.from_numpy(windows.tokens)
    targets = samples[:, 1:].clone(memory_format=torch.contiguous_format)
    if windows.learned is not None:
        targets[torch.from_numpy(~windows.learned)] = IGNORE_INDEX
    ids = None if windows.document_ids is None else torch.from_numpy(windows.document_ids)
    return Batch(samples[:, :-1].contiguous(), targets, ids)
