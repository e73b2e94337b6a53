"""Sorted runs on disk, merged in bounded memory: grouping and sorting cost disk, whatever the size of the corpus.

A run is a stretch of a file of equal records (a numpy structured type), sorted by some of their fields. Merging reads
a buffer of each run, and gives out what cannot be preceded by anything unread (Knuth, The Art of Computer Programming,
volume 3, section 5.4.1, in blocks).
"""

import bisect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.corpus.workspace import write_array

Records = npt.NDArray[Any]

_MERGE_BYTES = 1 << 26
_RUN_RECORDS = 1 << 21


@dataclass(frozen=True)
class Run:
    """Records `start` to `stop` of a file; a field `number` of theirs counts from `first`."""

    path: Path
    dtype: npt.DTypeLike
    start: int
    stop: int
    first: int = 0

    @classmethod
    def of(cls, path: Path, dtype: npt.DTypeLike, first: int = 0) -> "Run":
        """The whole file."""
        return cls(path, dtype, 0, path.stat().st_size // np.dtype(dtype).itemsize, first)

    def __len__(self) -> int:
        """Number of records."""
        return self.stop - self.start

    def read(self, start: int, stop: int) -> Records:
        """Records `start` to `stop`, counted from the run's first; numbers are uint64 with `first` added."""
        dtype = np.dtype(self.dtype)
        records = np.fromfile(self.path, dtype, stop - start, offset=(self.start + start) * dtype.itemsize)
        if records.size != stop - start:
            raise OSError(f"{self.path}: ends before record {self.start + stop}")
        assert dtype.names is not None
        if "number" not in dtype.names:
            return records
        wide = np.empty(records.size, [(name, "<u8" if name == "number" else dtype[name]) for name in dtype.names])
        for name in dtype.names:
            wide[name] = records[name]
        wide["number"] += np.uint64(self.first)
        return wide

    def between(self, field: str, low: int, high: int | None) -> "Run":
        """The records with low <= field < high (None: no limit), `field` being what the run is sorted by first."""
        if not low and high is None:
            return self
        dtype = np.dtype(self.dtype)
        assert dtype.fields is not None
        kind, offset = dtype.fields[field][:2]
        with open(self.path, "rb") as file:

            def value(index: int) -> int:
                place = (self.start + index) * dtype.itemsize + offset
                return int(np.frombuffer(os.pread(file.fileno(), kind.itemsize, place), kind)[0])

            start = bisect.bisect_left(range(len(self)), low, key=value) if low else 0
            stop = len(self) if high is None else bisect.bisect_left(range(len(self)), high, lo=start, key=value)
        return replace(self, start=self.start + start, stop=self.start + stop)


def merge_runs(
    runs: Sequence[Run], fields: Sequence[str], numbered: bool = False, memory_bytes: int = _MERGE_BYTES
) -> Iterator[Records]:
    """The records of all runs in the order of `fields`, in blocks; takes a small multiple of `memory_bytes`.

    `numbered`: the last of the fields is `number`, and the numbers of a run are all below those of the next one.
    """
    readers = [_Reader(run) for run in runs if len(run)]
    while readers:
        buffered = max(16, memory_bytes // (len(readers) * np.dtype(readers[0].run.dtype).itemsize))
        for reader in readers:
            reader.fill(buffered)
        waiting = [reader.buffer[-1:] for reader in readers if reader.has_more]
        bound = min((tuple(last[field][0] for field in fields) for last in waiting), default=None)
        taken = [reader.take(fields, bound) for reader in readers]
        readers = [reader for reader in readers if reader.has_more or reader.buffer.size]
        block = np.concatenate(taken)
        if sum(part.size > 0 for part in taken) > 1:
            keys = fields[:-1] if numbered else fields  # stable: equal ones stay in the order of runs
            block = block[np.lexsort([block[field] for field in reversed(keys)])]
        if block.size:
            yield block


class _Reader:
    """One run, read through a buffer."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.buffer = run.read(0, 0)
        self._read = 0

    @property
    def has_more(self) -> bool:
        """Whether records are left that are not in the buffer."""
        return self._read < len(self.run)

    def fill(self, size: int) -> None:
        """Read on until the buffer holds `size` records, if it is empty or half empty."""
        if self.buffer.size <= size // 2 and self.has_more:
            stop = min(len(self.run), self._read + size - self.buffer.size)
            self.buffer = np.concatenate([self.buffer, self.run.read(self._read, stop)])
            self._read = stop

    def take(self, fields: Sequence[str], bound: tuple[Any, ...] | None) -> Records:
        """Remove and return the records up to and including `bound`; None: all."""
        count = self.buffer.size
        if bound is not None and count and self._key(fields, count - 1) > bound:
            count = bisect.bisect_right(range(count), bound, key=lambda index: self._key(fields, index))
        taken, self.buffer = self.buffer[:count], self.buffer[count:]
        return taken

    def _key(self, fields: Sequence[str], index: int) -> tuple[Any, ...]:
        record = self.buffer[index]
        return tuple(record[field] for field in fields)


class RunWriter:
    """Writes records as sorted runs `name`.00000 and so on in a folder, holding one run in memory.

    Records that are equal in all fields are written once a run.
    """

    def __init__(self, folder: Path, name: str, dtype: npt.DTypeLike, run_records: int = _RUN_RECORDS) -> None:
        self._folder, self._name, self._dtype, self._run_records = folder, name, np.dtype(dtype), run_records
        self._waiting: list[Records] = []
        self._count = self._runs = 0

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if not any(error):
            self._flush()

    def add(self, records: Records) -> None:
        """Add records of the writer's type."""
        for start in range(0, records.size, self._run_records):
            block = records[start : start + self._run_records]
            self._waiting.append(block)
            self._count += block.size
            if self._count >= self._run_records:
                self._flush()

    def _flush(self) -> None:
        if not self._count:
            return
        records = np.concatenate(self._waiting)
        assert self._dtype.names is not None
        records = records[np.lexsort([records[field] for field in reversed(self._dtype.names)])]
        write_array(self._folder / f"{self._name}.{self._runs:05d}", without_repeats(records))
        self._waiting, self._count = [], 0
        self._runs += 1


def without_repeats(records: Records, last: Records | None = None) -> Records:
    """Sorted records without those equal to the one before; `last`: the one before the first (1)."""
    if not records.size:
        return records
    is_new = np.append(last is None or last[0] != records[0], records[1:] != records[:-1])
    return records[is_new]


def written_runs(folder: Path, name: str, dtype: npt.DTypeLike) -> list[Run]:
    """The runs of a RunWriter."""
    return [Run.of(path, dtype) for path in sorted(folder.glob(f"{name}.[0-9]*"))]
