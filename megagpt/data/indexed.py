"""Token datasets on disk: `prefix.bin` holds the tokens, `prefix.idx` says where sequences and documents begin.

The index is the MMIDIDX layout of Megatron-LM and GPT-NeoX, version 1, little-endian, without padding:
9 bytes magic; u64 version; u8 dtype code; u64 sequences; u64 documents + 1; int32[sequences] lengths in tokens;
int64[sequences] first byte in .bin; int64[documents + 1] first sequence of each document, then their number.
A dataset may have a third file, `prefix.mask`: a byte a token, 1 where it counts as a target, 0 where it is input only.
The files are memory-mapped: opening costs the same at any size, and processes share the pages.
"""

import errno
import functools
import mmap
import os
import resource
import shutil
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import xxhash

from megagpt.data.atomic import fsync_path
from megagpt.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER = struct.Struct("<9sQBQQ")
_LENGTH, _OFFSET = np.dtype("<i4"), np.dtype("<i8")
_NEAR = 8  # sequences after one that was found, among which the next is looked for first
_CHUNK = 1 << 20  # entries or tokens handled at once, so that memory stays bounded

Array = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that stores the ids of a vocabulary: uint16 below 65,500 entries, else int32."""
    return DTYPES[8] if vocab_size < 65_500 else DTYPES[4]


def bin_path(prefix: str | Path) -> Path:
    """The token file of a dataset."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of a dataset."""
    return Path(f"{prefix}.idx")


def mask_path(prefix: str | Path) -> Path:
    """The loss mask of a dataset, which few have."""
    return Path(f"{prefix}.mask")


