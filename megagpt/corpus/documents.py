"""The documents that stay after the stage `extract`, by number, wherever they lie."""

import bisect
import functools
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megagpt.corpus.extract import DOCUMENT
from megagpt.corpus.workspace import map_array

Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Part:
    """One part of the stage `extract`; every later stage works part by part."""

    folder: Path
    chunk: int
    """Number of the chunk that it is from."""
    number: int
    """Its place among all parts."""
    first: int
    """Number of its first document."""
    count: int
    """Number of its documents."""

    @property
    def stop(self) -> int:
        """Number of the first document after it."""
        return self.first + self.count

    def __str__(self) -> str:
        return f"documents {self.first} to {self.stop}"


@dataclass(frozen=True)
class Documents:
    """All parts, in order. Sent to another process, it is the path of `table`, which holds them, if there is one."""

    parts: tuple[Part, ...]
    table: Path | None = None

    @classmethod
    def of(cls, chunks: Sequence[Path]) -> "Documents":
        """What the results of the stage `extract` hold."""
        parts: list[Part] = []
        for chunk, result in enumerate(chunks):
            for folder in sorted(result.glob("part_*")):
                count = (folder / "documents.bin").stat().st_size // DOCUMENT.itemsize
                parts.append(Part(folder, chunk, len(parts), parts[-1].stop if parts else 0, count))
        return cls(tuple(parts))

    def saved(self, path: Path) -> "Documents":
        """The same, with a table at this path, which is written."""
        saved = Documents(self.parts, path)
        with open(path, "wb") as file:
            pickle.dump(self.parts, file)
        return saved

    def __reduce__(self) -> tuple[Any, ...]:
        return (_load, (self.table,)) if self.table else (Documents, (self.parts,))

    def __len__(self) -> int:
        """Number of documents."""
        return self.parts[-1].stop if self.parts else 0

    def gather(self, name: str, dtype: npt.DTypeLike, numbers: Numbers, columns: int | None = None) -> npt.NDArray[Any]:
        """The entries of documents `numbers` (documents) in the arrays `name` of the parts: (documents) or
        (documents, columns). Holds no more than one part's array besides the result."""
        order = np.argsort(numbers, kind="stable")
        in_order = numbers[order].astype(np.int64)
        bounds = np.searchsorted(in_order, [part.first for part in self.parts] + [len(self)])
        result = np.empty(numbers.size if columns is None else (numbers.size, columns), dtype)
        for part, begin, end in zip(self.parts, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if begin < end:
                entries = map_array(part.folder / name, dtype, columns)
                result[order[begin:end]] = entries[in_order[begin:end] - part.first]
        return result

    def id(self, number: int) -> str:
        """The id of one document."""
        _, document = self._find(number)
        return f"{document['file']}:{document['position']}"

    def text(self, number: int) -> bytes:
        """The text of one document in UTF-8."""
        part, document = self._find(number)
        with open(part.folder / "text.bin", "rb") as file:
            file.seek(int(document["begin"]))
            return file.read(int(document["size"]))

    def _find(self, number: int) -> tuple[Part, np.void]:
        part = self.parts[bisect.bisect_right(self.parts, number, key=lambda part: part.first) - 1]
        return part, map_array(part.folder / "documents.bin", DOCUMENT)[number - part.first]


@functools.lru_cache(maxsize=1)
def _load(table: Path) -> Documents:
    with open(table, "rb") as file:
        return Documents(pickle.load(file), table)