class IndexedDataset:
    """A memory-mapped token dataset: sequences and documents by number, and the token stream in file order.

    Opening checks sizes, counts and the ends of every array; `verify` checks all entries. Arrays are read-only views
    of the files. Pickling keeps the prefix only: a child process opens the files anew.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open `prefix`.bin, `prefix`.idx and, if it is there, `prefix`.mask.

        UserError: one of them is truncated, foreign or does not fit the others, or one of the first two is missing.
        """
        self.prefix = str(prefix)
        self._index = _map(idx_path(prefix))
        self.dtype, sequences = self._read_header()
        arrays = self._index[_HEADER.size :]
        self.lengths = arrays[: 4 * sequences].view(_LENGTH)
        """Tokens of each sequence: int32 (sequences)."""
        self.pointers = arrays[4 * sequences : 12 * sequences].view(_OFFSET)
        """First byte of each sequence in .bin: int64 (sequences)."""
        self.document_indices = arrays[12 * sequences :].view(_OFFSET)
        """First sequence of each document, then the number of sequences: int64 (documents + 1)."""
        self._content = _map(bin_path(prefix))
        self._mapping: mmap.mmap | None = None
        self._check_ends()
        self.stream = self._content.view(self.dtype)
        """All tokens in file order: (num_tokens)."""
        self.loss_mask = self._open_loss_mask()
        """0 for each token that is no target, 1 for the others: uint8 (num_tokens); None: all tokens are targets."""

    def _read_header(self) -> tuple[np.dtype, int]:
        """Data type and number of sequences, after checking them against the file's size."""
        path, size = idx_path(self.prefix), self._index.size
        head = self._index[: _HEADER.size].tobytes()
        if not head or head[: len(MAGIC)] != MAGIC[:size]:
            raise UserError(f"{path}: not a token index, it does not begin with MMIDIDX; name the prefix of a dataset")
        if size < _HEADER.size:
            raise UserError(f"{path}: truncated: {size} bytes, its header alone takes {_HEADER.size}; copy it again")
        _, version, code, sequences, boundaries = _HEADER.unpack(head)
        if version != VERSION:
            raise UserError(f"{path}: layout version {version} is not supported, only {VERSION} is; write it anew")
        if code not in DTYPES:
            known = ", ".join(f"{code} {dtype}" for code, dtype in DTYPES.items())
            raise UserError(f"{path}: unknown dtype code {code}, known are {known}; write it anew")
        if boundaries == 0:
            raise UserError(f"{path}: the document index has no entries, not even its final one; write it anew")
        expected = _HEADER.size + 12 * sequences + 8 * boundaries
        if size != expected:
            raise UserError(
                f"{path}: {'truncated' if size < expected else 'too long'}: {size} bytes, but {sequences} sequences "
                f"and {boundaries - 1} documents take {expected}; copy it again"
            )
        return DTYPES[code], sequences

    def _check_ends(self) -> None:
        """Check what can be checked in O(1): the ends of the arrays against each other and the size of .bin."""
        path, itemsize = idx_path(self.prefix), self.dtype.itemsize
        first, last = self.document_indices[[0, -1]].tolist()
        if (first, last) != (0, len(self)):
            raise UserError(
                f"{path}: its documents span sequences {first} to {last} instead of 0 to {len(self)}; write it anew"
            )
        if len(self) and self.pointers[0] != 0:
            raise UserError(f"{path}: the first sequence begins at byte {self.pointers[0]} instead of 0; write it anew")
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * itemsize if len(self) else 0
        if end != self._content.size:
            raise UserError(
                f"{bin_path(self.prefix)}: {self._content.size} bytes, but its index describes {end}; "
                "copy both files again"
            )
        if end % itemsize:
            raise UserError(f"{path}: {end} bytes of tokens do not divide into {self.dtype} tokens; write it anew")

    def _open_loss_mask(self) -> npt.NDArray[np.uint8] | None:
        path = mask_path(self.prefix)
        if not os.path.lexists(path):  # a link to nowhere is an error, not a dataset without a mask
            return None
        mask = _map(path)
        if mask.size != self.num_tokens:
            raise UserError(
                f"{path}: {mask.size} bytes, but the dataset has {self.num_tokens} tokens and a loss mask one byte for "
                "each; copy it again or make it anew"
            )
        return mask

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str]]:
        return IndexedDataset, (self.prefix,)

    def read_at_random(self) -> None:
        """From now on tokens are read here and there: then the disk reads no more than that.

        By itself the system also reads what is around, 128 KiB to many MiB, as neighbours will soon be needed. They are
        not where samples are read in a permuted order out of more data than stays in memory.
        """
        if isinstance(view := self._content.base, memoryview) and isinstance(view.obj, mmap.mmap):
            self._mapping = view.obj
            self._mapping.madvise(mmap.MADV_RANDOM)

    def will_need(self, starts: npt.NDArray[np.int64], count: int) -> None:
        """After `read_at_random`: have `count` tokens from each of these stream positions read all at once."""
        if self._mapping is None:
            return
        size, itemsize = count * self.dtype.itemsize, self.dtype.itemsize
        for start in (starts * itemsize).tolist():
            before = start % mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_WILLNEED, start - before, before + size)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.stream)

    def __getitem__(self, index: int) -> Array:
        """Tokens of sequence `index`, as a view."""
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.stream[start : start + int(self.lengths[index])]

    def document(self, index: int) -> Array:
        """Tokens of document `index` (0 to num_documents - 1), as a view."""
        return self.stream[self._document_span(index)]

    def document_loss_mask(self, index: int) -> npt.NDArray[np.uint8] | None:
        """The part of `loss_mask` for document `index`, as a view."""
        span = self._document_span(index)
        return None if self.loss_mask is None else self.loss_mask[span]

    def _document_span(self, index: int) -> slice:
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        start, stop = self.document_starts([index, index + 1])
        return slice(start, stop)

    def tokens(self, start: int, stop: int) -> Array:
        """Tokens [start, stop) of the stream, as a view."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        return self.stream[start:stop]

    def document_starts(self, documents: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Stream position of each document's first token; document num_documents begins at the end of the stream."""
        sequences = self.document_indices[np.asarray(documents, np.int64)]
        starts = np.full(sequences.shape, self.num_tokens, np.int64)
        inside = sequences < len(self)
        starts[inside] = self.pointers[sequences[inside]] // self.dtype.itemsize
        return starts

    def document_of(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The document that each stream position (0 to num_tokens - 1) belongs to.

        np.searchsorted would first copy the index, which is unaligned; a memoryview (of a little-endian machine) reads
        numbers anywhere. A search misses the processor's caches at every step, so what is near the position before it,
        and an index with one sequence a document, are tried first.
        """
        positions = np.asarray(positions, np.int64)
        found: list[int] = []
        if not positions.size:
            return np.empty(positions.shape, np.int64)
        begins, firsts = self._search_index
        sequence, last = 0, len(begins) - 1
        for byte in (positions * self.dtype.itemsize).ravel().tolist():
            near = min(sequence + _NEAR, last)
            low, high = (sequence, near) if begins[sequence] <= byte < begins[near] else (0, last + 1)
            sequence = bisect_right(begins, byte, low, high) - 1  # the last one that begins at or before the position
            alone = sequence + 1 < len(firsts) and firsts[sequence] == sequence < firsts[sequence + 1]
            found.append(sequence if alone else bisect_right(firsts, sequence) - 1)
        return np.array(found, np.int64).reshape(positions.shape)

    @functools.cached_property
    def _search_index(self) -> tuple[memoryview, memoryview]:
        """The numbers of `pointers` and `document_indices`."""
        return self.pointers.view(np.uint8).data.cast("q"), self.document_indices.view(np.uint8).data.cast("q")

    def edge_hash(self) -> str:
        """128-bit XXH3 of the first and last 64 KiB of each file: tells datasets apart without reading them whole."""
        digest = xxhash.xxh3_128()
        contents = [self._index, self._content]
        if self.loss_mask is not None:
            contents.append(self.loss_mask)
        for content in contents:
            digest.update(content[: 1 << 16].tobytes())
            digest.update(content[-(1 << 16) :].tobytes())
        return digest.hexdigest()

    def verify(self) -> tuple[int, int]:
        """Check every entry of the index and return the smallest and the largest token id; (0, 0) without tokens.

        Reads both files once. UserError names the first sequence or document that is wrong.
        """
        path = idx_path(self.prefix)
        end = 0
        for start in range(0, len(self), _CHUNK):
            lengths = self.lengths[start : start + _CHUNK].astype(np.int64)
            pointers = self.pointers[start : start + _CHUNK]
            ends = end + np.cumsum(lengths * self.dtype.itemsize)
            expected = np.concatenate([[end], ends[:-1]])
            for wrong in np.flatnonzero((lengths < 0) | (pointers != expected))[:1]:
                raise UserError(
                    f"{path}: sequence {start + wrong}: {lengths[wrong]} tokens at byte {pointers[wrong]}, but the "
                    f"sequences before it end at byte {expected[wrong]}; write it anew"
                )
            end = int(ends[-1])
        for start in range(0, self.num_documents, _CHUNK):
            first = self.document_indices[start : start + _CHUNK + 1]
            for wrong in np.flatnonzero(first[1:] < first[:-1])[:1]:
                raise UserError(
                    f"{path}: document {start + wrong + 1} begins at sequence {first[wrong + 1]}, before document "
                    f"{start + wrong} at {first[wrong]}; write it anew"
                )
        smallest, largest = [], []
        for start in range(0, self.num_tokens, _CHUNK):
            tokens = self.stream[start : start + _CHUNK]
            smallest.append(int(tokens.min()))
            largest.append(int(tokens.max()))
        return min(smallest, default=0), max(largest, default=0)

    def count_learned(self) -> int:
        """Read the loss mask and return how many tokens count as targets; all of them if there is none.

        UserError names the first byte that is neither 0 nor 1.
        """
        if self.loss_mask is None:
            return self.num_tokens
        learned = 0
        for start in range(0, self.num_tokens, _CHUNK):
            mask = self.loss_mask[start : start + _CHUNK]
            for wrong in np.flatnonzero(mask > 1)[:1]:
                raise UserError(
                    f"{mask_path(self.prefix)}: byte {start + wrong} is {mask[wrong]}, but a loss mask has 0 and 1 "
                    "only; make it anew"
                )
            learned += int(np.count_nonzero(mask))
        return learned


class IndexedDatasetWriter:
    """Writes a dataset in bounded memory; it appears, whole, when the `with` block ends.

        with IndexedDatasetWriter("data/corpus/train", token_dtype(50257)) as writer:
            writer.add_document(tokens)

    Tokens, lengths and document ends go to three files named `prefix.*.tmp`, as the index of 10^9 documents would not
    fit in memory. After an exception none of them is left, and an older dataset of that name is as it was.
    UserError at any call: the disk refuses (full, read-only, quota).
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike, loss_mask: bool = False) -> None:
        """Write `prefix`.bin and .idx with tokens of `dtype`, and .mask if loss_mask; a missing folder is made."""
        self.prefix, self.loss_mask = str(prefix), loss_mask
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES:
            raise ValueError(f"dtype {self.dtype}: the layout knows {', '.join(map(str, _CODES))}")
        self.num_tokens = self.num_sequences = self.num_documents = 0

    def __enter__(self) -> "IndexedDatasetWriter":
        with ExitStack() as stack, _disk_errors(self.prefix):
            bin_path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            self._bin, self._idx, self._documents = (
                self._open_aside(stack, suffix) for suffix in ("bin", "idx", "documents")
            )
            self._mask = self._open_aside(stack, "mask") if self.loss_mask else None
            self._idx.write(bytes(_HEADER.size))
            self._documents.write(bytes(_OFFSET.itemsize))
            self._cleanup = stack.pop_all()
        return self

    def _open_aside(self, stack: ExitStack, suffix: str) -> IO[bytes]:
        path = Path(f"{self.prefix}.{suffix}.tmp")
        stack.callback(path.unlink, missing_ok=True)
        return stack.enter_context(open(path, "w+b", buffering=1 << 20))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _disk_errors(self.prefix), self._cleanup:
            if error is None:
                self._finish()

    def add_document(self, tokens: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> None:
        """Append one document, as one sequence, of these token ids (tokens).

        mask: 1 for each token that counts as a target, 0 for the others (tokens); None: all count. ValueError: an id
        does not fit dtype, the mask does not fit the tokens, or the writer was made without loss_mask.
        """
        array = np.asarray(tokens)
        self.add_documents(array, [array.size], mask)

    def add_documents(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> None:
        """Append many documents: their token ids one after another (tokens), and the length of each (documents).

        mask: as for `add_document`, of all tokens. ValueError: as there, or the lengths are negative or do not add up
        to the number of tokens.
        """
        array, sizes = self._checked_tokens(tokens), np.asarray(lengths, np.int64)
        if sizes.ndim != 1 or sizes.sum() != array.size or ((sizes < 0) | (sizes > np.iinfo(_LENGTH).max)).any():
            raise ValueError(f"lengths must be 0 to 2^31 - 1 and add up to {array.size} tokens, not {sizes.sum()}")
        self._append_tokens(array, self._checked_mask(mask, array.size))
        self._append_document_ends(self.num_sequences + np.arange(1, sizes.size + 1))
        self._append_lengths(sizes)

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Append all documents of another dataset. UserError: it has another dtype.

        ValueError: it has a loss mask, and the writer was made without.
        """
        if dataset.dtype != self.dtype:
            raise UserError(
                f"{bin_path(dataset.prefix)}: holds {dataset.dtype}, but {bin_path(self.prefix)} is written in "
                f"{self.dtype}; merge datasets of one tokenizer only"
            )
        first_sequence = self.num_sequences
        for start in range(0, dataset.num_tokens, _CHUNK):
            tokens = dataset.stream[start : start + _CHUNK]
            mask = None if dataset.loss_mask is None else dataset.loss_mask[start : start + _CHUNK] != 0
            self._append_tokens(tokens, self._checked_mask(mask, tokens.size))
        for start in range(0, len(dataset), _CHUNK):
            self._append_lengths(dataset.lengths[start : start + _CHUNK])
        for start in range(1, dataset.num_documents + 1, _CHUNK):
            self._append_document_ends(first_sequence + dataset.document_indices[start : start + _CHUNK])

    def _checked_tokens(self, tokens: npt.ArrayLike) -> Array:
        array = np.asarray(tokens)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"tokens must be integers of shape (tokens), not {array.dtype} of {array.shape}")
        if array.dtype != self.dtype and array.size:
            limits = np.iinfo(self.dtype)
            smallest, largest = int(array.min()), int(array.max())
            if smallest < limits.min or largest > limits.max:
                raise ValueError(f"token ids {smallest} to {largest} do not fit {self.dtype}")
        return array.astype(self.dtype, copy=False)

    def _checked_mask(self, mask: npt.ArrayLike | None, tokens: int) -> npt.NDArray[np.uint8] | None:
        """The bytes of .mask for so many tokens; None if there is no such file."""
        if not self.loss_mask:
            if mask is not None:
                raise ValueError("a mask needs IndexedDatasetWriter(..., loss_mask=True)")
            return None
        array = np.ones(tokens, np.uint8) if mask is None else np.asarray(mask)
        if array.shape != (tokens,) or not np.isin(array, (0, 1)).all():
            raise ValueError(f"a mask must be 0 or 1 for each of {tokens} tokens, not {array.dtype} of {array.shape}")
        return array.astype(np.uint8)

    def _append_tokens(self, tokens: Array, mask: npt.NDArray[np.uint8] | None) -> None:
        with _disk_errors(self.prefix):
            self._bin.write(np.ascontiguousarray(tokens).data)
            if self._mask is not None and mask is not None:
                self._mask.write(mask.data)
        self.num_tokens += tokens.size

    def _append_lengths(self, lengths: Array) -> None:
        with _disk_errors(self.prefix):
            self._idx.write(lengths.astype(_LENGTH).data)
        self.num_sequences += lengths.size

    def _append_document_ends(self, sequences: Array) -> None:
        with _disk_errors(self.prefix):
            self._documents.write(sequences.astype(_OFFSET).data)
        self.num_documents += sequences.size

    def _finish(self) -> None:
        """Complete the index: pointers from the lengths already in it, document ends, and the header; then rename."""
        self._idx.flush()
        end = 0
        for start in range(0, self.num_sequences, _CHUNK):
            count = min(_CHUNK, self.num_sequences - start)
            content = os.pread(self._idx.fileno(), 4 * count, _HEADER.size + 4 * start)
            ends = end + np.cumsum(np.frombuffer(content, _LENGTH).astype(np.int64) * self.dtype.itemsize)
            self._idx.write(np.concatenate([[end], ends[:-1]]).astype(_OFFSET).data)
            end = int(ends[-1])
        self._documents.seek(0)
        shutil.copyfileobj(self._documents, self._idx, 1 << 20)
        self._idx.seek(0)
        counts = (self.num_sequences, self.num_documents + 1)
        self._idx.write(_HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], *counts))
        for file in filter(None, (self._bin, self._mask, self._idx)):
            file.flush()
            os.fsync(file.fileno())
        # Without its index a dataset does not exist, so no crash can pair new tokens with an old index.
        idx_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._bin.name, bin_path(self.prefix))
        if self._mask is not None:
            os.replace(self._mask.name, mask_path(self.prefix))
        else:
            mask_path(self.prefix).unlink(missing_ok=True)  # that of an older dataset of this name
        os.replace(self._idx.name, idx_path(self.prefix))
        fsync_path(bin_path(self.prefix).parent)


def merge(prefixes: Iterable[str | Path], output: str | Path) -> None:
    """Write the documents of several datasets, in that order, to one; if one has a loss mask, so has the output.

    UserError: none given, or unequal dtypes.
    """
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    if not datasets:
        raise UserError(f"{output}: no datasets to merge; name at least one prefix")
    loss_mask = any(dataset.loss_mask is not None for dataset in datasets)
    with IndexedDatasetWriter(output, datasets[0].dtype, loss_mask) as writer:
        for dataset in datasets:
            writer.add_dataset(dataset)


def _map(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of the file at `path`, memory-mapped read-only."""
    try:
        if path.stat().st_size == 0:
            return np.empty(0, np.uint8)  # nothing to map: mmap refuses empty files
        with open(path, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; a dataset is named by its prefix: data/train for data/train.bin and data/train.idx"
        ) from None
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if _raise_limit_of_open_files():
            return _map(path)
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; an open dataset holds two or three: raise the limit (ulimit -n)"
        ) from None


def _raise_limit_of_open_files() -> bool:
    """Raise the soft limit, 1,024 on most machines, as a process may do up to the hard one; False: it is there.

    A mapped file stays open. A limit no higher than needed keeps file numbers low, for libraries that use select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    raised = 2 * soft if hard == resource.RLIM_INFINITY else min(2 * soft, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return True


@contextmanager
def _disk_errors(prefix: str) -> Iterator[None]:
    """Turn what the operating system refuses to write into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{prefix}: cannot be written: {error.strerror}; free space or choose another folder"
        ) from error
